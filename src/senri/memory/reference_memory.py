"""One head's memories as plain vectors and matrices, for ``reference.py``: the formulas of the rules and stores."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from senri.memory.rules import SlotParameters
from senri.memory.state import MemoryState, Pending, Slots
from senri.memory.stores import Banks, Hierarchical, Routed, Store


class Gates(NamedTuple):
    """Of one pair, scalars."""

    beta: Tensor
    alpha: Tensor
    importance: Tensor


class Memory:
    """One memory of one head as plain vectors and matrices; ``place`` is where it stands in ``M`` and ``z``."""

    def __init__(
        self, state: MemoryState, head: int, place: tuple[int, ...], rule: str, eps: float, slot: SlotParameters
    ) -> None:
        self.rule, self.eps = rule, eps
        self.sharpness, self.same_at, self.slope = (x[head].double() for x in slot[:3])
        self.jump_cost, *end = (None if x is None else x[head].double() for x in slot[3:])
        self.end_key, self.end_bias, self.end_value = end
        self.K = None if state.slots is None else state.slots.K[head].double()
        self.strength = None if state.slots is None else state.slots.strength[head].double()
        self.importance = None if state.slots is None else state.slots.importance[head].detach().double()
        self.run = None if state.slots is None else state.slots.run[head]
        self.running = None if state.slots is None else state.slots.running[head]
        self.M = state.M[place].double()
        self.z = None if state.z is None else state.z[place].double()
        self.M_segment = None if state.M_segment is None else state.M_segment[place].double()
        self.z_segment = None if state.z_segment is None else state.z_segment[place].double()

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        return x / x.norm().clamp(min=1e-6)

    def begin_segment(self) -> None:
        if self.M_segment is not None:
            self.M_segment, self.z_segment = self.M, self.z

    def write(self, k: Tensor, v: Tensor, gates: Gates, gated: bool) -> None:
        beta, alpha, importance = gates
        if self.K is not None:
            if beta > 0:
                self._write_slot(self._unit(k), v, beta, importance, gated and bool(self.running))
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

    def _write_slot(self, k: Tensor, v: Tensor, beta: Tensor, importance: Tensor, goes_on: bool) -> None:
        assert self.K is not None
        assert self.strength is not None
        assert self.importance is not None
        assert self.run is not None
        run = self.run[-1] if goes_on else self.run[-1] + 1
        left = [
            s if n == run else s * (1 - beta * torch.sigmoid(self.slope * (torch.dot(k, other) - self.same_at)))
            for s, n, other in zip(self.strength, self.run, self.K, strict=True)
        ]
        worth = list(self.importance)
        # the first of those worth least
        place = min(range(len(left)), key=lambda n: float(left[n].detach().log() + worth[n]))
        keys, values, runs = list(self.K), list(self.M.T), list(self.run)
        for slots, new in ((left, beta), (worth, importance.detach()), (keys, k), (values, v), (runs, run)):
            del slots[place]
            slots.append(new)
        self.strength, self.K, self.M = torch.stack(left), torch.stack(keys), torch.stack(values, 1)
        self.run, self.importance = torch.stack(runs), torch.stack(worth)

    def read(self, q: Tensor, null: Tensor, said: Tensor | None) -> Tensor:
        if self.K is not None:
            assert self.strength is not None
            there = (self.strength > 0).nonzero()[:, 0]
            logits = self.sharpness * self.K[there] @ self._unit(q) + self.strength[there].log()
            values = self.M[:, there]
            if said is not None and self.jump_cost is not None and len(there):
                ordered = logits - self.jump_cost * self._jumps(there.tolist(), said)
                logits = ordered - ordered.logsumexp(0) + logits.logsumexp(0)
            if self.end_key is not None and self.end_bias is not None and self.end_value is not None and len(there):
                end = torch.dot(self.end_key, self._unit(q)) + self.end_bias
                logits, values = torch.cat([logits, end[None]]), torch.cat([values, self.end_value[:, None]], 1)
            return values @ torch.cat([logits, null[None]]).softmax(0)[:-1]
        if self.z is None:
            return self.M @ self._unit(q)
        return self.M @ q / (self.z @ q).clamp(min=self.eps)

    def _jumps(self, there: list[int], said: Tensor) -> Tensor:
        """Of each slot: 1 if it is inside a run whose token before it has not been said."""
        assert self.run is not None
        jumps = [self.M.new_zeros(())] * len(there)
        for i, (before, slot) in enumerate(pairwise(there), start=1):
            if self.run[before] == self.run[slot]:
                jumps[i] = 1 - torch.dot(said, self.M[:, before]).clamp(0, 1)
        return torch.stack(jumps)

    def forget(self, alpha: Tensor) -> None:
        self.M = alpha * self.M
        self.z = None if self.z is None else alpha * self.z


class HeadMemories:
    """The memories of one head: a single one, or those of a store, each written and read for itself."""

    def __init__(
        self,
        state: MemoryState,
        head: int,
        rule: str,
        eps: float,
        slot: SlotParameters,
        store: Store | None,
        segment_size: int,
    ) -> None:
        self.store, self.segment_size, self.eps = store, segment_size, eps
        places: list[tuple[int, ...]] = [(head,)] if store is None else [(head, i) for i in range(store.size)]
        self.memories = [Memory(state, head, place, rule, eps, slot) for place in places]

    def begin_segment(self) -> None:
        for memory in self.memories:
            memory.begin_segment()

    def write(self, key: Tensor, sigma_k: Tensor, v: Tensor, gates: Gates, gated: bool, written: int) -> None:
        """``key`` is the key itself, ``written`` the number of pairs before it."""
        target = self._target(key, written)
        for i, memory in enumerate(self.memories):
            if i == target:
                memory.write(sigma_k, v, gates, gated)
            else:
                memory.forget(gates.alpha)

    def _target(self, key: Tensor, written: int) -> int:
        segment = written // self.segment_size
        if self.store is None:
            return 0
        if isinstance(self.store, Routed):
            return max(range(self.store.size), key=lambda i: float(torch.dot(key.detach(), self._basis(i)).abs()))
        if isinstance(self.store, Banks):
            return segment // self.store.segments_per_bank % self.store.size
        return segment % self.store.size

    def _basis(self, i: int) -> Tensor:
        assert isinstance(self.store, Routed)
        return self.store.basis[i].double()

    def read(
        self, query: Tensor, sigma_q: Tensor, null: Tensor, said: Tensor | None, expand: Tensor, written: int
    ) -> Tensor:
        """``query`` is the query itself, ``written`` the number of pairs so far."""
        reads = [memory.read(sigma_q, null, said) for memory in self.memories]
        if self.store is None:
            return reads[0]
        if isinstance(self.store, Routed):
            return self._read_routed(query, sigma_q, reads)
        if isinstance(self.store, Banks):
            if self.memories[0].z is None:
                return torch.stack(reads).sum(0)
            span = self.segment_size * self.store.segments_per_bank
            begun = reads[: -(-written // span)]
            return torch.stack(begun).mean(0) if begun else 0 * reads[0]
        relevance = torch.stack([torch.dot(memory.z, sigma_q) for memory in self.memories])  # type: ignore[arg-type]
        fine = sum(share * read for share, read in zip(relevance.softmax(0), reads, strict=True))
        if isinstance(self.store, Hierarchical):
            return expand * fine + (1 - expand) * self._read_sum(sigma_q)
        return fine  # type: ignore[return-value]

    def _read_routed(self, query: Tensor, sigma_q: Tensor, reads: list[Tensor]) -> Tensor:
        assert isinstance(self.store, Routed)
        if not self.store.routing:
            return self._read_sum(sigma_q)
        scores = torch.stack([torch.dot(query, self._basis(i)).abs() for i in range(self.store.size)])
        selected = scores.argsort(descending=True)[: self.store.top_k_memories]
        shares = scores[selected].softmax(0)
        return sum(share * reads[i] for share, i in zip(shares, selected.tolist(), strict=True))  # type: ignore[return-value]

    def _read_sum(self, sigma_q: Tensor) -> Tensor:
        M = torch.stack([memory.M for memory in self.memories]).sum(0)
        z = torch.stack([memory.z for memory in self.memories]).sum(0)  # type: ignore[misc]
        return M @ sigma_q / (z @ sigma_q).clamp(min=self.eps)

    @staticmethod
    def join(stores: list[HeadMemories], written: Tensor, pending: Pending | None) -> MemoryState:
        """The heads' memories as one state."""

        def stack(name: str) -> Tensor | None:
            heads = [[getattr(memory, name) for memory in store.memories] for store in stores]
            if heads[0][0] is None:
                return None
            return torch.stack([torch.stack(parts) if stores[0].store else parts[0] for parts in heads])

        M, z, K = stack("M"), stack("z"), stack("K")
        slots = None if K is None else Slots(*map(stack, Slots._fields))  # type: ignore[arg-type]
        segment, name = (stack("M_segment"), stack("z_segment")), stores[0].store and stores[0].store.name
        return MemoryState(M, z, *segment, written, pending, slots, name)  # type: ignore[arg-type]
