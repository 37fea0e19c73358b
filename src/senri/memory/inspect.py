"""Measures of what a memory holds."""

import torch
from torch import Tensor


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
