"""Readers: a model as evaluation sees it. It reads a context up to a place, and answers from the state it is in.

The same few methods for a Senri model, for the full-attention base, and in tests for planted models whose score is
known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from senri.data.samples import Question
from senri.evaluation.scoring import cut, decided
from senri.hf.cache import SenriCache, without_memory
from senri.hf.modeling_senri import SenriForCausalLM

SNAPSHOTS = 24  # states kept of one reading; at W = 1024 of SmolLM2 each takes 26 MB
FIRST_INTERVAL = 2048  # tokens from one of them to the next, until there are too many


class Reader(Protocol):
    """What the runner asks of a model. A state is whatever the reader says it is."""

    window: int | None  # tokens it sees exactly; None: all of them
    longest: int | None  # tokens it can take; None: any number

    def read(self, ids: np.ndarray, at: int, *, memory: bool = True) -> Any:
        """The state after the first ``at`` tokens of ``ids``; ``memory=False``: read without one (the control)."""
        ...

    def with_memory_of(self, state: Any, other: Any) -> Any:
        """``state`` (read without memory) with the memory of ``other``, another text's state."""
        ...

    def memory_of(self, state: Any) -> Any:
        """The part of a state that :meth:`with_memory_of` needs, and nothing bigger."""
        ...

    def blank(self) -> Any:
        """The state before anything is read."""
        ...

    def answer(self, states: Sequence[Any], questions: Sequence[Question]) -> list[str]:
        """What the model writes after each question's prompt, greedily, from its state; the states stay as they are.

        Prompts are of one length.
        """
        ...


