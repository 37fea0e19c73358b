"""Measures of what a memory holds."""

import math

import torch
from torch import Tensor

from senri.memory.state import MemoryState


@torch.no_grad()
def effective_rank(M: Tensor) -> Tensor:
    """Effective rank of each matrix ``[..., Dv, Dk]``: exp of the entropy of its normalised singular values.

    0 for an empty memory, at most min(Dv, Dk) (Roy and Vetterli 2007).
    """
    values = torch.linalg.svdvals(M)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -(shares * shares.clamp(min=torch.finfo(values.dtype).tiny).log()).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy))


def capacity(value_dim: int, key_dim: int) -> float:
    """Pairs that a sum of outer products can tell apart: ``p`` with ``p ln p = value_dim * key_dim / 2``.

    With random keys and values of unit length, the read of a key meets its own value with 1 and each of ``p``
    candidates with noise of variance ``p / (value_dim * key_dim)``, the largest of which is ``sqrt(2 ln p)``
    deviations. An upper bound in practice: keys of a text are more alike than random ones.
    """
    half = value_dim * key_dim / 2
    pairs = 1 + half  # right of the root of a convex function: Newton's method goes down to it
    while (step := (pairs * math.log(pairs) - half) / (math.log(pairs) + 1)) > 1e-9 * pairs:
        pairs -= step
    return pairs


@torch.no_grad()
def key_overlap(state: MemoryState) -> Tensor:
    """Root mean square of the cosine of two keys, of each memory ``[B, H]`` (of a store ``[B, H, n]``).

    From 0 (orthogonal keys) to 1 (all alike); 0 for an empty memory. Rule ``slot`` has its keys: it is that of the
    different ones it holds. Elsewhere ``M = sum_i v_i k_i'`` is left, whose singular values ``s`` have ``sum s^4 / (sum
    s^2)^2 = sum_ij cos^2(k_i, k_j) / p^2`` where the values are orthogonal and the keys as long as each other. So it is
    an estimate, in which each pair counts with itself, too, and values that are alike raise it.
    """
    if state.slots is not None:
        held = state.slots.strength > 0
        keys = state.slots.K * held[..., None]
        pairs = held.sum(-1)
        squares = (keys @ keys.mT).square().sum((-1, -2)) - pairs
        return (squares / (pairs * (pairs - 1)).clamp(min=1)).clamp(min=0).sqrt()
    energy = torch.linalg.svdvals(state.M).square()
    shares = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    return shares.square().sum(-1).sqrt()


def load(state: MemoryState) -> Tensor:
    """Pairs written as a share of :func:`capacity`, ``[B]``; the memories of a store add up.

    Every pair counts, also one that a gate kept out or that has faded. Of rule ``slot``: the share of the slots that
    hold a pair.
    """
    if state.slots is not None:
        return (state.slots.strength > 0).float().mean((1, 2))
    *memories, value_dim, key_dim = state.M.shape[2:]
    return state.written / (math.prod(memories) * capacity(value_dim, key_dim))
