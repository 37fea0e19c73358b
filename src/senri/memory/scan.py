"""The causal scan: write the stream into the memory and read it at every step."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.memory.feature_maps import FEATURE_MAPS, feature_dim
from senri.memory.rules import (
    RULES,
    Chunk,
    SlotParameters,
    additive_chunk,
    delta_chunk,
    read_only,
    slot_chunk,
    slot_read_only,
)
from senri.memory.state import MemoryState, Pending, Slots


def delay_line(queue: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Push ``new`` ``[B, T, ...]`` into ``queue`` ``[B, W, ...]``: returns the T oldest, and the W newest."""
    both = torch.cat([queue, new], dim=1)
    steps = new.shape[1]
    return both[:, :steps], both[:, steps:]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MemoryState | None = None,
    *,
    rule: str = "linear",
    delay: int = 0,
    chunk_size: int = 64,
    segment_size: int = 2048,
    beta: Tensor | None = None,
    log_alpha: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    feature_map: str | None = None,
    eps: float = 1e-6,
    num_slots: int = 64,
    slot: SlotParameters | None = None,
    null: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Causal linear attention over the delayed stream: step ``t`` writes pair ``t - delay``, then reads with ``q_t``.

    Args:
        q: queries ``[B, T, Hq, Dk]``; ``Hq`` is a multiple of ``H`` (query head ``h`` reads memory ``h // (Hq // H)``).
        k: keys ``[B, T, H, Dk]``, no position encoding.
        v: values ``[B, T, H, Dv]``.
        state: what an earlier call returned; None starts empty.
        rule: ``linear``, ``delta``, ``delta_token``, ``gated_delta`` or ``slot`` (see ``rules.py``).
        delay: the window W; 0 writes each pair before its own query reads.
        chunk_size: tokens handled at once. A speed knob: results agree to rounding.
        segment_size: pairs between two refreshes of the ``delta`` rule's correction, from the start of the text.
        beta: write gate in [0, 1], ``[B, T, H]``; None writes everything.
        log_alpha: log of the forget gate, <= 0, ``[B, T, H]``; None keeps everything. It acts at the pair's write.
        mask: ``[B, T]``, False or 0 where padded: never written, and no step for the forget gate.
        cu_seqlens: ``[N + 1]`` boundaries of N documents packed into one row (B = 1): each starts with its own
            memory (``state``, if given, has N rows) and the returned state has N rows.
        feature_map: name from ``FEATURE_MAPS``; None takes the rule's own.
        eps: lower bound of the normaliser.
        num_slots: N of rule ``slot``, for a state that starts empty; slot: its parameters, None takes defaults.
        null: ``[B, T, Hq]``, for rule ``slot``: each query's logit of finding nothing; None: 0.

    Returns:
        output ``[B, T, Hq, Dv]`` in ``v``'s dtype, and the new state. An empty memory reads as exact zeros.

    Raises:
        ValueError: unknown rule or feature map, shapes that do not fit, ``log_alpha`` for ``delta_token``, a state made
            with another rule, delay, number of rows or other gates.
    """
    _check(q, k, v, rule, delay, chunk_size, segment_size, log_alpha, feature_map, cu_seqlens)
    options = {
        "rule": rule,
        "chunk_size": chunk_size,
        "segment_size": segment_size,
        "feature_map": feature_map,
        "eps": eps,
    }
    documents = None
    if cu_seqlens is not None:  # one row a document, right-padded; packed again below
        index, documents = unpack_index(cu_seqlens)
        q, k, v = q[0][index], k[0][index], v[0][index]
        beta, log_alpha, mask, null = (None if x is None else x[0][index] for x in (beta, log_alpha, mask, null))
        mask = documents if mask is None else mask.bool() & documents
    batch_size, steps, num_heads, key_dim = k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is None:
        width = feature_dim(feature_map or RULES[rule].feature_map, key_dim)
        state = MemoryState.zeros(
            batch_size, num_heads, v.shape[-1], width, rule=rule, num_slots=num_slots, dtype=dtype, device=q.device
        )
    _check_state(state, rule, delay, batch_size, (beta is not None, log_alpha is not None))
    valid = torch.ones(batch_size, steps, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    stream, pending = Pending(k, v, beta, log_alpha, valid), None
    if delay:
        stream, pending = _delay(state.pending, stream, delay, documents)
    with torch.autocast(q.device.type, enabled=False):  # it would run the state's arithmetic in half precision
        out, state = _scan(q, stream, state, dtype=dtype, slot=slot, null=null, **options)  # type: ignore[arg-type]
    if documents is not None:
        out = out[documents][None]
    return out.to(v.dtype), state._replace(pending=pending)


def read(
    q: Tensor,
    state: MemoryState,
    *,
    rule: str = "linear",
    feature_map: str | None = None,
    eps: float = 1e-6,
    slot: SlotParameters | None = None,
    null: Tensor | None = None,
) -> Tensor:
    """What the queries ``[B, T, Hq, Dk]`` find in a memory that is not written meanwhile: ``[B, T, Hq, Dv]``.

    As :func:`scan` whose every pair is masked, at the cost of the reads alone; the pairs pending in ``state`` stay so.
    """
    sigma = FEATURE_MAPS[feature_map or RULES[rule].feature_map]
    num_heads = state.M.shape[1]
    nothing = _null(null, q, num_heads, state.M.dtype)
    q = _queries(sigma(q.to(state.M.dtype)), num_heads, RULES[rule].normalised)
    out = _read_only(state, q, eps, nothing, _parameters(slot, num_heads, q))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _read_only(state: MemoryState, q: Tensor, eps: float, null: Tensor, slot: SlotParameters) -> Tensor:
    if state.slots is not None:
        return slot_read_only(state.M, state.slots, q, null, slot.sharpness)
    return read_only(state.M, state.z, q, eps)


def _parameters(slot: SlotParameters | None, num_heads: int, like: Tensor) -> SlotParameters:
    if slot is None:
        return SlotParameters.default(num_heads, like.dtype, like.device)
    return SlotParameters(*(x.to(like.dtype) for x in slot))


def _null(null: Tensor | None, q: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Logits ``[B, T, Hq]`` -> ``[B, H, G, T]``; ``q`` ``[B, T, Hq, Dk]``."""
    null = q.new_zeros(q.shape[:3]) if null is None else null
    return null.to(dtype).unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)


