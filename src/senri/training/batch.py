"""Samples of different lengths as one batch, padded on the right.

Shapes: ``B`` samples, ``T`` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.data.training_sample import TrainingSample


@dataclass(frozen=True)
class Batch:
    """Samples with their numbers in the mix."""

    samples: tuple[TrainingSample, ...]
    indices: tuple[int, ...]
    ids: Tensor  # [B, T] int64
    valid: Tensor  # [B, T] bool; False: padding
    weight: Tensor  # [B, T] float32; 0 in padding, and for the first token, which nothing predicts
    write: Tensor  # [B, T] int8; -1 in padding

    @property
    def mask(self) -> Tensor | None:
        """``valid``, or None where nothing is padded."""
        return None if self.valid.all() else self.valid

    def name(self, row: int) -> str:
        """A sample in words."""
        sample = self.samples[row]
        return f"sample {self.indices[row]} ({sample.task}, from {sample.source})"


def collate(samples: Sequence[TrainingSample], indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """One batch of ``samples``, whose numbers in the mix are ``indices``."""
    longest = max(len(sample.ids) for sample in samples)

    def rows(name: str, dtype: torch.dtype, pad: float) -> Tensor:
        tensors = [torch.as_tensor(getattr(sample, name)).to(dtype) for sample in samples]
        return torch.stack([F.pad(t, (0, longest - len(t)), value=pad) for t in tensors])

    valid = torch.arange(longest)[None] < torch.tensor([[len(sample.ids)] for sample in samples])
    weight = rows("weight", torch.float32, 0)
    weight[:, 0] = 0
    return Batch(
        tuple(samples),
        tuple(indices),
        rows("ids", torch.long, 0).to(device),
        valid.to(device),
        weight.to(device),
        rows("write", torch.int8, -1).to(device),
    )
