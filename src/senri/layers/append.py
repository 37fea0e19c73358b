"""Tensors that grow by a few columns at a time without being copied each time: what a window keeps while decoding.

A state is never written in place: whoever holds it sees the same numbers forever. But behind them there may be room
that nobody has seen yet. The first to append to a state takes that room, everybody else (a fork) gets a copy, as
appending to a slice works in Go.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from senri.layers.packed_linear import wants_gradients

SPARE = 256  # columns of room that a copy leaves: one copy in so many tokens
FEW = 16  # new columns up to which room pays
_CLAIM = threading.Lock()


class _Room:
    """A buffer ``[..., columns, D]`` of which the first ``filled`` columns have been seen by somebody."""

    def __init__(self, old: Tensor, new: int) -> None:
        size = list(old.shape)
        self.filled = size[-2]
        size[-2] += new + SPARE
        self.buffer = old.new_empty(size)
        self.buffer[..., : self.filled, :] = old

    def claim(self, end: int, new: int) -> bool:
        """Take the ``new`` columns from ``end`` on, if they are there and nobody has."""
        # one made in inference mode may not be written to outside of it
        if self.buffer.is_inference() != torch.is_inference_mode_enabled():
            return False
        with _CLAIM:
            if self.filled != end or end + new > self.buffer.shape[-2]:
                return False
            self.filled = end + new
            return True


def append(old: Tensor, new: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """``old`` ``[..., P, D]`` with ``new`` ``[..., T, D]`` behind it.

    Args:
        keep: columns that :func:`append` will be called with next.

    Returns:
        all columns ``[..., P + T, D]``, and the last ``keep`` of them.
    """
    past, steps = old.shape[-2], new.shape[-2]
    if steps > FEW or not past or old.dtype != new.dtype or wants_gradients(old, new):
        both = torch.cat([old, new], dim=-2) if past else new
        return both, both[..., max(past + steps - keep, 0) :, :]
    both, kept = reserve(old, steps, keep)
    # by way of .data: what autograd may have kept of the other columns has not changed
    both.data[..., past:, :] = new
    return both, kept


def reserve(old: Tensor, steps: int, keep: int) -> tuple[Tensor, Tensor]:
    """:func:`append` of ``steps`` columns whose numbers are not set yet: the caller does so, before anyone else sees
    them, and has no gradients.
    """
    past = old.shape[-2]
    room, end = getattr(old, "senri_room", (None, 0))
    if room is None or not room.claim(end, steps):
        room, end = _Room(old, steps), past
        room.claim(end, steps)
    both = room.buffer[..., end - past : end + steps, :]
    kept = both[..., max(past + steps - keep, 0) :, :]
    kept.senri_room = (room, end + steps)  # type: ignore[union-attr]  # lost in any operation on it, as it should be
    return both, kept
