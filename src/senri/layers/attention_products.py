"""Window attention by plain matrix products, which a CPU does faster than PyTorch's fused kernel.

The kernel makes no use of a CPU's bfloat16 products, which are several times as fast, and half of its float32 ones.
Here a block of queries is two products for each key head, with the softmax in place between them; backward, where the
weights are made again, five. Scores are rounded to the inputs' dtype, as in transformers' eager attention. No batched
products: they would copy what is cut out of a tensor.

Shapes as in ``sliding_window.py``; ``N = B * Hkv`` rows, each of ``T * G`` queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.layers.sinks import Sinks


class Block(NamedTuple):
    """One attention call: queries ``[start, stop)``, keys ``[first, last)``, before them the sinks if any is behind."""

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None  # [B or 1, 1, stop - start, (S +) last - first] bool; None: see is_causal
    is_causal: bool
    sinks: bool  # whether a query of the block sees any
    # Without padding: which of the first and of the last keys are hidden, [stop - start, n] bool; between them none is.
    early: Tensor | None = None
    late: Tensor | None = None


WindowPlan = list[Block]


class _Part(NamedTuple):
    """One block of one row."""

    row: int
    queries: slice  # of T * G
    keys: slice  # of P + T
    span: slice  # of S + P + T: the sinks, if any is seen, and the keys
    seen: int  # sinks
    weights: Tensor  # [queries, seen + keys], softmax; overwritten by the next one


class _Walk:
    """Goes through the blocks of a call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, scale: float, sinks: Sinks | None) -> None:
        self.batch, self.kv_heads = k.shape[:2]
        self.groups, self.steps, self.plan = q.shape[1] // self.kv_heads, q.shape[2], plan
        self.num_sinks = 0 if sinks is None else sinks.keys.shape[2]
        self.query = self.rows(q * scale)
        self.keys, self.values = (F.pad(x, (0, 0, self.num_sinks, 0)).flatten(0, 1) for x in (k, v))
        if sinks is not None:
            self.full = torch.promote_types(q.dtype, torch.float32)
            self.sink_query = self.rows(sinks.queries * scale).to(self.full)
            self.sink_keys = sinks.keys.flatten(0, 1).to(self.full)
            self.sink_values = sinks.values.flatten(0, 1).to(v.dtype)
            self.sink_scores = self.sink_query @ self.sink_keys.mT

    def rows(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[N, T * G, D]``."""
        x = x.unflatten(1, (self.kv_heads, self.groups)).transpose(2, 3)
        return x.reshape(self.batch * self.kv_heads, self.steps * self.groups, -1)

    def heads(self, x: Tensor) -> Tensor:
        """Back again."""
        x = x.view(self.batch, self.kv_heads, self.steps, self.groups, -1)
        return x.transpose(2, 3).flatten(1, 2)

    def room(self) -> Tensor:
        """For the weights of any block."""
        sizes = [(b.stop - b.start) * (self.num_sinks + b.last - b.first) for b in self.plan]
        return self.query.new_empty(self.groups * max(sizes))

    def __iter__(self) -> Iterator[_Part]:
        room, groups = self.room(), self.groups
        sizes = [(block.stop - block.start) * groups for block in self.plan]
        query = [row.split(sizes) for row in self.query.unbind()]
        sinks = [row.split(sizes) for row in self._seen_sinks().unbind()] if self.num_sinks else []
        for number, (block, count) in enumerate(zip(self.plan, sizes, strict=True)):
            queries = slice(block.start * groups, block.stop * groups)
            seen = self.num_sinks if block.sinks else 0
            # where a sink goes stands a key that left the window of this block's queries, and of all later ones
            span = slice(self.num_sinks - seen + block.first, self.num_sinks + block.last)
            weights = room[: count * (span.stop - span.start)].view(count, -1)
            early, late = (self._bias(hidden) for hidden in (block.early, block.late))
            first = weights[:, seen : seen + early.shape[1]]
            last = weights[:, weights.shape[1] - late.shape[1] :]
            keys = self.keys[:, span].mT
            for row in range(len(query)):
                torch.mm(query[row][number], keys[row], out=weights)
                first += early
                last += late
                if seen:
                    weights[:, :seen] = sinks[row][number]
                    self.values[row, span.start : span.start + seen] = self.sink_values[row]
                torch.softmax(weights, -1, out=weights)
                yield _Part(row, queries, slice(block.first, block.last), span, seen, weights)

    def _bias(self, hidden: Tensor | None) -> Tensor:
        """``[T', n]`` bool -> what is added to the scores of each query of the group, ``[T' * G, n]``."""
        assert hidden is not None
        bias = self.query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return bias.repeat_interleave(self.groups, 0)

    def _seen_sinks(self) -> Tensor:
        """The sinks' scores ``[N, T * G, S]``, -inf where one is not seen."""
        behind = [
            block.mask[:, 0, :, : self.num_sinks]
            if block.sinks and block.mask is not None
            else torch.zeros(1, block.stop - block.start, self.num_sinks, dtype=torch.bool)
            for block in self.plan
        ]
        seen = torch.cat([x.expand(self.batch, -1, -1) for x in behind], 1)
        if seen.all():
            return self.sink_scores
        seen = seen[:, None, :, None].expand(-1, self.kv_heads, -1, self.groups, -1)
        return self.sink_scores.masked_fill(~seen.reshape(self.sink_scores.shape), -torch.inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, scale: float, *sinks: Tensor) -> Tensor:
        walk = _Walk(q, k, v, plan, scale, Sinks(*sinks) if sinks else None)
        out = torch.empty_like(walk.query)
        for part in walk:
            torch.mm(part.weights, walk.values[part.row, part.span], out=out[part.row, part.queries])
        out = walk.heads(out)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(q, k, v, out, *sinks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, *sinks = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            walk = _Walk(q, k, v, ctx.plan, ctx.scale, Sinks(*sinks) if sinks else None)
            full = torch.promote_types(q.dtype, torch.float32)
            read = walk.rows((grad.to(full) * out.to(full)).sum(-1, keepdim=True))
            grad = walk.rows(grad)
            of_query, room = torch.empty_like(walk.query), walk.room()
            of_keys, of_values = (torch.zeros(x.shape, dtype=full).flatten(0, 1) for x in (k, v))
            if sinks:
                of_sink_query = torch.zeros_like(walk.sink_query)
                of_sink_keys = torch.zeros_like(walk.sink_keys)
                of_sink_values = torch.zeros(walk.sink_values.shape, dtype=full)
            for row, queries, keys, span, seen, weights in walk:
                scores, received = room[: weights.numel()].view_as(weights), grad[row, queries]
                torch.mm(received, walk.values[row, span].mT, out=scores)
                scores.sub_(read[row, queries]).mul_(weights)  # of the scores, before the mask
                of_query[row, queries] = scores[:, seen:] @ walk.keys[row, walk.num_sinks :][keys]
                of_keys[row, keys] += scores[:, seen:].mT @ walk.query[row, queries]
                of_values[row, keys] += weights[:, seen:].mT @ received
                if seen:
                    of_sinks = scores[:, :seen].to(full)
                    of_sink_query[row, queries] = of_sinks @ walk.sink_keys[row]
                    of_sink_keys[row] += of_sinks.mT @ walk.sink_query[row, queries]
                    of_sink_values[row] += weights[:, :seen].to(full).mT @ received.to(full)
            gradients = [walk.heads(of_query) * ctx.scale, of_keys.view_as(k), of_values.view_as(v)]
            if sinks:
                gradients += [walk.heads(of_sink_query) * ctx.scale, of_sink_keys, of_sink_values]
        (*of_inputs,) = (g.view_as(x).to(x.dtype) for g, x in zip(gradients, (q, k, v, *sinks), strict=True))
        return *of_inputs[:3], None, None, *of_inputs[3:]


@torch.autocast("cpu", enabled=False)
def attention_by_products(
    q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, scale: float, sinks: Sinks | None
) -> Tensor:
    """:func:`senri.layers.sliding_window_attention` under a plan without padding, all of whose blocks have masks."""
    used = sinks is not None and any(block.sinks for block in plan)
    return _Attention.apply(q, k, v, plan, scale, *(sinks if used and sinks is not None else ()))
