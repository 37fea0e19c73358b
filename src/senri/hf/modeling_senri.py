"""SenriForCausalLM: Senri as transformers knows a language model, with a session on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from senri.hf.cache import SenriCache
from senri.hf.configuration_senri import SenriConfig
from senri.hf.int8_decoder import int8_head, is_next
from senri.hf.model import SenriModel, SenriPreTrainedModel
from senri.hf.session_mixin import SessionMixin
from senri.layers import (
    PackedLinear,
    PackedWeights,
    UnigramCache,
    is_plain,
    packs,
    wants_gradients,
)


class _Rows:
    """Which rows of a session's batch have ended: transformers goes on feeding them padding until all have."""

    def __init__(self, eos: Tensor | None) -> None:
        self.eos = eos
        self.prompt: int | None = None  # columns of the prompt, known at the first step

    def mask(self, input_ids: Tensor, new: int, attention_mask: Tensor | None) -> Tensor | None:
        """The mask of the ``new`` last columns of ``input_ids`` ``[B, T]``: 0 from a row's end token on."""
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
            return attention_mask
        if self.eos is None:
            return attention_mask
        made = torch.isin(input_ids[:, self.prompt :], self.eos.to(input_ids.device))
        return (made.cumsum(1) == 0)[:, -new:].long()


class SenriForCausalLM(SenriPreTrainedModel, SessionMixin, GenerationMixin):
    """Senri with a language-model head: ``generate``, ``Trainer``, PEFT as for any Hugging Face model.

    Beyond them a session (see :class:`SessionMixin`): after ``reset_memory()`` every call in ``eval()`` goes on from
    the last, until ``end_session()``.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SenriConfig) -> None:
        super().__init__(config)
        self.model = SenriModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.unigram_cache = UnigramCache(config.vocab_size) if config.unigram_cache else None
        self.packed = PackedWeights()
        self.session: SenriCache | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SenriCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocabulary]`` (the last ``logits_to_keep`` positions), and the loss if ``labels`` are given.

        Arguments as for :class:`SenriModel`. ``labels`` ``[B, T]`` are shifted inside; -100 is not scored.
        """
        if past_key_values is None and self.session is not None and not self.training:
            past_key_values = self.session
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if isinstance(kept, Tensor) or logits_to_keep:
            hidden = hidden[:, kept]
        logits = self._head(hidden)(hidden)
        if self.unigram_cache is not None and outputs.unigram is not None:
            steps = outputs.last_hidden_state.shape[1]
            logits = self.unigram_cache(logits, outputs.unigram, torch.arange(steps, device=logits.device)[kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _head(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """The language-model head in the form that is fastest for ``hidden`` ``[B, T, hidden]``."""
        if not is_plain(self.lm_head) or wants_gradients(*self.lm_head.parameters()):
            return self.lm_head
        wanted = self.config.decoding_weights
        if wanted != "full" and is_next(hidden):
            form = self.packed.get(wanted, self.lm_head, make=lambda head: int8_head(head, wanted))
            if form is not None:
                return form
        return self.packed.get("lm_head", self.lm_head, make=PackedLinear) if packs(hidden) else self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers does, but positions are counted by the cache: they go on from what was read before."""
        session = kwargs.pop("senri_session", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if session is not None:
            inputs["attention_mask"] = session.mask(
                input_ids, inputs["input_ids"].shape[1], inputs.get("attention_mask")
            )
        if inputs.get("past_key_values") is not None:
            inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} is not for Senri: its cache already "
                "has a fixed size; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and self.session is not None and not self.training:
            if max(generation_config.num_beams, generation_config.num_return_sequences) > 1:
                raise ValueError(
                    "beam search and num_return_sequences > 1 would split the session's memory: call end_session() "
                    "first, or generate with past_key_values=model.get_memory_state()"
                )
            if generation_config.use_cache is False:
                raise ValueError("use_cache=False would read the prompt again at every token of a session: leave it on")
            self.session.offset = self.session.columns
            model_kwargs["past_key_values"] = self.session
            if batch_size > 1:
                model_kwargs["senri_session"] = _Rows(generation_config._eos_token_tensor)
            return
        cache = model_kwargs.get("past_key_values")
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if isinstance(cache, SenriCache) and copies > 1 and cache.batch_size == batch_size:
            cache = cache.fork()  # the caller's has one row for all beams, and stays as it is
            cache.batch_repeat_interleave(copies)
            model_kwargs["past_key_values"] = cache
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.model.new_cache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)
