"""Write rules in chunk-parallel form: one function a family, ``(memory, chunk) -> (output, memory)``.

Within a chunk each step writes its pair, then reads (the delay lies outside, in the stream). With
``g_t`` the cumulative log forget gate inside the chunk, everything of the chunk is a few matrix products.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.memory.state import Slots
from senri.memory.stores import Reading


class Chunk(NamedTuple):
    """One chunk, heads first, feature maps applied, padding gated out (beta = 0, log_alpha = 0)."""

    q: Tensor  # [B, H, G, C, F]
    k: Tensor  # [B, H, C, F]
    v: Tensor  # [B, H, C, Dv]
    beta: Tensor  # [B, H, C]
    log_alpha: Tensor | None  # [B, H, C], <= 0
    run: Tensor | None = None  # [B, H, C] int64: the run that a written pair belongs to; only for rule slot
    importance: Tensor | None = None  # [B, H, C]: likewise
    said: Tensor | None = None  # [B, H, C, Dv]: the value of each query's own token; only for rule slot
    memory: Tensor | None = None  # [B, H, C] int64: where a store writes the pair
    reading: Reading | None = None  # how a store's memories are read

    def part(self, steps: slice) -> "Chunk":
        """That of some of the steps."""
        return Chunk(
            self.q[:, :, :, steps],
            self.k[:, :, steps],
            self.v[:, :, steps],
            self.beta[:, :, steps],
            None if self.log_alpha is None else self.log_alpha[:, :, steps],
            None if self.run is None else self.run[:, :, steps],
            None if self.importance is None else self.importance[:, :, steps],
            None if self.said is None else self.said[:, :, steps],
            None if self.memory is None else self.memory[:, :, steps],
            None if self.reading is None else self.reading.part(steps),
        )


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
    "slot": Rule(normalised=False, segmented=False, forgets=False, feature_map="identity"),
}


class SlotParameters(NamedTuple):
    """What rule ``slot`` has to learn; see :func:`slot_chunk`."""

    sharpness: Tensor  # [H]: logit of a slot whose key is the query
    same_at: Tensor  # [H]: cosine of two keys at which the later pair halves the earlier one's strength
    slope: Tensor  # [H]: how fast around it
    # Logit that a pair inside a run loses to others where the value before it has not just been said; None: none.
    jump_cost: Tensor | None = None  # [H]
    # One more pair that a memory holds as soon as it holds any, and never gives up; None: there is none.
    end_key: Tensor | None = None  # [H, F], of any length: its logit is that of a query's product with it, and the bias
    end_bias: Tensor | None = None  # [H]
    end_value: Tensor | None = None  # [H, Dv]

    @classmethod
    def default(cls, num_heads: int, dtype: torch.dtype, device: torch.device) -> "SlotParameters":
        """What a scan without any takes."""
        return cls(*(torch.full((num_heads,), x, dtype=dtype, device=device) for x in (16.0, 0.9, 40.0, 2.0)))


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
    q, k, v, beta, log_alpha, *_ = chunk
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


def divided_chunk(
    M: Tensor, z: Tensor, chunk: Chunk, M_segment: Tensor | None, z_segment: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`additive_chunk` of a store: each pair is written to one memory and, by ``delta``, corrected against it.

    Which memory is one-hot, so all is matrix products; the largest read from, and write to, all memories.

    Args:
        M: ``[B, H, n, Dv, F]``; z: ``[B, H, n, F]``; their snapshots likewise.
    """
    q, k, v, beta, log_alpha, *_, memory, reading = chunk
    assert memory is not None
    assert reading is not None
    own = F.one_hot(memory, M.shape[2]).to(k.dtype)  # [B, H, C, n]
    if M_segment is not None and z_segment is not None:
        v = v - _weighted_read(M_segment, k, own / (k @ z_segment.mT).clamp(min=eps))
    decay = _decay(log_alpha)
    written = k * beta[..., None]
    scores = _scale((q @ written[:, :, None].mT).tril(), _group(decay.pair))
    q_start = _scale(q, _rows(_group(decay.start)))
    weights = reading.weights(q_start @ z[:, :, None].mT + scores @ own[:, :, None], eps)
    out = _grouped_read(M, q_start, weights) + scores * (weights @ own[:, :, None].mT) @ v[:, :, None]
    to_end = _scale(written, _rows(decay.end))
    divided = (own[..., None] * v[..., None, :]).flatten(3)  # [B, H, C, n Dv]
    M = _scale(M, _rows(_rows(_rows(decay.total)))) + (divided.mT @ to_end).unflatten(2, M.shape[2:4])
    z = _scale(z, _rows(_rows(decay.total))) + own.mT @ to_end
    return out, M, z


