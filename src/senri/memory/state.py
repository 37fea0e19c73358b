"""What a memory carries between calls, as an argument and a return value; never hidden in a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT")


def map_tensors(fn: Callable[[Tensor], Tensor], state: StateT) -> StateT:
    """Apply ``fn`` to every tensor of a (nested) NamedTuple state; everything else stays as it is."""
    if isinstance(state, Tensor):
        return fn(state)  # type: ignore[return-value]
    if isinstance(state, tuple):
        fields = (map_tensors(fn, field) for field in state)
        return type(state)(*fields) if hasattr(state, "_fields") else type(state)(fields)  # type: ignore[return-value, call-arg]
    return state


def stack_rows(states: Sequence[Any]) -> Any:
    """The rows of several (nested) states of the same shape as one state: each tensor joined along its first axis."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, tuple):
        fields = (stack_rows(parts) for parts in zip(*states, strict=True))
        return type(first)(*fields) if hasattr(first, "_fields") else type(first)(fields)
    return first


def named_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a (nested) NamedTuple state under its dotted name."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if not isinstance(state, tuple):
        return {}
    names = getattr(state, "_fields", range(len(state)))
    out: dict[str, Tensor] = {}
    for name, field in zip(names, state, strict=True):
        out.update(named_tensors(field, f"{prefix}.{name}" if prefix else str(name)))
    return out


def nbytes(state: Any) -> int:
    """Bytes that the tensors of a (nested) state take."""
    return sum(t.numel() * t.element_size() for t in named_tensors(state).values())


class Pending(NamedTuple):
    """Pairs that were seen but not yet written: the window as the memory sees it (``delay`` slots)."""

    k: Tensor  # [B, W, H, Dk], as given to scan (before the feature map)
    v: Tensor  # [B, W, H, Dv]
    beta: Tensor | None  # [B, W, H]
    log_alpha: Tensor | None  # [B, W, H]
    valid: Tensor  # [B, W] bool; False: an empty slot or padding, never written
    importance: Tensor | None = None  # [B, W, H]


class Slots(NamedTuple):
    """Where the columns of ``M`` are the values of single pairs (rule ``slot``): their keys, how strong they are.

    Empty ones stand first, then the oldest.
    """

    K: Tensor  # [B, H, N, F], of length 1; zeros where the slot is empty
    strength: Tensor  # [B, H, N] in [0, 1]; 0: empty
    importance: Tensor  # [B, H, N]: what a pair is worth beside its strength, as a logarithm
    run: Tensor  # [B, H, N] int64: number of the run of written tokens that the pair belongs to; 0: empty
    running: Tensor  # [B, H] bool: the last token was written, so that the next one goes on with its run


class MemoryState(NamedTuple):
    """One associative memory per head, or the n memories of a store. float32, or float64 when the inputs are float64.

    With a store, ``M``, ``z`` and their snapshots have n behind H: ``[B, H, n, Dv, F]`` and ``[B, H, n, F]``.
    """

    M: Tensor  # [B, H, Dv, F]: sum of v (x) sigma(k); F is the feature map's width. Rule slot: [B, H, Dv, N] values
    z: Tensor | None  # [B, H, F]: sum of sigma(k); only for rules that normalise (linear, delta)
    M_segment: Tensor | None  # [B, H, Dv, F]: M when the current segment began; only for delta
    z_segment: Tensor | None  # [B, H, F]: likewise
    written: Tensor  # [B] int64: pairs written so far
    pending: Pending | None = None  # only when scan() itself delays the stream
    slots: Slots | None = None  # only for rule slot
    store: str | None = None  # name of the store that wrote it; None: a single memory

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        num_heads: int,
        value_dim: int,
        key_dim: int,
        *,
        rule: str,
        num_slots: int = 64,
        num_memories: int | None = None,
        store: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MemoryState:
        """An empty memory for ``rule``; ``key_dim`` is the feature map's output width, ``num_slots`` for rule slot.

        ``num_memories`` and ``store``: n and name of a store; None: no store.
        """
        if rule == "slot":
            M = torch.zeros(batch_size, num_heads, value_dim, num_slots, dtype=dtype, device=device)
            slots = Slots(
                M.new_zeros(batch_size, num_heads, num_slots, key_dim),
                M.new_zeros(batch_size, num_heads, num_slots),
                M.new_zeros(batch_size, num_heads, num_slots),
                M.new_zeros(batch_size, num_heads, num_slots, dtype=torch.long),
                M.new_zeros(batch_size, num_heads, dtype=torch.bool),
            )
            return cls(M, None, None, None, torch.zeros(batch_size, dtype=torch.long, device=device), slots=slots)
        memories = (batch_size, num_heads) if num_memories is None else (batch_size, num_heads, num_memories)
        M = torch.zeros(*memories, value_dim, key_dim, dtype=dtype, device=device)
        z = torch.zeros(*memories, key_dim, dtype=dtype, device=device)
        written = torch.zeros(batch_size, dtype=torch.long, device=device)
        if rule == "linear":
            return cls(M, z, None, None, written, store=store)
        if rule == "delta":  # copies: a file must not find one tensor under two names
            return cls(M, z, M.clone(), z.clone(), written, store=store)
        return cls(M, None, None, None, written, store=store)

    def end_of_text(self) -> MemoryState:
        """The same memory, which no token to come goes on with: what is written next is a run of its own."""
        if self.slots is None:
            return self
        return self._replace(slots=self.slots._replace(running=torch.zeros_like(self.slots.running)))

    def detach(self) -> MemoryState:
        """The same state, cut from the graph."""
        return map_tensors(lambda t: t.detach(), self)

    def to(self, device: torch.device | str) -> MemoryState:
        """The same state on another device."""
        return map_tensors(lambda t: t.to(device), self)

    @property
    def nbytes(self) -> int:
        """Bytes held, pending pairs included."""
        return nbytes(self)
