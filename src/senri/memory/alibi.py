"""ALiBi for a memory: pairs fade with the segments that have passed, each head at its own rate."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope a head, ``[H]`` float32: ``2^(-8 h / H)`` for ``h = 1..H`` (Press et al. 2022, section 3).

    If ``H`` is no power of two, those of the next smaller power and every other one of the next larger, as in the
    paper's code.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = torch.exp2(-8 * torch.arange(1, below + 1) / below)
    between = torch.exp2(-4 * torch.arange(1, 2 * below + 1, 2) / below)
    return torch.cat([slopes, between])[:num_heads]


def alibi_log_alpha(positions: Tensor, slopes: Tensor, segment_size: int) -> Tensor:
    """The forget gate ``[B, T, H]`` for :func:`senri.memory.scan` with which a pair weighs ``exp(-slope * distance)``.

    The distance is the number of segments between the pair's and that of the pair written last: the first pair of each
    segment ages all before it by one.

    Args:
        positions: ``[B, T]`` int64, each token's number in its text, padding not counted.
        slopes: ``[H]``, see :func:`alibi_slopes`; times a factor to fade faster or slower.
        segment_size: as in the scan.
    """
    begins = (positions % segment_size == 0) & (positions > 0)
    return torch.where(begins[..., None], -slopes.to(positions.device), 0.0)