class SenriReader:
    """A Senri model.

    One reading serves several lengths, and contexts that begin alike: snapshots of the last reading are kept, and the
    next one goes on from the last snapshot that both share.

    Args:
        model: in ``eval()``.
        piece_size: tokens of one pass.
        progress: called after each pass with the tokens that went through the model so far.
    """

    longest: int | None = None

    def __init__(
        self,
        model: SenriForCausalLM,
        tokenizer: Any,
        *,
        piece_size: int = 1024,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.window: int | None = model.config.sliding_window_size
        self.piece_size = piece_size
        self._paths = {True: _Path(), False: _Path()}
        self.tokens_read = 0  # really passed through the model

    def read(self, ids: np.ndarray, at: int, *, memory: bool = True) -> SenriCache:
        """See :class:`Reader`. Read without memory, a state is what it would be had the model none."""
        if not memory and self.model.config.memory_readout == "head":
            return without_memory(self.read(ids, at))  # the read never enters the window's keys and values
        path = self._paths[memory]
        done, state = path.resume(ids[:at])
        state = self.model.model.new_cache() if state is None else state.fork()
        # without memory, nothing of a piece may be written before the piece's end
        size = self.piece_size if memory else min(self.piece_size, self.window or 1)
        with torch.no_grad():
            for start in range(done, at, size):
                piece = torch.from_numpy(ids[start : min(start + size, at)].astype(np.int64))
                self.model.model.read(piece[None].to(self.model.device), state)
                self.tokens_read += len(piece)
                self.progress(self.tokens_read)
                if not memory:
                    state = without_memory(state)
                if last := start + size >= at:
                    self.model.model.catch_up(state)  # once, not in every fork
                path.note(start + len(piece), state, last=last)
        return state

    def with_memory_of(self, state: SenriCache, other: tuple[tuple[Any, ...], Any]) -> SenriCache:
        """See :class:`Reader`."""
        memories, counts = other
        fork = state.fork()
        assert fork.state is not None
        layers = tuple(
            layer
            if theirs is None or layer.memory is None
            else layer._replace(memory=layer.memory._replace(memory=theirs))
            for layer, theirs in zip(fork.state.layers, memories, strict=True)
        )
        fork.state = fork.state._replace(layers=layers, counts=counts)
        return fork

    def memory_of(self, state: SenriCache) -> tuple[tuple[Any, ...], Any]:
        """See :class:`Reader`: the associative memory of each layer, None where there is none; the unigram counts."""
        assert state.state is not None
        memories = tuple(None if layer.memory is None else layer.memory.memory for layer in state.state.layers)
        return memories, state.state.counts

    def blank(self) -> SenriCache:
        """See :class:`Reader`."""
        return self.model.model.new_cache()

    def answer(self, states: Sequence[SenriCache], questions: Sequence[Question]) -> list[str]:
        """See :class:`Reader`. All states must have read the same number of tokens."""
        cache = SenriCache.concat(states)
        self.model.model.write_window(cache)
        cache.offset = cache.columns  # generate() counts the prompt alone
        prompts = torch.tensor([question.prompt for question in questions], device=self.model.device)
        return generate(self.model, self.tokenizer, prompts, cache, questions)


class FullAttentionReader:
    """The unconverted base with its whole key-value cache: the control that sees everything, up to its own context.

    Args:
        model: a causal language model with ``DynamicCache``, in ``eval()``.
    """

    window: int | None = None

    def __init__(self, model: Any, tokenizer: Any, *, piece_size: int = 1024) -> None:
        self.model, self.tokenizer, self.piece_size = model, tokenizer, piece_size
        self.longest: int | None = model.config.max_position_embeddings
        self._ids = np.empty(0, dtype=np.int32)
        self._cache = DynamicCache(config=model.config)
        self.tokens_read = 0

    def read(self, ids: np.ndarray, at: int, *, memory: bool = True) -> int:
        """See :class:`Reader`. There is one cache, so only the last state read is good: it is named by its length."""
        shared = common_prefix(self._ids, ids[:at])
        self._crop(shared)
        try:
            with torch.no_grad():
                for start in range(shared, at, self.piece_size):
                    piece = torch.from_numpy(ids[start : min(start + self.piece_size, at)].astype(np.int64))
                    self.model.model(piece[None].to(self.model.device), past_key_values=self._cache, use_cache=True)
                    self.tokens_read += len(piece)
        except BaseException:
            self._crop(shared)
            raise
        self._ids = ids[:at]
        return at

    def with_memory_of(self, state: int, other: Any) -> int:
        """There is no memory to put in."""
        raise TypeError("full attention has no memory")

    def memory_of(self, state: int) -> None:
        """Nothing."""

    def blank(self) -> int:
        """See :class:`Reader`."""
        return 0

    def answer(self, states: Sequence[int], questions: Sequence[Question]) -> list[str]:
        """See :class:`Reader`; one state."""
        (at,), (question,) = states, questions
        ids = torch.tensor([[*self._ids[:at].tolist(), *question.prompt]], device=self.model.device)
        self._crop(at)
        try:
            return generate(self.model, self.tokenizer, ids, self._cache, questions)
        finally:
            self._crop(at)

    def _crop(self, length: int) -> None:
        """Forget all behind ``length`` tokens, layer by layer: an interrupted pass leaves some longer than others."""
        self._ids = self._ids[:length]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


class _Path:
    """Snapshots along the last reading, at most ``SNAPSHOTS`` of them, spread over its whole length."""

    def __init__(self) -> None:
        self.ids = np.empty(0, dtype=np.int32)
        self.states: dict[int, SenriCache] = {}
        self.interval = FIRST_INTERVAL

    def resume(self, ids: np.ndarray) -> tuple[int, SenriCache | None]:
        """The longest part of ``ids`` whose state is known, and that state; forgets what is not on the way."""
        shared = common_prefix(self.ids, ids)
        self.states = {n: state for n, state in self.states.items() if n <= shared}
        self.ids = ids
        if not self.states:
            self.interval = FIRST_INTERVAL
            return 0, None
        done = max(self.states)
        return done, self.states[done]

    def note(self, done: int, state: SenriCache, *, last: bool) -> None:
        """Keep the state after ``done`` tokens if it is due."""
        due = done - max((n for n in self.states if n < done), default=0) >= self.interval
        if not (due or last):
            return
        self.states[done] = state.fork()
        if len(self.states) > SNAPSHOTS:
            self.interval *= 2
            kept = sorted(self.states)
            self.states = {n: self.states[n] for n in [*kept[1:-1:2], kept[-1]]}


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that both begin with."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def generate(model: Any, tokenizer: Any, ids: Tensor, cache: Any, questions: Sequence[Question]) -> list[str]:
    """Greedy continuation of each row of ``ids`` ``[B, T]``, one for each question, as text.

    Ends early where more tokens could not change the score.
    """
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        # nothing of the model's own settings: a repetition penalty would punish what stands in the context
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max(question.max_new_tokens for question in questions),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=model.generation_config.eos_token_id,
        ),
        stopping_criteria=StoppingCriteriaList([_Decided(tokenizer, ids.shape[1], questions)]),
    )
    made = [row[ids.shape[1] :][: q.max_new_tokens] for row, q in zip(out, questions, strict=True)]
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [cut(text, question.stop) for text, question in zip(texts, questions, strict=True)]


class _Decided(StoppingCriteria):
    """Row by row: more tokens would not change the score, or there is no room for them."""

    def __init__(self, tokenizer: Any, start: int, questions: Sequence[Question]) -> None:
        self.tokenizer, self.start, self.questions = tokenizer, start, questions

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        made = input_ids.shape[1] - self.start
        done = [made >= q.max_new_tokens or decided(t, q) for t, q in zip(texts, self.questions, strict=True)]
        return torch.tensor(done, device=input_ids.device)