def _queries(q: Tensor, num_heads: int, normalised: bool) -> Tensor:
    """Feature-mapped queries ``[B, T, Hq, F]`` -> ``[B, H, G, T, F]``."""
    if not normalised:
        q = F.normalize(q, dim=-1, eps=1e-6)
    return q.unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1, 4)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: str,
    delay: int,
    chunk_size: int,
    segment_size: int,
    log_alpha: Tensor | None,
    feature_map: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of: {', '.join(RULES)}")
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map {feature_map!r} is not one of: {', '.join(FEATURE_MAPS)}")
    if log_alpha is not None and not RULES[rule].forgets:
        raise ValueError(f"rule {rule!r} has no forget gate; use rule='gated_delta' for log_alpha")
    if delay < 0 or chunk_size < 1 or segment_size < 1:
        raise ValueError("delay must be >= 0, chunk_size and segment_size >= 1")
    fits = k.shape[:3] == v.shape[:3] and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: they must be [B, T, Hq, Dk], "
            "[B, T, H, Dk], [B, T, H, Dv] with Hq a multiple of H"
        )
    if cu_seqlens is not None and (q.shape[0] != 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[1]):
        raise ValueError("cu_seqlens needs one packed row (B = 1), must begin at 0 and end at its number of tokens")


def _check_state(state: MemoryState, rule: str, delay: int, batch_size: int, gates: tuple[bool, bool]) -> None:
    """A state goes on only with the rule, delay, rows and gates that it was made with."""
    kind = RULES[rule]
    mine = (kind.normalised, kind.segmented, rule == "slot")
    if mine != (state.z is not None, state.M_segment is not None, state.slots is not None):
        raise ValueError(f"the state was made by another rule than {rule!r}")
    if state.M.shape[0] != batch_size:
        raise ValueError(f"the state has {state.M.shape[0]} row(s), the input {batch_size}")
    pending = state.pending
    if pending is not None and pending.valid.shape[1] != delay:
        raise ValueError(f"the state was made with delay={pending.valid.shape[1]}, not {delay}")
    if pending is not None and (pending.beta is not None, pending.log_alpha is not None) != gates:
        raise ValueError("the state was made with other gates: give beta and log_alpha in every call or in none")


