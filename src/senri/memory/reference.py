"""The oracle: the memory of ``scan.py`` token by token, head by head, in float64. Slow, plain, and never optimised.

It shares no arithmetic with the fast path: the formulas of SPEC section 2 are written out as they stand there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from senri.memory.feature_maps import FEATURE_MAPS, feature_dim
from senri.memory.rules import RULES, SlotParameters
from senri.memory.state import MemoryState, Pending, Slots, map_tensors


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
    )
    spans = [(row, 0, steps) for row in range(batch)]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        spans = [(0, a, b) for a, b in pairwise(ends)]
    if state is None:
        width = feature_dim(name, key_dim)
        state = MemoryState.zeros(
            len(spans), heads, v.shape[-1], width, rule=rule, num_slots=num_slots, dtype=torch.float64
        )
    slot = slot or SlotParameters.default(heads, torch.float64, q.device)
    null = torch.zeros(q.shape[:3], dtype=torch.float64) if null is None else null.double()
    outputs, states = [], []
    for document, (row, start, stop) in enumerate(spans):
        part = Pending(*(x[row, start:stop] for x in stream))  # type: ignore[index]
        out, after = _scan_row(
            q[row, start:stop].double(), part, _row(state, document), rule, delay, segment_size, name, eps,
            slot, null[row, start:stop], beta is not None,
        )  # fmt: skip
        outputs.append(out)
        states.append(after)
    out = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    has_gates = (beta is not None, log_alpha is not None)
    return out, _stack(states, delay, has_gates)


def _row(state: MemoryState, row: int) -> MemoryState:
    return map_tensors(lambda t: t[row], state)


def _stack(states: list[MemoryState], delay: int, has_gates: tuple[bool, bool]) -> MemoryState:
    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]

    M, z, M_segment, z_segment, written = (stack([s[i] for s in states]) for i in range(5))  # type: ignore[misc]
    pending = None
    if delay:
        lines = [stack([s.pending[i] for s in states]) for i in range(5)]  # type: ignore[index]
        lines[2] = lines[2] if has_gates[0] else None
        lines[3] = lines[3] if has_gates[1] else None
        pending = Pending(*lines)  # type: ignore[arg-type]
    slots = None
    if states[0].slots is not None:
        slots = Slots(*(torch.stack(parts) for parts in zip(*(s.slots for s in states), strict=True)))  # type: ignore[misc]
    return MemoryState(M, z, M_segment, z_segment, written, pending, slots)  # type: ignore[arg-type]


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
    gated: bool,
) -> tuple[Tensor, MemoryState]:
    """One document: ``q`` [T, Hq, Dk], the stream's tensors [T, ...], the state without its batch dimension."""
    sigma = FEATURE_MAPS[feature_map]
    heads = stream.k.shape[1]
    group = q.shape[1] // heads
    queue = _unqueue(state.pending, stream, delay)
    memories = [_Memory(state, h, rule, eps, slot) for h in range(heads)]
    written = int(state.written)
    outputs = []
    for t in range(q.shape[0]):
        queue.append([x[t] for x in stream])  # type: ignore[index]
        k, v, beta, log_alpha, valid = queue.pop(0)
        for h, memory in enumerate(memories):
            if valid:
                if written % segment_size == 0:
                    memory.begin_segment()
                memory.write(sigma(k[h]), v[h], beta[h], log_alpha[h].exp(), gated)
        written += int(valid)
        outputs.append(torch.stack([memories[h // group].read(sigma(q[t, h]), null[t, h]) for h in range(q.shape[1])]))
    out = torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], stream.v.shape[-1])
    pending = Pending(*(torch.stack([item[i] for item in queue]) for i in range(5))) if delay else None
    return out, _Memory.join(memories, torch.tensor(written), pending)


def _unqueue(pending: Pending | None, stream: Pending, delay: int) -> list[list[Tensor]]:
    heads = stream.k.shape[1]
    empty = [
        torch.zeros(heads, stream.k.shape[2], dtype=torch.float64),
        torch.zeros(heads, stream.v.shape[2], dtype=torch.float64),
        torch.ones(heads, dtype=torch.float64),
        torch.zeros(heads, dtype=torch.float64),
        torch.tensor(False),
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
        ]
        for i in range(delay)
    ]


class _Memory:
    """One head's memory as plain vectors and matrices."""

    def __init__(self, state: MemoryState, head: int, rule: str, eps: float, slot: SlotParameters) -> None:
        self.rule, self.eps = rule, eps
        self.sharpness, self.same_at, self.slope = (x[head].double() for x in slot)
        self.K = None if state.slots is None else state.slots.K[head].double()
        self.strength = None if state.slots is None else state.slots.strength[head].double()
        self.run = None if state.slots is None else state.slots.run[head]
        self.running = None if state.slots is None else state.slots.running[head]
        self.M = state.M[head].double()
        self.z = None if state.z is None else state.z[head].double()
        self.M_segment = None if state.M_segment is None else state.M_segment[head].double()
        self.z_segment = None if state.z_segment is None else state.z_segment[head].double()

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        return x / x.norm().clamp(min=1e-6)

    def begin_segment(self) -> None:
        if self.M_segment is not None:
            self.M_segment, self.z_segment = self.M, self.z

    def write(self, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor, gated: bool) -> None:
        if self.K is not None:
            if beta > 0:
                self._write_slot(self._unit(k), v, beta, gated and bool(self.running))
            self.running = beta > 0
            return
        if self.rule in ("delta_token", "gated_delta"):
            k = self._unit(k)
            kept = alpha * self.M
            self.M = kept + beta * torch.outer(v - kept @ k, k)
            return
        assert self.z is not None
        if self.rule == "delta":
            assert self.M_segment is not None
            assert self.z_segment is not None
            v = v - self.M_segment @ k / (self.z_segment @ k).clamp(min=self.eps)
        self.M = alpha * self.M + beta * torch.outer(v, k)
        self.z = alpha * self.z + beta * k

    def _write_slot(self, k: Tensor, v: Tensor, beta: Tensor, goes_on: bool) -> None:
        assert self.K is not None
        assert self.strength is not None
        assert self.run is not None
        run = self.run[-1] if goes_on else self.run[-1] + 1
        left = [
            s if n == run else s * (1 - beta * torch.sigmoid(self.slope * (torch.dot(k, other) - self.same_at)))
            for s, n, other in zip(self.strength, self.run, self.K, strict=True)
        ]
        place = min(range(len(left)), key=lambda n: float(left[n].detach()))  # the first of the weakest
        keys, values, runs = list(self.K), list(self.M.T), list(self.run)
        for slots, new in ((left, beta), (keys, k), (values, v), (runs, run)):
            del slots[place]
            slots.append(new)
        self.strength, self.K, self.M = torch.stack(left), torch.stack(keys), torch.stack(values, 1)
        self.run = torch.stack(runs)

    def read(self, q: Tensor, null: Tensor) -> Tensor:
        if self.K is not None:
            assert self.strength is not None
            there = (self.strength > 0).nonzero()[:, 0]
            logits = self.sharpness * self.K[there] @ self._unit(q) + self.strength[there].log()
            share = torch.cat([logits, null[None]]).softmax(0)[:-1]
            return self.M[:, there] @ share
        if self.z is None:
            return self.M @ self._unit(q)
        return self.M @ q / (self.z @ q).clamp(min=self.eps)

    @staticmethod
    def join(memories: list[_Memory], written: Tensor, pending: Pending | None) -> MemoryState:
        def stack(name: str) -> Tensor | None:
            parts = [getattr(m, name) for m in memories]
            return None if parts[0] is None else torch.stack(parts)

        M, z = stack("M"), stack("z")
        slots = None if memories[0].K is None else Slots(*map(stack, Slots._fields))  # type: ignore[arg-type]
        return MemoryState(M, z, stack("M_segment"), stack("z_segment"), written, pending, slots)  # type: ignore[arg-type]
