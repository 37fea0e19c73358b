"""The oracle: the memory of ``scan.py`` token by token, head by head, in float64. Slow, plain, and never optimised.

It shares no arithmetic with the fast path: the formulas of SPEC section 2 are written out as they stand there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from senri.memory.feature_maps import FEATURE_MAPS, feature_dim
from senri.memory.reference_memory import Gates, HeadMemories
from senri.memory.rules import RULES, SlotParameters
from senri.memory.state import MemoryState, Pending, Slots, map_tensors
from senri.memory.stores import Store


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
    """Same call, same result as :func:`senri.memory.scan`, in float64; ``chunk_size`` is ignored."""
    name = feature_map or RULES[rule].feature_map
    batch, steps, heads, key_dim = k.shape
    ones = torch.ones(batch, steps, heads, dtype=torch.float64)
    stream = Pending(
        k.double(),
        v.double(),
        ones if beta is None else beta.double(),
        0 * ones if log_alpha is None else log_alpha.double(),
        torch.ones(batch, steps, dtype=torch.bool) if mask is None else mask.bool(),
        0 * ones if importance is None else importance.double(),
    )
    spans = [(row, 0, steps) for row in range(batch)]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        spans = [(0, a, b) for a, b in pairwise(ends)]
    if state is None:
        width = feature_dim(name, key_dim)
        state = MemoryState.zeros(
            len(spans), heads, v.shape[-1], width, rule=rule, num_slots=num_slots,
            num_memories=None if store is None else store.size, store=None if store is None else store.name,
            dtype=torch.float64,
        )  # fmt: skip
    slot = slot or SlotParameters.default(heads, torch.float64, q.device)
    null = torch.zeros(q.shape[:3], dtype=torch.float64) if null is None else null.double()
    expand = torch.ones(q.shape[:3], dtype=torch.float64) if expand is None else expand.double()
    outputs, states = [], []
    for document, (row, start, stop) in enumerate(spans):
        part = Pending(*(x[row, start:stop] for x in stream))  # type: ignore[index]
        out, after = _scan_row(
            q[row, start:stop].double(), part, _row(state, document), rule, delay, segment_size, name, eps,
            slot, null[row, start:stop], None if said is None else said[row, start:stop].double(),
            beta is not None, store, expand[row, start:stop],
        )  # fmt: skip
        outputs.append(out)
        states.append(after)
    out = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    gates = {"beta": beta, "log_alpha": log_alpha, "importance": importance}
    return out, _stack(states, delay, [name for name, gate in gates.items() if gate is None])


def _row(state: MemoryState, row: int) -> MemoryState:
    return map_tensors(lambda t: t[row], state)


def _stack(states: list[MemoryState], delay: int, absent: list[str]) -> MemoryState:
    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]

    M, z, M_segment, z_segment, written = (stack([s[i] for s in states]) for i in range(5))  # type: ignore[misc]
    pending = None
    if delay:
        lines = {name: stack([getattr(s.pending, name) for s in states]) for name in Pending._fields}
        pending = Pending(**{**lines, **dict.fromkeys(absent)})  # type: ignore[arg-type]
    slots = None
    if states[0].slots is not None:
        slots = Slots(*(torch.stack(parts) for parts in zip(*(s.slots for s in states), strict=True)))  # type: ignore[misc]
    return MemoryState(M, z, M_segment, z_segment, written, pending, slots, states[0].store)  # type: ignore[arg-type]


def _scan_row(
    q: Tensor,
    stream: Pending,
    state: MemoryState,
    rule: str,
    delay: int,
    segment_size: int,
    feature_map: str,
    eps: float,
    slot: SlotParameters,
    null: Tensor,
    said: Tensor | None,
    gated: bool,
    store: Store | None,
    expand: Tensor,
) -> tuple[Tensor, MemoryState]:
    """One document: ``q`` [T, Hq, Dk], the stream's tensors [T, ...], the state without its batch dimension."""
    sigma = FEATURE_MAPS[feature_map]
    heads = stream.k.shape[1]
    group = q.shape[1] // heads
    queue = _unqueue(state.pending, stream, delay)
    memories = [HeadMemories(state, h, rule, eps, slot, store, segment_size) for h in range(heads)]
    written = int(state.written)
    outputs = []
    for t in range(q.shape[0]):
        queue.append([x[t] for x in stream])  # type: ignore[index]
        k, v, beta, log_alpha, valid, importance = queue.pop(0)
        for h, memory in enumerate(memories):
            if valid:
                if written % segment_size == 0:
                    memory.begin_segment()
                gates = Gates(beta[h], log_alpha[h].exp(), importance[h])
                memory.write(k[h], sigma(k[h]), v[h], gates, gated, written)
        written += int(valid)
        reads = []
        for h in range(q.shape[1]):
            last = None if said is None else said[t, h // group]
            reads.append(memories[h // group].read(q[t, h], sigma(q[t, h]), null[t, h], last, expand[t, h], written))
        outputs.append(torch.stack(reads))
    out = torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], stream.v.shape[-1])
    pending = Pending(*(torch.stack(parts) for parts in zip(*queue, strict=True))) if delay else None
    return out, HeadMemories.join(memories, torch.tensor(written), pending)


def _unqueue(pending: Pending | None, stream: Pending, delay: int) -> list[list[Tensor]]:
    heads = stream.k.shape[1]
    empty = [
        torch.zeros(heads, stream.k.shape[2], dtype=torch.float64),
        torch.zeros(heads, stream.v.shape[2], dtype=torch.float64),
        torch.ones(heads, dtype=torch.float64),
        torch.zeros(heads, dtype=torch.float64),
        torch.tensor(False),
        torch.zeros(heads, dtype=torch.float64),
    ]
    if pending is None:
        return [list(empty) for _ in range(delay)]
    return [
        [
            pending.k[i].double(),
            pending.v[i].double(),
            empty[2] if pending.beta is None else pending.beta[i].double(),
            empty[3] if pending.log_alpha is None else pending.log_alpha[i].double(),
            pending.valid[i],
            empty[5] if pending.importance is None else pending.importance[i].double(),
        ]
        for i in range(delay)
    ]
