"""Write rules in chunk-parallel form: one function a family, ``(memory, chunk) -> (output, memory)``.

Within a chunk each step writes its pair, then reads (the delay lies outside, in the stream). With
``g_t`` the cumulative log forget gate inside the chunk, everything of the chunk is a few matrix products.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """One chunk, heads first, feature maps applied, padding gated out (beta = 0, log_alpha = 0)."""

    q: Tensor  # [B, H, G, C, F]
    k: Tensor  # [B, H, C, F]
    v: Tensor  # [B, H, C, Dv]
    beta: Tensor  # [B, H, C]
    log_alpha: Tensor | None  # [B, H, C], <= 0


class Rule(NamedTuple):
    """What distinguishes the update rules."""

    normalised: bool  # keeps z and divides by z'sigma(q); otherwise keys and queries are L2-normalised
    segmented: bool  # corrects against the state at the start of the segment
    forgets: bool  # takes log_alpha
    feature_map: str  # default


RULES: dict[str, Rule] = {
    "linear": Rule(normalised=True, segmented=False, forgets=True, feature_map="elu_plus_one"),
    "delta": Rule(normalised=True, segmented=True, forgets=True, feature_map="elu_plus_one"),
    "delta_token": Rule(normalised=False, segmented=False, forgets=False, feature_map="identity"),
    "gated_delta": Rule(normalised=False, segmented=False, forgets=True, feature_map="identity"),
}


class _Decay(NamedTuple):
    """The forget gate inside a chunk; None stands for ones."""

    start: Tensor | None  # [B, H, C]: state at the chunk's start -> step t
    pair: Tensor | None  # [B, H, C, C]: write of step s -> read of step t
    end: Tensor | None  # [B, H, C]: write of step s -> the chunk's end
    total: Tensor | None  # [B, H]: chunk's start -> its end


def _decay(log_alpha: Tensor | None) -> _Decay:
    if log_alpha is None:
        return _Decay(None, None, None, None)
    # a gate of exactly 0 (log -inf) would give inf - inf; exp(-60) is 0 in every sum
    g = log_alpha.clamp(min=-60.0).cumsum(-1)
    steps = g.shape[-1]
    # masked before exp: above the diagonal the difference is positive and would overflow
    causal = torch.ones(steps, steps, dtype=torch.bool, device=g.device).tril()
    pair = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    return _Decay(g.exp(), pair, (g[..., -1:] - g).exp(), g[..., -1].exp())


def _scale(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[..., None]


def _group(x: Tensor | None) -> Tensor | None:
    """Broadcast over the G query heads that read one memory head (GQA)."""
    return None if x is None else x[:, :, None]


def additive_chunk(
    M: Tensor, z: Tensor, chunk: Chunk, M_segment: Tensor | None, z_segment: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear`` and ``delta`` (Munkhdalai et al. 2024, eqs. 3-5); reads ``M sigma(q) / max(z'sigma(q), eps)``.

    With a segment's snapshot given, what it already holds under a key is subtracted from the value.

    Returns:
        output ``[B, H, G, C, Dv]``, the new ``M`` and ``z``.
    """
    q, k, v, beta, log_alpha = chunk
    if M_segment is not None and z_segment is not None:
        known = k @ M_segment.mT
        v = v - known / (k @ z_segment[..., None]).clamp(min=eps)
    decay = _decay(log_alpha)
    written = k * beta[..., None]
    scores = _scale((q @ written[:, :, None].mT).tril(), _group(decay.pair))
    q_start = _scale(q, _rows(_group(decay.start)))
    numerator = scores @ v[:, :, None] + q_start @ M[:, :, None].mT
    denominator = scores.sum(-1, keepdim=True) + q_start @ z[:, :, None, :, None]
    to_end = _scale(written, _rows(decay.end))
    M = _scale(M, _rows(_rows(decay.total))) + v.mT @ to_end
    z = _scale(z, _rows(decay.total)) + to_end.sum(-2)
    return numerator / denominator.clamp(min=eps), M, z


def read_only(M: Tensor, z: Tensor | None, q: Tensor, eps: float) -> Tensor:
    """The output of a chunk in which nothing is written: ``[B, H, G, C, Dv]``."""
    out = q @ M[:, :, None].mT
    return out if z is None else out / (q @ z[:, :, None, :, None]).clamp(min=eps)


def delta_chunk(M: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """``delta_token`` and ``gated_delta``: exact, by the WY form (Yang et al. 2024, DeltaNet eqs. 8-11 and
    Gated DeltaNet eqs. 8-10). Solving one unit triangular system gives all corrected values of the chunk.

    Returns:
        output ``[B, H, G, C, Dv]`` and the new ``M``.
    """
    q, k, v, beta, log_alpha = chunk
    decay = _decay(log_alpha)
    overlap = _scale(k @ k.mT * beta[..., None], decay.pair)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    right = torch.cat([v, _scale(k, _rows(decay.start))], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(overlap.tril(-1) + eye, right, upper=False, unitriangular=True)
    value, key = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    corrected = value - key @ M.mT
    scores = _scale((q @ k[:, :, None].mT).tril(), _group(decay.pair))
    q_start = _scale(q, _rows(_group(decay.start)))
    out = q_start @ M[:, :, None].mT + scores @ corrected[:, :, None]
    M = _scale(M, _rows(_rows(decay.total))) + corrected.mT @ _scale(k, _rows(decay.end))
    return out, M
