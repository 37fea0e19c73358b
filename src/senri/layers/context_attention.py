"""What a memory's keys and queries are made of: attention over the last few tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORE_DIM = 32  # width of what scores are made of, a head
START_STD = 0.02  # of the scores' projection: at first the distance decides almost alone
SHARP = 3.0  # decay of the weights, per token, around the one token that a sharp head sees
FASTEST, SLOWEST = math.log(2.0), math.log(2.0) / 10  # decay of the first and the last of the other heads' weights
BLOCK = 1024  # positions handled at once: bounds the memory that a long piece takes


class ContextAttention(nn.Module):
    """Causal attention over C tokens that mixes what was projected: ``sum_c softmax_c(a_t b_{t-c} + bias_c) x_{t-c}``.

    The same for keys and queries, for what was told and what is asked must meet. A relation is told in a few words, but
    whose it is may stand some tokens before: a short convolution has one fixed weight for each distance, attention
    finds the name wherever it stands. The bias is learned for each head and distance. Half of the heads begin with
    one of the last tokens each, in order (so that 223 is not 233); the others with ALiBi's slopes (Press et al. 2022,
    arXiv:2108.12409), from half as much a token to 7 % less.

    Args:
        hidden_size: width of the layer's input.
        num_heads: each mixes its slice of the projected features, whose width it divides.
        context_size: C, in tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, context_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.score_proj = nn.Linear(hidden_size, 2 * num_heads * SCORE_DIM)
        self.bias = nn.Parameter(torch.empty(num_heads, context_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values: the same in every process."""
        start = torch.empty(self.score_proj.weight.shape, device="cpu", dtype=torch.float32)
        nn.init.normal_(start, std=START_STD, generator=torch.Generator("cpu").manual_seed(0))
        self.score_proj.weight.copy_(start)
        nn.init.zeros_(self.score_proj.bias)
        sharp, distance = self.num_heads // 2, torch.arange(self.bias.shape[1])
        slopes = torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), self.num_heads - sharp)
        self.bias[:sharp] = -SHARP * (distance - torch.arange(sharp)[:, None]).abs()
        self.bias[sharp:] = -slopes[:, None] * distance

    def forward(self, hidden: Tensor, projected: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        """Mix for each of ``n`` positions.

        Args:
            hidden: the layer's inputs ``[rows, hidden]``; projected: ``[rows, P]``.
            at: rows of the tokens that each position sees, its newest first, ``[n, C]``.
            valid: ``[n, C]``, False where there is no such token.

        Returns:
            ``[n, P]``; zeros for a position that sees nothing.
        """
        scores = self.score_proj(F.layer_norm(hidden, hidden.shape[-1:]))
        asks, offers = scores.unflatten(-1, (2, self.num_heads, SCORE_DIM)).unbind(-3)
        values = projected.unflatten(-1, (self.num_heads, -1))
        mixed = []
        for rows, there in zip(at.split(BLOCK), valid.split(BLOCK), strict=True):
            ask = asks[rows[:, 0]] * there[:, :1, None]  # padding must not matter
            score = torch.einsum("nhd,nchd->nhc", ask, offers[rows]) * SCORE_DIM**-0.5 + self.bias
            score = score.to(torch.promote_types(score.dtype, torch.float32))
            seen = there[:, None]
            # not -inf: a position that sees nothing would get no number, and no gradient
            weight = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1) * seen
            weight = weight.to(values.dtype)
            mixed.append(torch.einsum("nhc,nchd->nhd", weight, values[rows]).flatten(1))
        return torch.cat(mixed) if mixed else projected.new_zeros(0, projected.shape[-1])