def _delay(queue: Pending | None, new: Pending, delay: int, documents: Tensor | None) -> tuple[Pending, Pending]:
    """The pairs that leave at each step, and those still pending; ``documents`` ``[B, T]`` marks each row's length."""
    leaving: list[Tensor | None] = []
    kept: list[Tensor | None] = []
    for i, tensor in enumerate(new):
        old = queue[i] if queue is not None else None
        if tensor is None:
            leaving.append(None)
            kept.append(None)
            continue
        if old is None:
            old = tensor.new_zeros(tensor.shape[0], delay, *tensor.shape[2:])
        out, rest = delay_line(old, tensor)
        if documents is not None:  # nothing leaves after a document's end
            ends = documents.sum(1, keepdim=True) + torch.arange(delay, device=tensor.device)
            rest = torch.cat([old, tensor], 1)[torch.arange(len(ends), device=tensor.device)[:, None], ends]
        leaving.append(out)
        kept.append(rest)
    stream = Pending(*leaving)  # type: ignore[arg-type]
    if documents is not None:
        stream = stream._replace(valid=stream.valid & documents)
    return stream, Pending(*kept)  # type: ignore[arg-type]


def _scan(
    q: Tensor,
    stream: Pending,
    state: MemoryState,
    *,
    rule: str,
    chunk_size: int,
    segment_size: int,
    feature_map: str | None,
    eps: float,
    dtype: torch.dtype,
    slot: SlotParameters | None,
    null: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Walk the chunks of one call; all tensors heads first from here on."""
    kind = RULES[rule]
    steps = q.shape[1]
    whole = _prepare(q, stream, kind.normalised, feature_map or kind.feature_map, dtype)
    M, z, M_segment, z_segment, slots = state.M, state.z, state.M_segment, state.z_segment, state.slots
    parameters = _parameters(slot, M.shape[1], M)
    nothing = _null(null, q, M.shape[1], dtype)
    begins = _segment_begins(stream.valid, state.written, segment_size) if kind.segmented else {}
    if slots is not None:
        run, slots = _runs(whole.beta, stream, slots)
        whole = whole._replace(run=run)
    outputs = []
    for start, stop, writes in _chunks(whole, sorted({*range(0, steps, chunk_size), *begins, steps}), begins):
        part = slice(start, stop)
        chunk = Chunk(
            whole.q[:, :, :, part],
            whole.k[:, :, part],
            whole.v[:, :, part],
            whole.beta[:, :, part],
            None if whole.log_alpha is None else whole.log_alpha[:, :, part],
            None if whole.run is None else whole.run[:, :, part],
        )
        if start in begins and z is not None and M_segment is not None and z_segment is not None:
            rows = begins[start][:, None, None]
            M_segment = torch.where(rows[..., None], M, M_segment)
            z_segment = torch.where(rows, z, z_segment)
        if not writes:
            out = _read_only(state._replace(M=M, z=z, slots=slots), chunk.q, eps, nothing[:, :, :, part], parameters)
        elif slots is not None:
            out, M, slots = slot_chunk(M, slots, chunk, nothing[:, :, :, part], parameters)
        elif z is not None:
            out, M, z = additive_chunk(M, z, chunk, M_segment, z_segment, eps)
        else:
            out, M = delta_chunk(M, chunk)
        outputs.append(out)
    written = state.written + stream.valid.sum(1)
    if not outputs:
        return q.new_zeros(*q.shape[:3], stream.v.shape[-1]), state._replace(written=written)
    out = torch.cat(outputs, dim=3)  # [B, H, G, T, Dv]
    out = out.permute(0, 3, 1, 2, 4).reshape(q.shape[0], steps, q.shape[2], -1)
    return out, MemoryState(M, z, M_segment, z_segment, written, slots=slots)


def _chunks(whole: Chunk, cuts: list[int], begins: Container[int]) -> Iterator[tuple[int, int, bool]]:
    """``(start, stop, writes)`` of each chunk; neighbours that write and forget nothing are one.

    A write gate that is mostly closed leaves most chunks so.
    """
    if not cuts[-1]:
        return
    open_ = torch.ones(cuts[-1], dtype=torch.bool)
    if whole.log_alpha is None and not torch.is_grad_enabled():  # what is not written would be cut from the graph
        open_ = (whole.beta != 0).flatten(0, 1).any(0).cpu()
    start, writes = 0, bool(open_[: cuts[1]].any())
    for cut, stop in pairwise(cuts[1:]):
        following = bool(open_[cut:stop].any())
        if writes or following or cut in begins:
            yield start, cut, writes
            start, writes = cut, following
    yield start, cuts[-1], writes


def _prepare(q: Tensor, stream: Pending, normalised: bool, feature_map: str, dtype: torch.dtype) -> Chunk:
    """Feature maps, heads first, GQA groups split off, padding gated out."""
    sigma = FEATURE_MAPS[feature_map]
    num_heads = stream.k.shape[2]
    q, k, v = sigma(q.to(dtype)), sigma(stream.k.to(dtype)), stream.v.to(dtype)
    if not normalised:
        k = F.normalize(k, dim=-1, eps=1e-6)
    q = _queries(q, num_heads, normalised)
    valid = stream.valid[..., None].to(dtype)  # [B, T, 1]
    beta = valid.expand(-1, -1, num_heads) if stream.beta is None else stream.beta.to(dtype) * valid
    log_alpha = None if stream.log_alpha is None else (stream.log_alpha.to(dtype) * valid).transpose(1, 2)
    return Chunk(q, k.transpose(1, 2), v.transpose(1, 2), beta.transpose(1, 2), log_alpha)


def _runs(beta: Tensor, stream: Pending, slots: Slots) -> tuple[Tensor, Slots]:
    """The run that each pair belongs to ``[B, H, T]``, and the slots that know whether the last one goes on.

    Tokens written one after the other are a run. Without a write gate each token is one: all of a text is no value.
    """
    writes = beta > 0
    steps = torch.arange(writes.shape[-1], device=writes.device).expand(len(writes), -1)
    newest = torch.where(stream.valid, steps, -1).cummax(-1).values  # [B, T] the last token that is no padding
    before = F.pad(newest, (1, 0), value=-1)[:, None].expand(-1, writes.shape[1], -1)  # and before each step
    after = torch.where(before < 0, slots.running[..., None], F.pad(writes, (0, 1)).gather(-1, before.clamp(min=0)))
    begins = writes & ~after[..., :-1] if stream.beta is not None else writes
    run = slots.run[..., -1:] + begins.cumsum(-1)  # what was written last stands last
    return run, slots._replace(running=after[..., -1])


def _segment_begins(valid: Tensor, written: Tensor, segment_size: int) -> dict[int, Tensor]:
    """Steps at which some row begins a segment -> which rows ``[B]``. Rows may differ: padding is not counted."""
    index = written[:, None] + valid.cumsum(1) - 1
    begins = valid & (index % segment_size == 0)
    return {int(t): begins[:, t] for t in begins.any(0).nonzero().flatten()}


def unpack_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, L]`` token index of each document, right-padded with its last token, and which entries are real."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    steps = torch.arange(int((ends - starts).max()), device=cu_seqlens.device)
    index = starts[:, None] + steps
    return torch.minimum(index, ends[:, None] - 1), index < ends[:, None]
