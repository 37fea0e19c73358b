"""lm-evaluation-harness on Senri models: contexts of any length are read in full, in constant memory.

From Python: ``lm_eval.simple_evaluate(model=SenriLM(*load_base()), tasks=[...])``. The harness knows no plugins for
models: run its command line as ``python -m senri.evaluation.lm_eval --model senri --model_args pretrained=DIRECTORY``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from senri.hf.base import BASE_NAME, load_model
from senri.hf.cache import SenriCache
from senri.hf.modeling_senri import SenriForCausalLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import simple_parse_args_string
except ImportError:
    raise ValueError("the lm-evaluation-harness adapter needs lm_eval: pip install 'senri[lm-eval]'") from None

READ_PIECE = 1024  # tokens of one pass, and of logits that exist at once


@register_model("senri")
class SenriLM(TemplateLM):
    """A Senri model as the harness knows models: one row at a time, nothing truncated.

    Each request starts from an empty memory; an open session is neither read nor changed. Requests that follow each
    other with one context (the choices of a question) read it once. Only scored tokens pay for logits.

    Raises:
        ValueError: a model in ``train()``, a piece size (tokens of one pass) below 1.
    """

    def __init__(self, model: SenriForCausalLM, tokenizer: Any, piece_size: int = READ_PIECE) -> None:
        super().__init__()
        if model.training:
            raise ValueError("evaluation is for a model in eval(): call model.eval() first")
        if piece_size < 1:
            raise ValueError(f"piece_size must be at least 1, not {piece_size}")
        self.model, self.tokenizer, self.piece_size = model, tokenizer, piece_size

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> SenriLM:
        """For ``--model_args``: ``pretrained`` and all that :func:`senri.hf.base.load_model` takes, and piece_size.

        Raises:
            ValueError: no such model, or a batch size other than 1.
        """
        fields = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v is not None}}
        fields.pop("max_batch_size", None)  # for batch_size=auto
        if (batch_size := fields.pop("batch_size", 1)) not in (1, "1"):
            raise ValueError(f"SenriLM runs one row at a time: leave batch_size at 1, not {batch_size}")
        piece_size, device = fields.pop("piece_size", READ_PIECE), torch.device(fields.pop("device", "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            device = torch.device("cpu")  # the command line names cuda:0 by itself
        model, tokenizer = load_model(fields.pop("pretrained", BASE_NAME), **fields)
        return cls(model.to(device), tokenizer, piece_size)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SenriLM:
        """As :meth:`create_from_arg_obj`, from ``key=value,key=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's request caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of ``string``; by default with the tokenizer's special tokens unless it begins with its BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        # not verbose: it would warn of texts longer than the base's context, which are meant here
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihood (nats) of each ``(_, context, continuation)``, and whether greedy decoding would make it."""
        answers = []
        shown = tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood requests")
        for context, group in itertools.groupby(shown, key=lambda request: request[1]):
            cache = self.model.model.new_cache()
            last = self._read(context or [self.prefix_token_id], cache)
            for texts, _, continuation in group:
                answers.append(self._continue(continuation, last, cache.fork()))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood (nats) of each text: every token once, given the prefix token and all that came before."""
        scores = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood_rolling requests"):
            (text,) = request.args
            whole = (None, [self.prefix_token_id], self.tok_encode(text))
            [(score, _)] = self._loglikelihood_tokens([whole], disable_tqdm=True)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
            scores.append(score)
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, greedy unless the task samples, up to the first stop string."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests"):
            answers.append(self._generate(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    @torch.no_grad()
    def _generate(self, prompt: str, gen_kwargs: dict[str, Any]) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs))
        stop = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        if not options["do_sample"]:
            options.pop("temperature", None)  # transformers warns of it
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        cache = self.model.model.new_cache()
        if len(ids) > 1:
            self._read(ids[:-1], cache)
        cache.offset = cache.columns  # generate() sees the last token only
        start = torch.tensor([ids[-1:]], device=self.model.device)
        made = self.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            past_key_values=cache,
            max_new_tokens=options.pop("max_gen_toks"),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, 1, 1),
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return postprocess_generated_text(self.tokenizer.decode(made[0, 1:], skip_special_tokens=True), stop, None)

    def _pieces(self, ids: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Where each piece of ``ids`` starts, and the piece ``[1, T]``."""
        for start in range(0, len(ids), self.piece_size):
            yield start, torch.tensor([ids[start : start + self.piece_size]], device=self.model.device)

    def _read(self, ids: list[int], cache: SenriCache) -> Tensor:
        """Read ``ids`` into ``cache``; the last token's logits ``[1, V]``."""
        for start, piece in self._pieces(ids):
            if start + self.piece_size < len(ids):
                self.model.model(input_ids=piece, past_key_values=cache)
        return self.model(piece, past_key_values=cache, logits_to_keep=1).logits[0]

    def _continue(self, ids: list[int], last: Tensor, cache: SenriCache) -> tuple[float, bool]:
        """Score ``ids`` as what follows ``cache``, whose last logits are ``last``; the cache goes on."""
        if not ids:
            return 0.0, True
        parts = [self._score(last, ids[:1])]
        for start, piece in self._pieces(ids[:-1]):
            logits = self.model(piece, past_key_values=cache).logits[0]
            parts.append(self._score(logits, ids[start + 1 : start + 1 + len(logits)]))
        return sum(score for score, _ in parts), all(greedy for _, greedy in parts)

    def _score(self, logits: Tensor, targets: list[int]) -> tuple[float, bool]:
        """Sum of the log probabilities of ``targets`` under ``logits`` ``[T, V]``; whether each is the best."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = torch.tensor(targets, device=logits.device)
        scores = logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
        return scores.double().sum().item(), bool((logits.argmax(-1) == target).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
