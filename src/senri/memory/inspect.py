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


def load(state: MemoryState) -> Tensor:
    """Pairs written as a share of :func:`capacity`, ``[B]``; the memories of a store add up.

    Every pair counts, also one that a gate kept out or that has faded.
    """
    *memories, value_dim, key_dim = state.M.shape[2:]
    return state.written / (math.prod(memories) * capacity(value_dim, key_dim))
