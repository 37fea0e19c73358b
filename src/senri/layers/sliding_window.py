"""Exact attention over the last W tokens, in blocks of queries so that memory stays flat in the length.

Shapes: ``B`` batch, ``H`` query heads, ``Hkv`` key heads, ``T`` new tokens, ``P`` past tokens (at most W - 1),
``S`` sinks, ``D`` head width. Query ``t`` attends to keys ``(t - W, t]``, and to the sinks behind them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.layers.sinks import Sinks, join, with_scores

BLOCK = 256  # queries of one attention call; a speed knob: 1.45x faster than 1024 at W = 1024 on a CPU


class Block(NamedTuple):
    """One attention call: queries ``[start, stop)``, keys ``[first, last)``, before them the sinks if any is behind."""

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None  # [B or 1, 1, stop - start, (S +) last - first] bool; None: see is_causal
    is_causal: bool
    sinks: bool  # whether a query of the block sees any


WindowPlan = list[Block]


def window_plan(
    steps: int, past: int, window: int, valid: Tensor | None, device: torch.device, behind: Tensor | None = None
) -> WindowPlan:
    """Blocks and masks of one forward call; the same for all layers.

    Args:
        steps: new tokens T.
        past: cached keys P.
        window: W.
        valid: ``[B, P + T]`` bool, False where padded; None: no padding, which keeps the mask-free kernels.
        device: where the masks live.
        behind: ``[B, T, S]`` bool, which sinks have left each query's window; None: none of any query's.
    """
    plain = valid is None and past + steps <= window and (past == 0 or steps == 1)
    if plain and (behind is None or behind.all()):
        # The plain causal kernels, so that a text inside the window gives the pretrained model's bits.
        return [Block(0, steps, 0, past + steps, None, is_causal=steps > 1, sinks=behind is not None)]
    plan = []
    for start in range(0, steps, BLOCK):
        stop = min(start + BLOCK, steps)
        first, last = max(0, past + start - window + 1), past + stop
        query = torch.arange(past + start, past + stop, device=device)[:, None]
        key = torch.arange(first, last, device=device)[None]
        mask = ((key <= query) & (key > query - window))[None, None]
        if valid is not None:
            # padded queries still see themselves: a row without any key would give NaN
            mask = mask & valid[:, None, None, first:last] | (key == query)
        sinks = behind[:, None, start:stop] if behind is not None else None
        if sinks is not None and not sinks.any():
            sinks = None
        if sinks is not None:
            mask = torch.cat([sinks, mask.expand(len(sinks), -1, -1, -1)], -1)
        plan.append(Block(start, stop, first, last, mask, is_causal=False, sinks=sinks is not None))
    return plan


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: WindowPlan,
    *,
    scale: float,
    dropout: float = 0.0,
    sinks: Sinks | None = None,
) -> Tensor:
    """Softmax attention under ``plan``.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, Hkv, P + T, D]``; v likewise.
        sinks: needed where the plan has a block with sinks.

    Returns:
        ``[B, H, T, D]``.
    """
    heads, head_dim, groups = *q.shape[1::2], q.shape[1] // k.shape[1]
    wide = with_scores(q, sinks) if sinks is not None and any(block.sinks for block in plan) else q
    outputs = []
    for block in plan:
        query = q[:, :, block.start : block.stop]
        key, value = k[:, :, block.first : block.last], v[:, :, block.first : block.last]
        if block.sinks and sinks is not None:
            query = wide[:, :, block.start : block.stop]
            key, value = join(key, value, sinks, width=wide.shape[-1])
        mask = block.mask
        if mask is not None and groups > 1:
            # enable_gqa with a mask falls back to an unfused kernel: the heads of a group become one head's queries
            query = query.unflatten(1, (-1, groups)).flatten(2, 3)
            mask = mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=block.is_causal,
            scale=scale,
            enable_gqa=mask is None and groups > 1,
        )
        outputs.append(out[..., :head_dim].reshape(len(q), heads, -1, head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
