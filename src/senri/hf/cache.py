"""SenriCache: all that a Senri model carries between calls, in one object that transformers' generate() accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from senri.layers import MemoryLayerState
from senri.memory import MemoryState
from senri.memory.state import map_tensors, named_tensors, nbytes, stack_rows


class LayerState(NamedTuple):
    """One decoder layer: the window's keys and values (rotated), the sinks', and its memory if it has one."""

    keys: Tensor  # [B, Hkv, P, D], P <= W - 1
    values: Tensor  # [B, Hkv, P, D]
    sink_keys: Tensor  # [B, Hkv, S, D], rotated to their constant distance; zeros: not there yet
    sink_values: Tensor  # [B, Hkv, S, D]
    memory: MemoryLayerState | None


class ModelState(NamedTuple):
    """Everything between two calls. Tensors are replaced, never written in place: copying the tuple is a fork."""

    layers: tuple[LayerState, ...]
    ids: Tensor  # [B, N] int64, the last N = W + K - 1 tokens
    valid: Tensor  # [B, N] bool; False: before the text, or padding
    written: Tensor  # [B, N] bool: their pairs are in the memory (SenriModel.write_window) or never will be (leave_out)
    surprise: Tensor | None  # [B, N] nats
    last_hidden: Tensor | None  # [B, hidden]: predicts the next token, whose surprise it gives
    position: Tensor  # [B] int64: tokens read in each row, padding not counted
    since_flush: Tensor  # [B] int64: those of them since the last flush(); the first ones are the sinks
    # [B, N, hidden] or None: the last tokens' inputs of the last layer with a memory, if from there on they were only
    # read for the memory (SenriModel.read); that layer's window and those above it are computed when needed
    deferred: Tensor | None = None
    counts: Tensor | None = None  # [B, V] float32: how often each token has left the window; of the unigram cache


class SenriCache(Cache):
    """Window keys and values plus memory state of every layer; size independent of the length read.

    Made by the model when none is given; pass it as ``past_key_values`` to go on. ``fork()`` gives an independent
    continuation at no cost.
    """

    def __init__(self, num_layers: int, sliding_window_size: int) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers
        self.sliding_window_size = sliding_window_size
        self.state: ModelState | None = None
        self.columns = 0  # tokens seen, padding counted: what transformers calls the sequence length
        self.has_padding = False
        self.offset = 0  # columns that generate() must not count: what a session read before its prompt

    @classmethod
    def concat(cls, caches: Sequence[SenriCache]) -> SenriCache:
        """One cache with the rows of several, which must have seen the same number of tokens.

        Raises:
            ValueError: none, or they have not.
        """
        first = caches[0] if caches else None
        if first is None or any((c.columns, c.state is None) != (first.columns, first.state is None) for c in caches):
            raise ValueError("only states that have seen the same number of tokens can be the rows of one cache")
        both = first.fork()
        both.has_padding = any(c.has_padding for c in caches)
        if len(caches) > 1 and first.state is not None:
            both.state = stack_rows([c.state for c in caches])
        return both

    def commit(self, state: ModelState, columns: int) -> None:
        """Replace the whole state at once: an interrupted call leaves the cache as it was before it."""
        self.state, self.columns = state, self.columns + columns

    def fork(self) -> SenriCache:
        """A second cache in the same state; the two go on independently."""
        other = SenriCache(self.num_layers, self.sliding_window_size)
        other.state, other.columns, other.has_padding = self.state, self.columns, self.has_padding
        other.offset = self.offset
        return other

    def detach(self) -> SenriCache:
        """A fork that is cut from the autograd graph (truncated backpropagation through time)."""
        other = self.fork()
        other._map(lambda t: t.detach())
        return other

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name, e.g. ``layers.10.memory.memory.M``."""
        return named_tensors(self.state) if self.state is not None else {}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state: window and memories."""
        return nbytes(self.state)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the associative memories alone: what is left after ``flush()``."""
        return sum(memory.nbytes for memory in self.memories.values())

    @property
    def memories(self) -> dict[int, MemoryState]:
        """The associative memory of each layer that writes one, by layer index."""
        layers = enumerate(() if self.state is None else self.state.layers)
        return {i: layer.memory.memory for i, layer in layers if layer.memory and layer.memory.memory}

    def replace_memories(self, memories: dict[int, MemoryState]) -> None:
        """Go on with other memories in some layers."""
        assert self.state is not None
        layers = list(self.state.layers)
        for i, memory in memories.items():
            layers[i] = layers[i]._replace(memory=layers[i].memory._replace(memory=memory))  # type: ignore[union-attr]
        self.commit(self.state._replace(layers=tuple(layers)), columns=0)

    def leave_out(self, tokens: int) -> None:
        """The last ``tokens`` stay in the window, and will not be written when they leave it.

        Of what has left it by now nothing changes.
        """
        assert self.state is not None
        written = self.state.written.clone()
        written[:, max(written.shape[1] - tokens, 0) :] = True
        self.commit(self.state._replace(written=written), columns=0)

    @property
    def tokens_read(self) -> list[int]:
        """Tokens read in each row, padding not counted."""
        return [] if self.state is None else self.state.position.tolist()

    @property
    def batch_size(self) -> int | None:
        """Rows, or None before the first call."""
        return None if self.state is None else self.state.position.shape[0]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.state = map_tensors(fn, self.state)

    # transformers' Cache interface ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"SenriCache(tokens_read={self.tokens_read}, nbytes={self.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns - self.offset

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        past = min(self.columns, self.sliding_window_size - 1)
        return past + query_length, self.columns - past

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("SenriCache is filled by SenriModel only; use it with a Senri model")

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(
            "a memory cannot forget its last tokens: fork() the SenriCache before them instead of crop()"
        )

    def reset(self) -> None:
        self.state, self.columns, self.has_padding, self.offset = None, 0, False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])


def without_memory(state: SenriCache) -> SenriCache:
    """The same window with an empty memory, into which nothing of what was read so far will be written."""
    fork = state.fork()
    if fork.state is None:
        return fork
    layers = tuple(_emptied(layer) for layer in fork.state.layers)
    counts = None if fork.state.counts is None else torch.zeros_like(fork.state.counts)
    fork.state = fork.state._replace(layers=layers, valid=torch.zeros_like(fork.state.valid), counts=counts)
    return fork


def _emptied(layer: LayerState) -> LayerState:
    if layer.memory is None:
        return layer
    return layer._replace(memory=layer.memory._replace(memory=map_tensors(torch.zeros_like, layer.memory.memory)))