def divided_delta_chunk(M: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """:func:`delta_chunk` of a store, read as the sum of its memories: heads of which each is written its own pairs.

    Args:
        M: ``[B, H, n, Dv, F]``.
    """
    assert chunk.memory is not None
    size = M.shape[2]
    own = F.one_hot(chunk.memory, size).to(M.dtype).mT  # [B, H, n, C]
    q, k, v, beta, log_alpha = (None if x is None else x.repeat_interleave(size, 1) for x in chunk[:5])
    heads = Chunk(q, k, v, beta * own.flatten(1, 2), log_alpha)  # type: ignore[arg-type, operator]
    out, M = delta_chunk(M.flatten(1, 2), heads)
    return out.unflatten(1, (-1, size)).sum(2), M.unflatten(1, (-1, size))


def _grouped_read(M: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """:func:`_weighted_read` for ``q`` ``[B, H, G, C, F]`` and weights ``[B, H, G, C, n]``: ``[B, H, G, C, Dv]``."""
    return _weighted_read(M, q.flatten(2, 3), weights.flatten(2, 3)).unflatten(2, q.shape[2:4])


def _weighted_read(M: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i M_i q`` of ``q`` ``[B, H, N, F]`` and weights ``[B, H, N, n]``: ``[B, H, N, Dv]``.

    64 queries at once: the reads of all memories, of which the weights make one, are ``n Dv`` numbers a query.
    """
    matrix = M.flatten(2, 3).mT  # [B, H, F, n Dv]
    parts = [
        some[..., None, :] @ (queries @ matrix).unflatten(-1, M.shape[2:4])
        for queries, some in zip(q.split(64, 2), weights.split(64, 2), strict=True)
    ]
    return torch.cat(parts, 2)[..., 0, :]


def read_only(M: Tensor, z: Tensor | None, q: Tensor, eps: float, reading: Reading | None = None) -> Tensor:
    """The output of a chunk in which nothing is written: ``[B, H, G, C, Dv]``; ``reading`` that of a store."""
    if reading is not None and z is not None:
        return _grouped_read(M, q, reading.weights(q @ z[:, :, None].mT, eps))
    if reading is not None:
        M = M.sum(2)
    out = q @ M[:, :, None].mT
    return out if z is None else out / (q @ z[:, :, None, :, None]).clamp(min=eps)


def delta_chunk(M: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """``delta_token`` and ``gated_delta``: exact, by the WY form (Yang et al. 2024, DeltaNet eqs. 8-11 and
    Gated DeltaNet eqs. 8-10). Solving one unit triangular system gives all corrected values of the chunk.

    Returns:
        output ``[B, H, G, C, Dv]`` and the new ``M``.
    """
    q, k, v, beta, log_alpha, *_ = chunk
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


def slot_chunk(
    M: Tensor, slots: Slots, chunk: Chunk, null: Tensor, parameters: SlotParameters
) -> tuple[Tensor, Tensor, Slots]:
    """``slot``: a fixed number of pairs as they are, read by softmax: attention with bounded memory (Peng et al. 2022,
    ABC, arXiv:2110.02488), as a modern Hopfield network (Ramsauer et al. 2021, arXiv:2008.02217).

    A pair ``k, v`` of strength ``beta > 0`` weakens each slot by ``1 - beta sigmoid(slope (k' K_n - same_at))``: what
    is written under the same key again replaces what was, as the delta rule erases. But not the slots of its own run:
    tokens written one after the other are one value (``KEY-ABC12345``), whose keys, a token apart, are alike. The slot
    of the least ``log strength + importance`` is then given up, the oldest of several (an empty one while there is
    any), and the pair goes behind the others. A read, in which importance has no say, is
    ``sum_n p_n M_n`` with ``p`` the softmax of ``sharpness q' K_n + log strength_n`` beside ``null``, the logit of
    finding nothing, and beside the end's pair, if there is one, a persistent vector (Sukhbaatar et al. 2019,
    arXiv:1907.01470) in a memory that is not empty. With ``said``, what all pairs have of ``p`` together is shared
    among them by that logit less ``jump_cost (1 - said' M_m)``, where the slot ``m`` before ``n`` is of the same run: a
    value is said from its beginning on, token by token, as by an induction head (Olsson et al. 2022, arXiv:2209.11895).

    Args:
        null: ``[B, H, G, C]``.

    Returns:
        output ``[B, H, G, C, Dv]``, the new ``M`` and slots (``running`` is left as it was).
    """
    q, k, v, beta, _, run, importance, said, *_ = chunk
    assert run is not None
    assert importance is not None
    beta = torch.where(beta > 0, beta, 0.0)  # what is not written has no gradient either
    num_slots, steps = M.shape[-1], k.shape[-2]
    keys = torch.cat([slots.K, k], -2)  # what was there, and what comes
    values = torch.cat([M.mT, v], -2)
    same = (parameters.slope[:, None, None] * (k @ keys.mT - parameters.same_at[:, None, None])).sigmoid()
    # factor of pair n's strength at step t: weakened by later ones, set at its own
    runs = torch.cat([slots.run, run], -1)
    erased = 1 - beta[..., None] * same * (run[..., :, None] != runs[..., None, :])
    all_pairs = torch.ones(steps, steps, dtype=torch.bool, device=k.device)
    # its own strength unrounded: equal strengths, in whatever chunk they were written, must stay equal
    new = torch.where(all_pairs.tril(), beta[..., None], 1.0)
    new = torch.where(all_pairs.tril(-1), erased[..., num_slots:], new)
    start = torch.cat([slots.strength, torch.ones_like(beta)], -1)[..., None, :]
    factors = torch.cat([start, torch.cat([erased[..., :num_slots], new], -1)], -2)
    strength = factors.cumprod(-2)[..., 1:, :]  # [B, H, C, N + C]
    importance = torch.cat([slots.importance, importance], -1).detach()
    held, who = _allocate(strength.detach().log() + importance[..., None, :], beta.detach() > 0, num_slots)
    strength_held = strength * held
    out = _slot_read(q, null, keys, values, strength_held, runs, said, parameters)
    last = strength_held[..., -1, :].gather(-1, who)
    rows = who[..., None]
    K = keys.gather(-2, rows.expand(*who.shape, keys.shape[-1]))
    M = values.gather(-2, rows.expand(*who.shape, values.shape[-1])).mT
    return out, M, slots._replace(K=K, strength=last, importance=importance.gather(-1, who), run=runs.gather(-1, who))


def _allocate(worth: Tensor, writes: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Which pairs hold a slot at each step.

    Args:
        worth: ``[B, H, C, N + C]``, what each pair's would be: the least is given up; writes: ``[B, H, C]`` bool.

    Returns:
        held ``[B, H, C, N + C]`` bool, and at the end the pair in each slot ``[B, H, N]``, the oldest first.
    """
    who = torch.arange(num_slots, device=worth.device).expand(*writes.shape[:2], -1)
    held = torch.zeros_like(worth, dtype=torch.bool)
    current = torch.zeros_like(held[..., 0, :]).scatter(-1, who, True)
    places = torch.arange(num_slots, device=worth.device)
    some = writes.flatten(0, 1).any(0).tolist()
    for t in range(writes.shape[-1]):
        if some[t]:
            now = worth[..., t, :].gather(-1, who)
            least = (now == now.amin(-1, keepdim=True)).int().argmax(-1, keepdim=True)  # the first of several
            moved = who.gather(-1, (places + (places >= least)).clamp(max=num_slots - 1))
            moved[..., -1] = num_slots + t
            who = torch.where(writes[..., t, None], moved, who)
            current = torch.zeros_like(current).scatter(-1, who, True)
        held[..., t, :] = current
    return held, who


def slot_read_only(
    M: Tensor, slots: Slots, q: Tensor, null: Tensor, said: Tensor | None, parameters: SlotParameters
) -> Tensor:
    """The output of a chunk in which nothing is written: ``[B, H, G, C, Dv]``."""
    return _slot_read(q, null, slots.K, M.mT, slots.strength[..., None, :], slots.run, said, parameters)


def _slot_read(
    q: Tensor,
    null: Tensor,
    keys: Tensor,
    values: Tensor,
    strength: Tensor,
    runs: Tensor,
    said: Tensor | None,
    parameters: SlotParameters,
) -> Tensor:
    """``q`` ``[B, H, G, C, F]``, keys and values ``[B, H, n, F or Dv]``, strength ``[B, H, C or 1, n]``, runs
    ``[B, H, n]``, said ``[B, H, C, Dv]``.
    """
    sharpness, _, _, jump_cost, end_key, end_bias, end_value = parameters
    scores = sharpness[:, None, None, None] * (q @ keys[:, :, None].mT)
    held = strength[:, :, None] > 0
    top = torch.maximum(scores.detach().masked_fill(~held, -torch.inf).amax(-1), null.detach())[..., None]
    end = None
    if end_key is not None and end_bias is not None and end_value is not None:
        end = q @ end_key[:, None, :, None] + end_bias[:, None, None, None]
        end = end.masked_fill(~held.any(-1, keepdim=True), -torch.inf)
        top = torch.maximum(top, end.detach())
    # no log of a strength: its gradient at 0 is no number
    weight = torch.where(held, strength[:, :, None] * (scores - top).clamp(max=0).exp(), 0.0)
    of_pairs = weight.sum(-1, keepdim=True)
    total = of_pairs + (null[..., None] - top).exp()
    if said is not None and jump_cost is not None:
        weight = weight * (-jump_cost[:, None, None] * _jumps(said, values, strength, runs)).exp()[:, :, None]
        weight = weight * (of_pairs / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny))
    found = weight @ values[:, :, None]
    if end is not None and end_value is not None:
        found, total = found + (end - top).exp() * end_value[:, None, None], total + (end - top).exp()
    return found / total


def _jumps(said: Tensor, values: Tensor, strength: Tensor, runs: Tensor) -> Tensor:
    """How far reading each pair next would be a jump into its run: 0 to 1, ``[B, H, C, n]``; see :func:`_slot_read`."""
    places = torch.arange(strength.shape[-1], device=strength.device)
    held = torch.where(strength > 0, places, -1).cummax(-1).values
    before = F.pad(held[..., :-1], (1, 0), value=-1)  # of each pair the one that is held before it
    there, before = before >= 0, before.clamp(min=0)
    inside = there & (runs[:, :, None].expand_as(before).gather(-1, before) == runs[:, :, None])
    just_said = (said @ values.mT).clamp(0, 1)
    return torch.where(inside, 1 - just_said.gather(-1, before.expand_as(just_said)), 0.0)
