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
        asks, offers, values = self._heads(hidden, projected)
        mixed = []
        for rows, there in zip(at.split(BLOCK), valid.split(BLOCK), strict=True):
            ask = asks[rows[:, 0]] * there[:, :1, None]  # padding must not matter
            score = torch.einsum("nhd,nchd->nhc", ask, offers[rows]) * SCORE_DIM**-0.5 + self.bias
            weight = _weights(score, there[:, None]).to(values.dtype)
            mixed.append(torch.einsum("nhc,nchd->nhd", weight, values[rows]).flatten(1))
        return torch.cat(mixed) if mixed else projected.new_zeros(0, projected.shape[-1])

    def of_piece(self, hidden: Tensor, projected: Tensor, valid: Tensor) -> Tensor:
        """:meth:`forward` of neighbouring positions, without copying for each what it sees: by blocks of C, each of
        which sees itself and the block before it.

        Args:
            hidden: the layer's inputs ``[B, C - 1 + T, hidden]``; projected: ``[B, C - 1 + T, P]``.
            valid: ``[B, C - 1 + T]``, False where there is no token.

        Returns:
            of the last T positions, ``[B, T, P]``.
        """
        context = self.bias.shape[1]
        steps = hidden.shape[1] - context + 1
        asks, offers, values = self._heads(hidden, projected)

        def blocks(x: Tensor) -> Tensor:  # [B, C - 1 + T, ...] -> [B, N + 1, C, ...]; the first holds what is past
            return F.pad(x, (0, 0) * (x.ndim - 2) + (1, -steps % context)).unflatten(1, (-1, context))

        def both(x: Tensor) -> Tensor:  # what each of N blocks sees: [B, N, 2C, ...]
            x = blocks(x)
            return torch.cat([x[:, :-1], x[:, 1:]], dim=2)

        ask = blocks(asks * valid[..., None, None])[:, 1:]  # padding must not matter
        score = torch.einsum("bnihd,bnjhd->bnhij", ask, both(offers)) * SCORE_DIM**-0.5
        place = torch.arange(2 * context, device=hidden.device)
        back = place[context:, None] - place  # [C, 2C]
        near = (back >= 0) & (back < context)
        score = score + self.bias[:, back.clamp(0, context - 1)]
        weight = _weights(score, (near & both(valid)[:, :, None])[:, :, None]).to(values.dtype)
        mixed = torch.einsum("bnhij,bnjhd->bnihd", weight, both(values))
        return mixed.flatten(3).flatten(1, 2)[:, :steps]

    def _heads(self, hidden: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What asks and what offers, ``[..., H, SCORE_DIM]``, and what is mixed, ``[..., H, P / H]``."""
        scores = self.score_proj(F.layer_norm(hidden, hidden.shape[-1:]))
        asks, offers = scores.unflatten(-1, (2, self.num_heads, SCORE_DIM)).unbind(-3)
        return asks, offers, projected.unflatten(-1, (self.num_heads, -1))


def _weights(score: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is ``seen``; zeros where nothing is."""
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    # not -inf: a position that sees nothing would get no number, and no gradient
    return score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1) * seen
