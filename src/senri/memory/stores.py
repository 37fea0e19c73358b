"""Stores: a head with several memories instead of one. Where a pair is written, and what a query reads.

A store splits the pairs among ``n`` memories of the same shape, so that their sum is the single memory of rule
``linear``. With ``d_i = z_i' sigma(q)``, every read of a rule that normalises is ``sum_i w_i M_i sigma(q)``,

    w_i = e p_i / max(d_i, eps) + (1 - e) / max(sum_j d_j, eps),

where ``p`` are the shares of the memories and ``e`` says how far the query expands from their sum (``e = 0``: the read
of a single memory) to each of them (``e = 1``). A store is a choice of ``p`` and ``e``. Shapes as in the package,
and ``n`` memories of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """How queries weigh the memories of a store."""

    shares: Tensor | None  # p: [B, H, G, T, n]; None: softmax(d), by relevance
    expand: Tensor | None  # e: [B, H, G, T]; None: 1

    def weights(self, d: Tensor, eps: float) -> Tensor:
        """``w`` of each query: ``[B, H, G, T, n]``, as is ``d``."""
        shares = d.softmax(-1) if self.shares is None else self.shares
        weights = shares / d.clamp(min=eps)
        if self.expand is None:
            return weights
        expand = self.expand[..., None]
        return expand * weights + (1 - expand) / d.sum(-1, keepdim=True).clamp(min=eps)

    def part(self, steps: slice) -> Reading:
        """That of some of the steps."""
        return Reading(*(None if x is None else x[:, :, :, steps] for x in self))


@dataclass(frozen=True, eq=False)
class Store(ABC):
    """Several memories a head. None, wherever a store is expected, is a single one."""

    name: ClassVar[str]
    rules: ClassVar[tuple[str, ...]]  # that the store works with
    segmented: ClassVar[bool]  # where a pair goes depends on its segment

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of memories ``n``."""

    @abstractmethod
    def assign(self, k: Tensor, segment: Tensor) -> Tensor:
        """The memory that each pair is written to: ``[B, H, T]`` int64 in ``[0, n)``.

        Args:
            k: keys ``[B, T, H, Dk]`` before the feature map.
            segment: number of each pair's segment ``[B, T]`` int64; -1 before the first pair.
        """

    @abstractmethod
    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        """How queries ``[B, T, Hq, Dk]``, before the feature map, weigh the memories; ``expand`` ``[B, T, Hq]``."""


