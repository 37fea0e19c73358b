"""The unigram cache: how often each token of the vocabulary has left the window, and what that says of the next one.

A word that was used will be used again, and far more often than its frequency in the language tells (Kuhn and De Mori
1990, "A Cache-Based Natural Language Model"; for neural models Grave et al. 2017, arXiv:1711.02604). As a memory it is
the ``linear`` rule with one key for all and a token's one-hot vector as its value: ``c = Σ e_token``. It is read as a
factor on each token's probability, a power of how much more frequent the token is here than elsewhere (unigram
rescaling: Kneser et al. 1997, Gildea and Hofmann 1999): ``logit_v += strength * log(1 + c_v / (smoothing * p_v))``.

Shapes: ``B`` batch, ``T`` tokens of a call, ``n`` of them that predict, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class UnigramStream(NamedTuple):
    """What the predictions of one call know of the tokens behind their windows."""

    counts: Tensor  # [B, V] float32: tokens that left the window before the call
    ids: Tensor  # [B, T] int64: the token that leaves at each of the call's steps
    valid: Tensor  # [B, T] bool; False: none leaves there


def count(stream: UnigramStream, until: int | None = None) -> Tensor:
    """The counts ``[B, V]`` after the call's first ``until`` steps (None: all)."""
    ids, valid = stream.ids[:, :until], stream.valid[:, :until]
    return stream.counts.scatter_add(1, ids, valid.to(stream.counts.dtype))


def rescale(logits: Tensor, stream: UnigramStream, at: Tensor, strength: Tensor, log_rarity: Tensor) -> Tensor:
    """Logits ``[B, n, V]`` with what the counts add; none of an empty cache.

    Args:
        at: steps of the call that predict, ``[n]``: each sees the tokens that left by then, its own step's included.
        strength: of the factor, a scalar.
        log_rarity: ``-log(smoothing * p_v)``, ``[V]``.
    """
    learns = torch.is_grad_enabled() and (strength.requires_grad or log_rarity.requires_grad)
    if not at.numel() or not (learns or stream.valid.any() or stream.counts.any()):
        return logits
    order = at.argsort()
    if not torch.equal(at[order], at):
        return rescale(logits[:, order], stream, at[order], strength, log_rarity)[:, order.argsort()]
    full = torch.promote_types(logits.dtype, torch.float32)
    rarity, first = log_rarity.to(full).exp(), int(at[0]) + 1
    counts = count(stream, first).to(full)
    out = logits.to(full) + (strength.to(full) * (counts * rarity).log1p())[:, None]
    for row in range(len(logits)):
        leaving = stream.valid[row].nonzero()[:, 0]
        leaving = leaving[(leaving >= first) & (leaving <= at[-1])]
        if not len(leaving):
            continue
        tokens, which = stream.ids[row, leaving].unique(return_inverse=True)
        more = counts.new_zeros(len(at), len(tokens))
        more.index_put_((torch.searchsorted(at, leaving), which), more.new_ones(()), accumulate=True)
        before = counts[row, tokens] * rarity[tokens]
        later = (counts[row, tokens] + more.cumsum(0)) * rarity[tokens]
        out[row].index_add_(1, tokens, strength.to(full) * (later.log1p() - before.log1p()))
    return out.to(logits.dtype)


def rescale_one_by_one(
    logits: Tensor, stream: UnigramStream, at: Tensor, strength: Tensor, log_rarity: Tensor
) -> Tensor:
    """:func:`rescale` written as its definition, in float64: what it is compared with."""
    out = logits.double().clone()
    for row in range(out.shape[0]):
        counts = stream.counts[row].double()
        for step in range(stream.ids.shape[1]):
            left = torch.nn.functional.one_hot(stream.ids[row, step], len(counts))
            counts = counts + left * stream.valid[row, step]
            for place in (at == step).nonzero()[:, 0]:
                out[row, place] = out[row, place] + strength.double() * torch.log(
                    1 + counts * log_rarity.double().exp()
                )
    return out
