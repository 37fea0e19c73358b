"""The causal scan: write the stream into the memory and read it at every step."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.memory import kernels
from senri.memory.feature_maps import FEATURE_MAPS, feature_dim
from senri.memory.rules import (
    RULES,
    Chunk,
    SlotParameters,
    additive_chunk,
    delta_chunk,
    divided_chunk,
    divided_delta_chunk,
    read_only,
    slot_chunk,
    slot_read_only,
)
from senri.memory.state import MemoryState, Pending
from senri.memory.stores import Reading, Store, check_store
from senri.memory.stream import delayed, runs, segment_begins, segments, unpack_index


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
    importance: Tensor | None = None,
    log_alpha: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    feature_map: str | None = None,
    eps: float = 1e-6,
    num_slots: int = 64,
    slot: SlotParameters | None = None,
    null: Tensor | None = None,
    said: Tensor | None = None,
    store: Store | None = None,
    expand: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Causal linear attention over the delayed stream: step ``t`` writes pair ``t - delay``, then reads with ``q_t``.

    Args:
        q: queries ``[B, T, Hq, Dk]``; ``Hq`` is a multiple of ``H`` (query head ``h`` reads memory ``h // (Hq // H)``);
            0: nothing is read.
        k: keys ``[B, T, H, Dk]``, no position encoding.
        v: values ``[B, T, H, Dv]``.
        state: what an earlier call returned; None starts empty.
        rule: ``linear``, ``delta``, ``delta_token``, ``gated_delta`` or ``slot`` (see ``rules.py``).
        delay: the window W; 0 writes each pair before its own query reads.
        chunk_size: tokens handled at once. A speed knob: results agree to rounding.
        segment_size: pairs between two refreshes of the ``delta`` rule's correction, from the start of the text.
        beta: write gate in [0, 1], ``[B, T, H]``; None writes everything.
        importance: ``[B, T, H]``, for rule ``slot``: the slot of the least ``log strength + importance`` is given up;
            None: 0. It has no gradient.
        log_alpha: log of the forget gate, <= 0, ``[B, T, H]``; None keeps everything. It acts at the pair's write.
        mask: ``[B, T]``, False or 0 where padded: never written, and no step for the forget gate.
        cu_seqlens: ``[N + 1]`` boundaries of N documents packed into one row (B = 1): each starts with its own
            memory (``state``, if given, has N rows) and the returned state has N rows.
        feature_map: name from ``FEATURE_MAPS``; None takes the rule's own.
        eps: lower bound of the normaliser.
        num_slots: N of rule ``slot``, for a state that starts empty; slot: its parameters, None takes defaults.
        null: ``[B, T, Hq]``, for rule ``slot``: each query's logit of finding nothing; None: 0.
        said: ``[B, T, H, Dv]``, for rule ``slot`` with values that are tokens, of length 1: the value of each query's
            own token. A run of pairs is then read in its order (``jump_cost``); None: in any.
        store: several memories a head (see ``stores.py``); None: one.
        expand: ``[B, T, Hq]`` in [0, 1], for store ``hierarchical``: how far each query goes from coarse to fine.

    Returns:
        output ``[B, T, Hq, Dv]`` in ``v``'s dtype, and the new state. An empty memory reads as exact zeros.

    Raises:
        ValueError: unknown rule or feature map, shapes that do not fit, ``log_alpha`` for ``delta_token``, a rule that
            the store does not work with, a state made with another rule, store, delay, number of rows or other gates.
    """
    _check(q, k, v, rule, delay, chunk_size, segment_size, log_alpha, importance, feature_map, cu_seqlens)
    check_store(store, rule, expand)
    options = {
        "rule": rule,
        "chunk_size": chunk_size,
        "segment_size": segment_size,
        "feature_map": feature_map,
        "eps": eps,
        "slot": slot,
        "store": store,
    }
    documents = None
    if cu_seqlens is not None:  # one row a document, right-padded; packed again below
        index, documents = unpack_index(cu_seqlens)
        q, k, v = q[0][index], k[0][index], v[0][index]
        beta, importance, log_alpha, mask, null, said, expand = (
            None if x is None else x[0][index] for x in (beta, importance, log_alpha, mask, null, said, expand)
        )
        mask = documents if mask is None else mask.bool() & documents
    batch_size, steps, num_heads, key_dim = k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is None:
        width = feature_dim(feature_map or RULES[rule].feature_map, key_dim)
        state = MemoryState.zeros(
            batch_size,
            num_heads,
            v.shape[-1],
            width,
            rule=rule,
            num_slots=num_slots,
            num_memories=None if store is None else store.size,
            store=None if store is None else store.name,
            dtype=dtype,
            device=q.device,
        )
    valid = torch.ones(batch_size, steps, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    stream, pending = Pending(k, v, beta, log_alpha, valid, importance), None
    _check_state(state, rule, store, delay, batch_size, stream)
    if delay:
        stream, pending = delayed(state.pending, stream, delay, documents)
    with torch.autocast(q.device.type, enabled=False):  # it would run the state's arithmetic in half precision
        out, state = _scan(q, stream, state, dtype=dtype, null=null, said=said, expand=expand, **options)  # type: ignore[arg-type]
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
    said: Tensor | None = None,
    store: Store | None = None,
    expand: Tensor | None = None,
    segment_size: int = 2048,
) -> Tensor:
    """What the queries ``[B, T, Hq, Dk]`` find in a memory that is not written meanwhile: ``[B, T, Hq, Dv]``.

    As :func:`scan` whose every pair is masked, at the cost of the reads alone; the pairs pending in ``state`` stay so.
    Any store of as many memories may read what another one wrote.
    """
    check_store(store, rule, expand)
    _check_size(state, store)
    sigma = FEATURE_MAPS[feature_map or RULES[rule].feature_map]
    num_heads = state.M.shape[1]
    q = q.to(state.M.dtype)
    nothing = _null(null, q, num_heads, state.M.dtype)
    reading = None
    if store is not None:
        nothing_new = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
        reading = store.reading(q, segments(nothing_new, state.written, segment_size), num_heads, expand)
    q = _queries(sigma(q), num_heads, RULES[rule].normalised)
    said = _heads_first(said, q)
    out = _read_only(state, q, reading, eps, nothing, said, _parameters(slot, num_heads, q))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _read_only(
    state: MemoryState,
    q: Tensor,
    reading: Reading | None,
    eps: float,
    null: Tensor,
    said: Tensor | None,
    slot: SlotParameters,
) -> Tensor:
    if state.slots is not None:
        return slot_read_only(state.M, state.slots, q, null, said, slot)
    return read_only(state.M, state.z, q, eps, reading)


