"""Layers whose past is a memory: causal linear attention without positions, by :func:`senri.memory.scan` with no delay.

Each token writes its pair, then reads: what is near and what is far are in the one memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from senri.lm.base import Layer, numbers_of
from senri.memory import Banks, Hierarchical, MemoryState, Multi, Store, feature_dim, scan
from senri.memory.alibi import alibi_log_alpha, alibi_slopes
from senri.memory.rules import RULES


class LinearAttention(nn.Module):
    """Projections around a scan.

    Args:
        head_dim: width of a head; there are ``hidden_size / head_dim``.
        use_delta_rule: rule ``delta``, else ``linear``.
        segment_size: tokens from one refresh of the delta rule to the next, of ALiBi's clock, and of a bank or memory.
        chunk_size: tokens that the scan handles at once; speed, never the result.
        store: several memories a head; None: one.
        alibi_scale: factor of ALiBi's slopes; 0: nothing fades.
    """

    slopes: Tensor

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        *,
        use_delta_rule: bool,
        segment_size: int,
        chunk_size: int,
        store: Store | None,
        alibi_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if segment_size < 1 or chunk_size < 1:
            raise ValueError(f"segment_size ({segment_size}) and chunk_size ({chunk_size}) must be >= 1")
        if head_dim < 1 or hidden_size % head_dim:
            raise ValueError(f"memory_head_dim {head_dim} does not divide hidden_size {hidden_size}")
        self.num_heads, self.head_dim = hidden_size // head_dim, head_dim
        self.rule = "delta" if use_delta_rule else "linear"
        self.segment_size, self.chunk_size, self.store = segment_size, chunk_size, store
        self.alibi = alibi_scale > 0
        self.register_buffer("slopes", alibi_slopes(self.num_heads) * alibi_scale, persistent=False)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.expand_gate = nn.Linear(hidden_size, self.num_heads) if isinstance(store, Hierarchical) else None

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> MemoryState:
        """An empty memory, in float32 or, of a float64 model, in float64."""
        return MemoryState.zeros(
            batch_size,
            self.num_heads,
            self.head_dim,
            feature_dim(RULES[self.rule].feature_map, self.head_dim),
            rule=self.rule,
            num_memories=None if self.store is None else self.store.size,
            store=None if self.store is None else self.store.name,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
        )

    def forward(self, hidden: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """``[B, T, hidden]``, the memory before -> the same, T tokens later."""
        q, k, v = self.query_key_value(hidden).unflatten(-1, (self.num_heads, -1)).chunk(3, -1)
        out, state = scan(
            q,
            k,
            v,
            state,
            rule=self.rule,
            chunk_size=self.chunk_size,
            segment_size=self.segment_size,
            log_alpha=self._fading(hidden, state) if self.alibi else None,
            store=self.store,
            expand=None if self.expand_gate is None else self.expand_gate(hidden).sigmoid(),
        )
        return self.dense(out.flatten(2)), state

    def _fading(self, hidden: Tensor, state: MemoryState) -> Tensor:
        positions = state.written[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
        return alibi_log_alpha(positions, self.slopes, self.segment_size)


class MemoryLayer(Layer):
    """A layer around :class:`LinearAttention`.

    Args:
        numbers: all arguments of the layer that this is the base of.
        store, alibi_scale: see :class:`LinearAttention`.
    """

    def __init__(self, numbers: dict[str, Any], *, store: Store | None, alibi_scale: float = 0.0) -> None:
        hidden_size, head_dim = numbers["hidden_size"], numbers["memory_head_dim"]
        super().__init__(hidden_size, numbers["intermediate_size"], numbers["layer_norm_eps"], numbers)
        self.attention: LinearAttention = LinearAttention(
            hidden_size,
            hidden_size if head_dim is None else head_dim,
            use_delta_rule=numbers["use_delta_rule"],
            segment_size=numbers["segment_size"],
            chunk_size=numbers["chunk_size"],
            store=store,
            alibi_scale=alibi_scale,
        )

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> MemoryState:
        """See :meth:`LinearAttention.init_state`."""
        return self.attention.init_state(batch_size, dtype, device)


class InfiniLayer(MemoryLayer):
    """One memory a head (Munkhdalai et al. 2024, arXiv:2404.07143, without its local attention), or banks in turn.

    Args:
        hidden_size: width of the model.
        num_heads: of the softmax layers beside it, so that all layers are built from the same three numbers; a memory
            has ``hidden_size / memory_head_dim`` heads.
        intermediate_size: of the perceptron.
        memory_head_dim: width of a memory head; None: one head of ``hidden_size``.
        use_delta_rule: write what the memory does not hold yet, else all.
        num_memory_banks: 1: a single memory.
        segments_per_bank: segments written to a bank before the next one.
        use_alibi: let pairs fade by the segments that have passed, each head at its own rate.
        alibi_scale: factor of these rates.
        segment_size, chunk_size: see :class:`LinearAttention`.

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        intermediate_size: int = 2048,
        *,
        memory_head_dim: int | None = None,
        use_delta_rule: bool = True,
        num_memory_banks: int = 1,
        segments_per_bank: int = 4,
        use_alibi: bool = False,
        alibi_scale: float = 1.0,
        segment_size: int = 256,
        chunk_size: int = 64,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        numbers = numbers_of(locals())
        if use_alibi and not alibi_scale > 0:
            raise ValueError(f"alibi_scale must be > 0, not {alibi_scale}: leave use_alibi out for no fading")
        banks = Banks(num_memory_banks, segments_per_bank)
        super().__init__(
            numbers, store=banks if num_memory_banks > 1 else None, alibi_scale=alibi_scale if use_alibi else 0.0
        )


class MultiMemoryLayer(MemoryLayer):
    """``num_memories`` memories, written a segment each in turn and read by relevance; no parameter more.

    Other arguments as of :class:`InfiniLayer`.
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        intermediate_size: int = 2048,
        *,
        memory_head_dim: int | None = None,
        use_delta_rule: bool = True,
        num_memories: int = 4,
        segment_size: int = 256,
        chunk_size: int = 64,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        numbers = numbers_of(locals())
        super().__init__(numbers, store=Multi(num_memories))


class HierarchicalLayer(MemoryLayer):
    """The memories of :class:`MultiMemoryLayer` as fine ones and their sum as the coarse one; a learned gate decides,
    query by query, how far to expand from coarse to fine.

    Arguments as of :class:`MultiMemoryLayer`.
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        intermediate_size: int = 2048,
        *,
        memory_head_dim: int | None = None,
        use_delta_rule: bool = True,
        num_memories: int = 4,
        segment_size: int = 256,
        chunk_size: int = 64,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        numbers = numbers_of(locals())
        super().__init__(numbers, store=Hierarchical(num_memories))
