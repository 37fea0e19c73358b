"""The stream of pairs that a scan writes: delayed, cut into segments and runs, unpacked into documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.memory.state import Pending, Slots


def delay_line(queue: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Push ``new`` ``[B, T, ...]`` into ``queue`` ``[B, W, ...]``: returns the T oldest, and the W newest."""
    both = torch.cat([queue, new], dim=1)
    steps = new.shape[1]
    return both[:, :steps], both[:, steps:]


def delayed(queue: Pending | None, new: Pending, delay: int, documents: Tensor | None) -> tuple[Pending, Pending]:
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


def segments(valid: Tensor, written: Tensor, segment_size: int) -> Tensor:
    """Number of the segment of the pair that was written last, at each step ``[B, T]``; -1 before the first.

    Rows may differ: padding is not counted.
    """
    return (written[:, None] + valid.cumsum(1) - 1) // segment_size


def segment_begins(valid: Tensor, written: Tensor, segment_size: int) -> dict[int, Tensor]:
    """Steps at which some row begins a segment -> which rows ``[B]``. Rows may differ: padding is not counted."""
    index = written[:, None] + valid.cumsum(1) - 1
    begins = valid & (index % segment_size == 0)
    return {int(t): begins[:, t] for t in begins.any(0).nonzero().flatten()}


def runs(beta: Tensor, stream: Pending, slots: Slots) -> tuple[Tensor, Slots]:
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


def unpack_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, L]`` token index of each document, right-padded with its last token, and which entries are real."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    steps = torch.arange(int((ends - starts).max()), device=cu_seqlens.device)
    index = starts[:, None] + steps
    return torch.minimum(index, ends[:, None] - 1), index < ends[:, None]