@dataclass(frozen=True, eq=False)
class Routed(Store):
    """Orthogonal routing: ``argmax_i |k' b_i|`` is written, the ``top_k_memories`` with the largest ``|q' b_i|`` read.

    Their shares are ``softmax(|q' b_i|)``. The heads are routed each for itself, by the same basis; one head as wide as
    the model is the joint form.
    """

    name = "routed"
    rules = ("linear",)
    segmented = False

    basis: Tensor  # [n, Dk], see orthogonal_basis
    top_k_memories: int = 64
    routing: bool = True  # False: written alike, read as a single memory

    def __post_init__(self) -> None:
        if self.top_k_memories < 1:
            raise ValueError(f"top_k_memories must be >= 1, not {self.top_k_memories}")

    @property
    def size(self) -> int:
        return len(self.basis)

    def assign(self, k: Tensor, segment: Tensor) -> Tensor:
        return self._similarity(k).argmax(-1).transpose(1, 2)

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        if not self.routing:
            return Reading(None, _heads_first(q.new_zeros(q.shape[:3]), num_heads))
        scores = self._similarity(q)
        if self.top_k_memories < self.size:
            selected = scores.topk(self.top_k_memories, dim=-1).indices
            scores = scores.masked_fill(
                torch.ones_like(scores, dtype=torch.bool).scatter(-1, selected, False), -torch.inf
            )
        return Reading(_heads_first(scores.softmax(-1), num_heads), None)

    def _similarity(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.basis.shape[-1]:
            raise ValueError(f"the basis has vectors of width {self.basis.shape[-1]}, the heads are {x.shape[-1]} wide")
        return (x @ self.basis.to(x).T).abs()


@dataclass(frozen=True, eq=False)
class Banks(Store):
    """The next bank after so many segments, after the last the first again: fewer pairs mix in one matrix.

    Reads combine all banks. A normalised read is an average of values, so the banks begun so far are averaged; the
    reads of ``delta_token`` and ``gated_delta`` are sums of values, so theirs are summed.
    """

    name = "banks"
    rules = ("linear", "delta", "delta_token", "gated_delta")
    segmented = True

    num_memory_banks: int
    segments_per_bank: int = 4

    def __post_init__(self) -> None:
        _at_least_one(num_memory_banks=self.num_memory_banks, segments_per_bank=self.segments_per_bank)

    @property
    def size(self) -> int:
        return self.num_memory_banks

    def assign(self, k: Tensor, segment: Tensor) -> Tensor:
        return _round_robin(k, segment // self.segments_per_bank, self.size)

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        begun = (segment // self.segments_per_bank + 1).clamp(max=self.size)[..., None]  # [B, T, 1]
        shares = (torch.arange(self.size, device=q.device) < begun) / begun.clamp(min=1).to(q.dtype)
        return Reading(_heads_first(shares[:, :, None].expand(*q.shape[:3], -1), num_heads), None)


@dataclass(frozen=True, eq=False)
class Multi(Store):
    """Independent memories, written in turn, a segment each; their shares are ``softmax(d)``, no parameter added."""

    name = "multi"
    rules = ("linear", "delta")
    segmented = True

    num_memories: int = 4

    def __post_init__(self) -> None:
        _at_least_one(num_memories=self.num_memories)

    @property
    def size(self) -> int:
        return self.num_memories

    def assign(self, k: Tensor, segment: Tensor) -> Tensor:
        return _round_robin(k, segment, self.size)

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        return Reading(None, None)


@dataclass(frozen=True, eq=False)
class Hierarchical(Multi):
    """The memories of :class:`Multi` are the fine ones, their sum the coarse one, which is not stored.

    Each query's gate ``expand`` in [0, 1] mixes the coarse read (0) and the fine one (1).
    """

    name = "hierarchical"

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        assert expand is not None
        return Reading(None, _heads_first(expand.to(q.dtype), num_heads))


STORES: dict[str, type[Store]] = {store.name: store for store in (Routed, Banks, Multi, Hierarchical)}


def check_store(store: Store | None, rule: str, expand: Tensor | None) -> None:
    """Refuse what makes no sense.

    Raises:
        ValueError: a rule that the store does not work with; a gate that is missing, or not asked for.
    """
    if store is not None and rule not in store.rules:
        others = ["single", *(name for name, kind in STORES.items() if rule in kind.rules)]
        raise ValueError(
            f"store {store.name!r} works with rule: {', '.join(store.rules)}; "
            f"rule {rule!r} works with store: {', '.join(others)}"
        )
    if isinstance(store, Hierarchical) != (expand is not None):
        raise ValueError("store 'hierarchical' needs the gate expand, and no other store takes it")


def orthogonal_basis(kind: str, dim: int, seed: int = 0) -> Tensor:
    """``dim`` orthonormal vectors ``[dim, dim]`` float32: ``identity``, ``hadamard`` (Sylvester) or ``random``.

    The random one is uniform over all orthogonal matrices (Mezzadri 2007, arXiv:math-ph/0609050), the same for the same
    ``seed`` everywhere.

    Raises:
        ValueError: unknown kind; ``hadamard`` for a dim that is no power of two.
    """
    if kind == "identity":
        return torch.eye(dim)
    if kind == "hadamard":
        if dim < 1 or dim & (dim - 1):
            raise ValueError(f"a Hadamard basis needs a power of two, not {dim}; use 'identity' or 'random'")
        basis = torch.ones(1, 1)
        while len(basis) < dim:
            basis = torch.kron(basis, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        return basis / dim**0.5
    if kind == "random":
        gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        Q, R = torch.linalg.qr(gaussian)
        return (Q * R.diagonal().sign()).float()
    raise ValueError(f"basis {kind!r} is not one of: identity, hadamard, random")


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    """``[B, T, Hq, ...]`` -> ``[B, H, G, T, ...]``."""
    return x.unflatten(2, (num_heads, -1)).movedim(1, 3)


def _round_robin(k: Tensor, turn: Tensor, size: int) -> Tensor:
    return (turn % size)[:, None].expand(-1, k.shape[2], -1)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be >= 1, not {number}")