def _write_and_read(
    state: MemoryState, chunk: Chunk, eps: float, null: Tensor, slot: SlotParameters
) -> tuple[Tensor, MemoryState]:
    M, z, M_segment, z_segment = state[:4]
    if state.slots is not None:
        out, M, slots = slot_chunk(M, state.slots, chunk, null, slot)
        return out, state._replace(M=M, slots=slots)
    if z is not None:
        additive = additive_chunk if chunk.reading is None else divided_chunk
        out, M, z = additive(M, z, chunk, M_segment, z_segment, eps)
        return out, state._replace(M=M, z=z)
    delta = delta_chunk if chunk.reading is None else divided_delta_chunk
    out, M = delta(M, chunk)
    return out, state._replace(M=M)


def _parameters(slot: SlotParameters | None, num_heads: int, like: Tensor) -> SlotParameters:
    if slot is None:
        return SlotParameters.default(num_heads, like.dtype, like.device)
    return SlotParameters(*(None if x is None else x.to(like.dtype) for x in slot))  # type: ignore[arg-type]


def _null(null: Tensor | None, q: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Logits ``[B, T, Hq]`` -> ``[B, H, G, T]``; ``q`` ``[B, T, Hq, Dk]``."""
    null = q.new_zeros(q.shape[:3]) if null is None else null
    return null.to(dtype).unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)


def _heads_first(x: Tensor | None, like: Tensor) -> Tensor | None:
    """``[B, T, H, D]`` -> ``[B, H, T, D]``, in the dtype of ``like``."""
    return None if x is None else x.to(like.dtype).transpose(1, 2)


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
    importance: Tensor | None,
    feature_map: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of: {', '.join(RULES)}")
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map {feature_map!r} is not one of: {', '.join(FEATURE_MAPS)}")
    if log_alpha is not None and not RULES[rule].forgets:
        raise ValueError(f"rule {rule!r} has no forget gate; use rule='gated_delta' for log_alpha")
    if importance is not None and rule != "slot":
        raise ValueError(f"rule {rule!r} gives up no slots; use rule='slot' for importance")
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


def _check_state(state: MemoryState, rule: str, store: Store | None, delay: int, batch_size: int, new: Pending) -> None:
    """A state goes on only with the rule, number of memories, delay, rows and gates that it was made with."""
    kind = RULES[rule]
    mine = (kind.normalised, kind.segmented, rule == "slot")
    if mine != (state.z is not None, state.M_segment is not None, state.slots is not None):
        raise ValueError(f"the state was made by another rule than {rule!r}")
    _check_store_of(state, store)
    if state.M.shape[0] != batch_size:
        raise ValueError(f"the state has {state.M.shape[0]} row(s), the input {batch_size}")
    pending = state.pending
    if pending is not None and pending.valid.shape[1] != delay:
        raise ValueError(f"the state was made with delay={pending.valid.shape[1]}, not {delay}")
    if pending is not None and any((a is None) != (b is None) for a, b in zip(pending, new, strict=True)):
        raise ValueError(
            "the state was made with other gates: give beta, log_alpha and importance in every call or in none"
        )


def _check_store_of(state: MemoryState, store: Store | None) -> None:
    name = None if store is None else store.name
    if state.store != name:
        raise ValueError(f"the state was made with store {state.store or 'single'!r}, not {name or 'single'!r}")
    _check_size(state, store)


def _check_size(state: MemoryState, store: Store | None) -> None:
    if state.M.shape[2:-2] != (() if store is None else (store.size,)):
        raise ValueError(f"the state was made with another number of memories: its M is {list(state.M.shape)}")


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
    said: Tensor | None,
    store: Store | None,
    expand: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Walk the chunks of one call; all tensors heads first from here on."""
    kind = RULES[rule]
    steps, num_heads = q.shape[1], stream.k.shape[2]
    if state.slots is not None and store is None and _closed(stream):
        out = read(q, state, rule=rule, feature_map=feature_map, eps=eps, slot=slot, null=null, said=said)
        running = state.slots.running & ~stream.valid.any(1)[:, None]
        slots = state.slots._replace(running=running)
        return out, state._replace(slots=slots, written=state.written + stream.valid.sum(1))
    whole = _prepare(q, stream, kind.normalised, feature_map or kind.feature_map, dtype)
    parameters = _parameters(slot, num_heads, state.M)
    nothing = _null(null, q, num_heads, dtype)
    written = state.written + stream.valid.sum(1)
    begins = segment_begins(stream.valid, state.written, segment_size) if kind.segmented else {}
    if state.slots is not None:
        run, slots = runs(whole.beta, stream, state.slots)
        importance = torch.zeros_like(whole.beta)
        if stream.importance is not None:
            importance = stream.importance.to(dtype).transpose(1, 2)
        whole = whole._replace(run=run, importance=importance, said=_heads_first(said, whole.v))
        state = state._replace(slots=slots)
    if store is not None:
        segment = segments(stream.valid, state.written, segment_size)
        memory = store.assign(stream.k.to(dtype), segment)
        whole = whole._replace(memory=memory, reading=store.reading(q.to(dtype), segment, num_heads, expand))
    if store is None and kernels.suit(q, stream, whole.k.shape[-1], rule=rule, chunk_size=chunk_size):
        out, M = kernels.delta(state.M, whole, q.dtype)
        state = state._replace(M=M)
    else:
        cuts = sorted({*range(0, steps, chunk_size), *begins, steps})
        out, state = _walk(whole, state, cuts, begins, eps, nothing, parameters)
    out = out.permute(0, 3, 1, 2, 4).reshape(*q.shape[:3], stream.v.shape[-1])
    return out, state._replace(written=written)


def _closed(stream: Pending) -> bool:
    """Whether the write gate lets nothing through, as while an answer is made: not for gradients, which ask why not."""
    return stream.beta is not None and not torch.is_grad_enabled() and not bool(stream.beta.any())


def _walk(
    whole: Chunk,
    state: MemoryState,
    cuts: list[int],
    begins: dict[int, Tensor],
    eps: float,
    null: Tensor,
    slot: SlotParameters,
) -> tuple[Tensor, MemoryState]:
    """Chunk by chunk, with PyTorch's own operations: output ``[B, H, G, T, Dv]``."""
    outputs = []
    for start, stop, writes in _chunks(whole, cuts, begins):
        part = slice(start, stop)
        chunk = whole.part(part)
        if start in begins:
            state = _begin_segment(state, begins[start])
        if writes:
            out, state = _write_and_read(state, chunk, eps, null[:, :, :, part], slot)
        else:
            out = _read_only(state, chunk.q, chunk.reading, eps, null[:, :, :, part], chunk.said, slot)
        outputs.append(out)
    if not outputs:
        return whole.q.new_zeros(*whole.q.shape[:4], whole.v.shape[-1]), state
    return torch.cat(outputs, dim=3), state


def _begin_segment(state: MemoryState, rows: Tensor) -> MemoryState:
    """The snapshot of rule ``delta``, renewed in some of the rows ``[B]``."""
    assert state.z is not None
    assert state.M_segment is not None
    assert state.z_segment is not None
    return state._replace(
        M_segment=torch.where(rows.view(-1, *[1] * (state.M.dim() - 1)), state.M, state.M_segment),
        z_segment=torch.where(rows.view(-1, *[1] * (state.z.dim() - 1)), state.z, state.z_segment),
    )


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
