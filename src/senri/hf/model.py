"""SenriModel: a pretrained decoder with a window of exact attention and a memory behind it, without a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.generic import can_return_tuple

from senri.hf.cache import LayerState, ModelState, SenriCache
from senri.hf.configuration_senri import SenriConfig
from senri.hf.decoder import AttentionPlan, SenriDecoderLayer, SenriRotaryEmbedding
from senri.hf.int8_decoder import int8_layers, next_token
from senri.layers import (
    MemoryAttention,
    MemoryLayerState,
    MemoryStream,
    PackedWeights,
    UnigramCache,
    Writing,
    best_block_size,
    new_sinks,
    sinks_behind,
    taps_of,
    window_plan,
)
from senri.memory.stream import unpack_index
from senri.memory.unigram import UnigramStream, count

INFERENCE_PIECE = 2048  # tokens of one pass without gradient: bounds the activations of a long prompt
SURPRISE_BLOCK = 512  # tokens whose logits exist at once while the surprise is computed


@dataclass
class SenriModelOutput(BaseModelOutputWithPast):
    """transformers' output, and what the language-model head needs for its unigram cache."""

    unigram: UnigramStream | None = None


class SenriPreTrainedModel(PreTrainedModel):
    """Base class: configuration, initialisation, and what transformers may do with the model."""

    config: SenriConfig
    config_class = SenriConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SenriDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _is_stateful = True  # assisted decoding would have to roll the memory back

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give every parameter that no checkpoint brought its start value."""
        super().initialize_weights()
        # Not in _init_weights(): for models outside its own package transformers never calls it on a module whose
        # parameters all belong to submodules, so that a memory kept Linear's random values and was not silent.
        for module in self.modules():
            if isinstance(module, MemoryAttention | UnigramCache):
                loaded = {n: p.clone() for n, p in module.named_parameters() if getattr(p, "_is_hf_initialized", False)}
                module.reset_parameters()
                for name, value in loaded.items():
                    module.get_parameter(name).copy_(value)


class SenriModel(SenriPreTrainedModel):
    """The decoder without a language-model head.

    A forward without a cache is stateless; with a :class:`SenriCache` it goes on from it and updates it. Cutting an
    input into calls changes no result.
    """

    def __init__(self, config: SenriConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([SenriDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SenriRotaryEmbedding(config=config)
        self.packed = PackedWeights()
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SenriCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SenriModelOutput:
        """Hidden states of ``input_ids`` ``[B, T]`` after the last norm.

        Args:
            attention_mask: ``[B, T]`` or longer (the last T columns count); 0 where padded.
            position_ids: ``[B, T]``; counted from the cache when None. Without cache and mask, positions that start
                again at 0 mark documents packed into one row: they never see each other.
            past_key_values: a :class:`SenriCache`, updated in place by replacing its state.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; a mask or cache that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("Senri's fused attention returns no attention maps: leave output_attentions off")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        unpadded = attention_mask is None or (attention_mask.dim() == 2 and bool(attention_mask.all()))
        if position_ids is not None and past_key_values is None and unpadded:
            packed = self._packed_forward(input_ids, inputs_embeds, position_ids, output_hidden_states)
            if packed is not None:
                return packed
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = past_key_values if past_key_values is not None else self.new_cache()
        mask = self._check_inputs(input_ids, inputs_embeds, attention_mask, cache)
        if cache.state is None:
            cache.state = self.empty_state(inputs_embeds.shape[0], inputs_embeds.dtype, training=self.training)
        self._check_padding(mask, cache, inputs_embeds.shape[1])
        self.catch_up(cache)
        outputs, collected, leaving = [], [], []
        for start in range(0, inputs_embeds.shape[1], self._piece_size(inputs_embeds.shape[1])):
            part = slice(start, start + self._piece_size(inputs_embeds.shape[1]))
            hidden, states, left = self._forward_piece(
                inputs_embeds[:, part],
                None if input_ids is None else input_ids[:, part],
                None if mask is None else mask[:, part],
                None if position_ids is None else position_ids[:, part],
                cache,
                bool(output_hidden_states),
            )
            outputs.append(hidden)
            if left is not None:
                leaving.append(left)
            if output_hidden_states:
                collected.append((*states, hidden))
        hidden = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        all_hidden = None
        if output_hidden_states:
            all_hidden = tuple(torch.cat(parts, dim=1) for parts in zip(*collected, strict=True))
        unigram = None
        if leaving:
            ids, there = (torch.cat(parts, dim=1) for parts in list(zip(*leaving, strict=True))[1:])
            unigram = UnigramStream(leaving[0].counts, ids, there)
        return SenriModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=all_hidden,
            unigram=unigram,
        )

    @torch.no_grad()
    def read(self, input_ids: Tensor, cache: SenriCache) -> None:
        """Read ``input_ids`` ``[B, T]`` into the cache without predicting anything: as :meth:`forward`, but cheaper.

        What the memory is written from is known below the last layer with one. The layers from there on only look back
        over a few windows, so they wait: the last inputs of theirs are kept, as many as :meth:`catch_up` needs to end
        in the very state of a forward. Where this cannot be (the surprise write gate, read-outs into the layers,
        padding) it is a forward. There are no gradients.
        """
        for piece in input_ids.split(self._piece_size(input_ids.shape[1]), dim=1):
            if not self._can_defer(cache):
                self(piece, past_key_values=cache)
            else:
                self._check_inputs(piece, piece, None, cache)
                self._read_piece(piece, cache)

    @torch.no_grad()
    def catch_up(self, cache: SenriCache) -> None:
        """Compute what :meth:`read` deferred, layer by layer, each over the tokens that the layers above it look at."""
        state = cache.state
        if state is None or state.deferred is None:
            return
        hidden, layers = state.deferred, list(state.layers)
        for i in range(self._first_deferred, len(layers)):
            needed = (len(layers) - i) * (self.config.sliding_window_size - 1)
            if hidden.shape[1] > needed:
                hidden, layers[i] = hidden[:, hidden.shape[1] - needed :], _without_window(layers[i])
            if not hidden.shape[1]:  # a window of one token looks back at none
                break
            outputs, before = [], hidden.shape[1]
            for piece in hidden.split(INFERENCE_PIECE, dim=1):
                index = torch.arange(piece.shape[1], device=piece.device) - before
                plan = self._plan(
                    piece, layers[i].keys.shape[2], state.position[:, None] + index, state.since_flush[:, None] + index
                )
                out, _, layers[i], _ = self.layers[i](piece, layers[i]._replace(memory=None), plan, None)
                outputs.append(out)
                before -= piece.shape[1]
            hidden = torch.cat(outputs, dim=1)
        memories = [layer._replace(memory=old.memory) for layer, old in zip(layers, state.layers, strict=True)]
        cache.commit(state._replace(layers=tuple(memories), deferred=None), columns=0)

    @property
    def _first_deferred(self) -> int:
        return max(self.config.memory_layers)

    def _can_defer(self, cache: SenriCache) -> bool:
        config, state = self.config, cache.state
        return (
            config.num_memory_layers > 0
            and config.memory_readout == "head"
            and config.write_gate != "surprise"
            and not cache.has_padding
            and state is not None
            and bool((state.since_flush >= config.num_sink_tokens).all())  # every layer has its sinks
        )

    def _read_piece(self, ids: Tensor, cache: SenriCache) -> None:
        """The layers below the last memory over ``ids`` ``[B, T]``; commits the new state at the end."""
        state = cache.state
        assert state is not None
        hidden, valid = self.embed_tokens(ids), torch.ones_like(ids, dtype=torch.bool)
        stream = self._stream(state, valid, ids, None)
        steps, first = ids.shape[1], self._first_deferred
        index = torch.arange(steps, device=ids.device)
        plan = (
            self._plan(
                hidden,
                state.layers[0].keys.shape[2],
                state.position[:, None] + index,
                state.since_flush[:, None] + index,
            )
            if first
            else None
        )
        layers = list(state.layers)
        waiting: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers[:first]):
            hidden, memory_input, layers[i], _ = layer(hidden, state.layers[i], plan, stream)
            if memory_input is not None:
                waiting[i] = memory_input
        waiting[first] = cast(SenriDecoderLayer, self.layers[first]).input_layernorm(hidden)
        for i, memory_input in waiting.items():
            old = cast(MemoryLayerState, state.layers[i].memory)
            written = self.memories[i].write(memory_input, stream, old, self.embed_tokens.weight)
            layers[i] = layers[i]._replace(memory=written)
        if state.deferred is not None:
            hidden = torch.cat([state.deferred, hidden], dim=1)
        needed = (len(layers) - first) * (self.config.sliding_window_size - 1)
        if hidden.shape[1] > needed:
            hidden = hidden[:, hidden.shape[1] - needed :]
            layers[first:] = [_without_window(layer) for layer in layers[first:]]
        slots = state.ids.shape[1]
        cache.commit(
            state._replace(
                layers=tuple(layers),
                ids=cast(Tensor, stream.ids)[:, -slots:],
                valid=stream.valid[:, -slots:],
                written=cast(Tensor, stream.written)[:, -slots:],
                position=state.position + steps,
                since_flush=state.since_flush + steps,
                deferred=hidden,
                counts=_counted(self._leaving(state, stream, steps)),
            ),
            steps,
        )

    def _plan(
        self,
        hidden: Tensor,
        past: int,
        position_ids: Tensor,
        index: Tensor,
        valid: Tensor | None = None,
        window_valid: Tensor | None = None,
    ) -> AttentionPlan:
        """How ``hidden`` ``[B, T, hidden]`` attends; ``index`` ``[B, T]``: number of each token in its text."""
        window, num_sinks = self.config.sliding_window_size, self.config.num_sink_tokens
        behind = sinks_behind(index, num_sinks, window)
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        block_size = best_block_size(hidden, padded=window_valid is not None)
        return AttentionPlan(
            window_plan(hidden.shape[1], past, window, window_valid, hidden.device, behind, block_size),
            self.rotary_emb(hidden, position_ids),
            new_sinks(index, valid, num_sinks),
            self.rotary_emb.sinks(hidden, num_sinks, window),
        )

    @property
    def memories(self) -> dict[int, MemoryAttention]:
        """The memory of each layer that has one, by layer index."""
        return {i: cast(MemoryAttention, self.layers[i].memory) for i in self.config.memory_layers}

    def new_cache(self) -> SenriCache:
        """An empty cache for this model."""
        return SenriCache(self.config.num_hidden_layers, self.config.sliding_window_size)

    def flush(self, cache: SenriCache) -> None:
        """Write what the window still holds into the memory and empty the window, sinks included: the end of a text.

        Afterwards each token read so far has been written exactly once, but for those of :meth:`SenriCache.leave_out`.
        """
        if cache.state is None:
            return
        state = cache.state
        memories = self._with_window(state)
        layers = []
        for i, old in enumerate(state.layers):
            memory = memories.get(i, old.memory)
            if memory is not None:
                ended = None if memory.memory is None else memory.memory.end_of_text()
                memory = MemoryLayerState(ended, torch.zeros_like(memory.recent))
            sinks = (torch.zeros_like(old.sink_keys), torch.zeros_like(old.sink_values))
            layers.append(LayerState(old.keys[:, :, :0], old.values[:, :, :0], *sinks, memory))
        empty = torch.zeros_like(state.ids)
        cache.commit(
            state._replace(
                layers=tuple(layers),
                ids=empty,
                valid=empty.bool(),
                written=empty.bool(),
                surprise=None if state.surprise is None else torch.zeros_like(state.surprise),
                since_flush=torch.zeros_like(state.since_flush),
                deferred=None,  # no one will look back at it
                counts=None if state.counts is None else torch.zeros_like(state.counts),  # another text, other words
            ),
            columns=0,
        )
        cache.has_padding = False

    @torch.no_grad()
    def write_window(self, cache: SenriCache) -> None:
        """Write what the window still holds into the memory, too, and keep the window: what a question needs.

        What was told last may contradict what the memory holds from before, and only what is written can replace it
        there. The newest token waits, since its write gate looks at the one that follows. Nothing is written twice:
        these tokens leave the window without being written, and after :meth:`flush` the memory is the same as without
        this call.
        """
        state = cache.state
        if state is None:
            return
        now = state.valid.clone()
        now[:, -1] = False
        if not (now & ~state.written).any():
            return
        layers = list(state.layers)
        for i, memory in self._with_window(state, left_out=state.written | ~now).items():
            layers[i] = layers[i]._replace(memory=memory)
        cache.commit(state._replace(layers=tuple(layers), written=state.written | now), columns=0)

    def _with_window(self, state: ModelState, left_out: Tensor | None = None) -> dict[int, MemoryLayerState]:
        """Each layer that writes, with what the window still holds written too, but for ``left_out`` ``[B, N]``."""
        batch, window = state.ids.shape[0], self.config.sliding_window_size
        nothing = torch.zeros(batch, window, dtype=torch.bool, device=state.ids.device)
        stream = self._stream(state, nothing, nothing.long(), nothing.to(self.dtype))
        if left_out is not None:
            stream = stream._replace(written=torch.cat([left_out, nothing], dim=1))
        layers = {}
        for i, memory in self.memories.items():
            old = cast(MemoryLayerState, state.layers[i].memory)
            if old.memory is not None:
                blank = old.recent.new_zeros(*nothing.shape, old.recent.shape[2])
                after = memory.write(blank, stream, old, self.embed_tokens.weight)
                layers[i] = old._replace(memory=after.memory)
        return layers

    # one piece ------------------------------------------------------------------------------------------------

    def _forward_piece(
        self,
        hidden: Tensor,
        ids: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SenriCache,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[Tensor], UnigramStream | None]:
        """All layers over ``hidden`` ``[B, T, hidden]``; commits the new state at the end, and only then."""
        state = cache.state
        assert state is not None
        batch, steps = hidden.shape[:2]
        valid = torch.ones(batch, steps, dtype=torch.bool, device=hidden.device) if mask is None else mask
        has_padding = cache.has_padding or mask is not None
        past = state.layers[0].keys.shape[2]
        if position_ids is None:
            position_ids = (state.position[:, None] + valid.cumsum(1) - 1).clamp(min=0)
        stream = self._stream(state, valid, ids, None)
        window_valid = stream.valid[:, -(past + steps) :] if has_padding else None
        index = state.since_flush[:, None] + valid.cumsum(1) - 1
        plan = self._plan(hidden, past, position_ids, index, valid, window_valid)
        hidden, layers, waiting, inputs = self._run_layers(hidden, state, plan, stream, output_hidden_states)
        hidden = self.norm(hidden)
        last_hidden, surprise, shared = state.last_hidden, None, None
        if self.config.write_gate == "surprise":
            assert ids is not None
            surprise = self._surprise(hidden, ids, stream.valid, last_hidden)
            last_hidden = hidden[:, -1].detach()
            stream = self._stream(state, valid, ids, surprise)
        for i, memory_input in waiting.items():
            module, embedding = self.memories[i], self.embed_tokens.weight
            old = cast(MemoryLayerState, state.layers[i].memory)
            if module.writes:
                shared = module.writing(memory_input, stream, old, embedding)
            read, memory = module(memory_input, stream, old, embedding, shared)
            layers[i] = layers[i]._replace(memory=memory)
            hidden = hidden + read
        slots = state.ids.shape[1]
        left = self._leaving(state, stream, steps)
        new_state = ModelState(
            layers=tuple(layers),
            ids=state.ids if stream.ids is None else stream.ids[:, -slots:],
            valid=stream.valid[:, -slots:],
            written=cast(Tensor, stream.written)[:, -slots:],
            surprise=None if stream.surprise is None else stream.surprise[:, -slots:],
            last_hidden=last_hidden,
            position=state.position + valid.sum(1),
            since_flush=state.since_flush + valid.sum(1),
            counts=_counted(left),
        )
        cache.has_padding = has_padding
        cache.commit(new_state, steps)
        return hidden, inputs, left

    def _leaving(self, state: ModelState, stream: MemoryStream, steps: int) -> UnigramStream | None:
        """The tokens that leave the window during the ``steps`` new ones of ``stream``, for the unigram cache."""
        if state.counts is None or stream.ids is None:
            return None
        first = state.ids.shape[1] - self.config.sliding_window_size
        part = slice(first, first + steps)
        return UnigramStream(state.counts, stream.ids[:, part], stream.valid[:, part])

    def _run_layers(
        self, hidden: Tensor, state: ModelState, plan: AttentionPlan, stream: MemoryStream, keep_inputs: bool
    ) -> tuple[Tensor, list[LayerState], dict[int, Tensor], list[Tensor]]:
        """The last layer's output, the new states, the inputs of memories whose read-out waits for the head, by layer,
        and the inputs of all layers, where they are kept.
        """
        compiled = None if keep_inputs else int8_layers(self, hidden)
        if compiled is not None:
            found = next_token(compiled, hidden, state.layers, plan, self.config.sliding_window_size)
            if found is not None:
                hidden, normed, layers = found
                return hidden, layers, {i: normed[i] for i in self.config.memory_layers}, []
        layers, waiting, inputs = [], {}, []
        shared: Writing | None = None
        for i, layer in enumerate(self.layers):
            if keep_inputs:
                inputs.append(hidden)
            hidden, memory_input, new, shared = self._run_layer(layer, hidden, state.layers[i], plan, stream, shared)
            layers.append(new)
            if memory_input is not None:
                waiting[i] = memory_input
        return hidden, layers, waiting, inputs

    def _run_layer(self, layer: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None, LayerState, Writing | None]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # transformers' own wrapper drops the cache, and with it the memory: state in, state out instead
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def _stream(self, state: ModelState, valid: Tensor, ids: Tensor | None, surprise: Tensor | None) -> MemoryStream:
        """The recent tokens' flags, ids and surprise, followed by the new ones', of which none is written."""

        def append(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            return old if old is None or new is None else torch.cat([old, new.to(old.dtype)], dim=1)

        both = torch.cat([state.valid, valid], dim=1)
        written = torch.cat([state.written, torch.zeros_like(valid)], dim=1)
        return MemoryStream(both, append(state.ids, ids), append(state.surprise, surprise), written)

    @torch.no_grad()
    def _surprise(self, hidden: Tensor, ids: Tensor, valid: Tensor, last_hidden: Tensor | None) -> Tensor:
        """Negative log likelihood (nats) of each token ``[B, T]`` given what came before; 0 where nothing did."""
        assert last_hidden is not None
        steps = ids.shape[1]
        previous = torch.cat([last_hidden[:, None].to(hidden.dtype), hidden[:, :-1]], dim=1)
        parts = []
        for start in range(0, steps, SURPRISE_BLOCK):
            logits = F.linear(previous[:, start : start + SURPRISE_BLOCK], self.embed_tokens.weight)
            target = ids[:, start : start + SURPRISE_BLOCK, None]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            parts.append(logits.logsumexp(-1) - logits.gather(-1, target)[..., 0])
        known = valid[:, -steps:] & valid[:, -steps - 1 : -1]
        return torch.cat(parts, dim=1) * known

    def _piece_size(self, steps: int) -> int:
        """Longest stretch that one pass may take."""
        config = self.config
        longest = max(steps, 1)
        if config.write_gate == "surprise" and config.memory_readout == "layer" and config.num_memory_layers:
            # a pair's surprise must be known before the pass that writes it
            longest = min(longest, config.sliding_window_size)
        # not less than the window: inside it the base's own mask-free kernel must run
        return longest if torch.is_grad_enabled() else min(longest, max(INFERENCE_PIECE, config.sliding_window_size))

    # inputs ---------------------------------------------------------------------------------------------------

    def _check_inputs(
        self, ids: Tensor | None, embeds: Tensor, attention_mask: Tensor | None, cache: SenriCache
    ) -> Tensor | None:
        """The validity mask of the new tokens ``[B, T]``, or None where nothing is padded."""
        if not isinstance(cache, SenriCache):
            raise ValueError(
                f"past_key_values must be a SenriCache, not {type(cache).__name__}; leave it out to get one"
            )
        batch, steps = embeds.shape[:2]
        if not steps:
            raise ValueError("the input has no tokens")
        if cache.batch_size is not None and cache.batch_size != batch:
            raise ValueError(
                f"the input has {batch} row(s) but the running state has {cache.batch_size}: give as many rows, or "
                "start anew (reset_memory(batch_size), or a new cache)"
            )
        needs_ids = self.config.memory_readout == "head" or self.config.write_gate == "surprise"
        if ids is None and ((needs_ids and self.config.num_memory_layers) or self.config.unigram_cache):
            raise ValueError(
                "memory_readout 'head', write_gate 'surprise' and unigram_cache need input_ids, not inputs_embeds"
            )
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < steps:
            raise ValueError(f"attention_mask must be [{batch}, {steps}] or longer, not {list(attention_mask.shape)}")
        mask = attention_mask[:, attention_mask.shape[1] - steps :].bool()
        return None if mask.all() else mask

    def _check_padding(self, mask: Tensor | None, cache: SenriCache, steps: int) -> None:
        """Raises ValueError where a row goes on after padding: the padding would take up its window."""
        assert cache.state is not None
        if mask is None and not cache.has_padding:
            return
        old = cache.state.valid
        if mask is None:
            mask = old.new_ones(len(old), steps)
        row = torch.cat([old, mask], dim=1)
        gap = ~row & (row.cumsum(1) > 0)  # padded, after a real token
        if (row & (gap.cumsum(1) > 0))[:, -steps:].any():
            raise ValueError(
                "padding in the middle of a running text: rows that go on must go on with inputs of one length; run "
                "rows of different lengths one by one, each from its own state"
            )

    def empty_state(self, batch_size: int, dtype: torch.dtype, *, training: bool = False) -> ModelState:
        """The state before any token, for ``batch_size`` rows; in ``train()`` a store may be a single memory."""
        config, device, memories = self.config, self.embed_tokens.weight.device, self.memories
        slots = config.sliding_window_size + taps_of(config.memory_conv_size, config.memory_context_size) - 1
        keys = torch.zeros(batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=dtype, device=device)
        sinks = keys.new_zeros(*keys.shape[:2], config.num_sink_tokens, config.head_dim)
        layers = tuple(
            LayerState(
                keys,
                keys,
                sinks.clone(),  # a file must not find one tensor under two names
                sinks.clone(),
                memories[i].init_state(batch_size, dtype, device, training=training) if i in memories else None,
            )
            for i in range(config.num_hidden_layers)
        )
        ids = torch.zeros(batch_size, slots, dtype=torch.long, device=device)
        surprised = config.write_gate == "surprise"
        return ModelState(
            layers=layers,
            ids=ids,
            valid=ids.bool(),
            written=ids.bool(),
            surprise=ids.to(torch.promote_types(dtype, torch.float32)) if surprised else None,
            last_hidden=keys.new_zeros(batch_size, config.hidden_size) if surprised else None,
            position=torch.zeros(batch_size, dtype=torch.long, device=device),
            since_flush=torch.zeros(batch_size, dtype=torch.long, device=device),
            counts=torch.zeros(batch_size, config.vocab_size, device=device) if config.unigram_cache else None,
        )

    def _packed_forward(
        self, ids: Tensor | None, embeds: Tensor, position_ids: Tensor, output_hidden_states: bool | None
    ) -> SenriModelOutput | None:
        """Run packed documents as rows of their own, padded to the longest; None when each row is one document."""
        position_ids = position_ids.expand(embeds.shape[:2])
        starts = position_ids == 0
        starts[:, 0] = True
        if not starts[:, 1:].any():
            return None
        if self.config.unigram_cache:
            raise ValueError(
                "packed documents (position_ids that start again at 0) would share their words in the unigram cache: "
                "give each as a row of its own, padded on the left"
            )
        begin = starts.flatten().nonzero().flatten()
        index, valid = unpack_index(torch.cat([begin, begin.new_tensor([starts.numel()])]))
        rows = (
            {"input_ids": ids.flatten()[index]} if ids is not None else {"inputs_embeds": embeds.flatten(0, 1)[index]}
        )
        out = self.forward(
            **rows, attention_mask=valid, use_cache=False, output_hidden_states=output_hidden_states, return_dict=True
        )
        hidden = out.hidden_states and tuple(h[valid].view_as(embeds) for h in out.hidden_states)
        return SenriModelOutput(last_hidden_state=out.last_hidden_state[valid].view_as(embeds), hidden_states=hidden)


def _counted(leaving: UnigramStream | None) -> Tensor | None:
    return None if leaving is None else count(leaving)


def _without_window(layer: LayerState) -> LayerState:
    """For what does not follow the window's last token directly."""
    return layer._replace(keys=layer.keys[:, :, :0], values=layer.values[:, :, :0])
