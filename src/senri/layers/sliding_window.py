"""Exact attention over the last W tokens, in blocks of queries so that memory stays flat in the length.

Shapes: ``B`` batch, ``H`` query heads, ``Hkv`` key heads, ``G = H / Hkv``, ``T`` new tokens, ``P`` past tokens (at most
W - 1), ``S`` sinks, ``D`` head width. Query ``t`` attends to keys ``(t - W, t]``, and to the sinks behind them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.layers.attention_products import Block, WindowPlan, attention_by_products
from senri.layers.packed_linear import has_products, wants_gradients
from senri.layers.sinks import Sinks, join, with_scores

# Queries of one attention call, speed knobs on a CPU: the fused kernel at W = 1024 is 1.45x as fast as with 1024, the
# products of ``attention_products.py`` do best while a block's scores stay in the processor's cache.
BLOCK, PRODUCTS_BLOCK = 256, 128


def window_plan(
    steps: int,
    past: int,
    window: int,
    valid: Tensor | None,
    device: torch.device,
    behind: Tensor | None = None,
    block_size: int = BLOCK,
) -> WindowPlan:
    """Blocks and masks of one forward call; the same for all layers.

    Args:
        steps: new tokens T.
        past: cached keys P.
        window: W.
        valid: ``[B, P + T]`` bool, False where padded; None: no padding, which keeps the mask-free kernels.
        device: where the masks live.
        behind: ``[B, T, S]`` bool, which sinks have left each query's window; None: none of any query's.
        block_size: queries of a block: speed, never the result.
    """
    plain = valid is None and past + steps <= window and (past == 0 or steps == 1)
    if plain and (behind is None or behind.all()):
        # The plain causal kernels, so that a text inside the window gives the pretrained model's bits.
        return [Block(0, steps, 0, past + steps, None, is_causal=steps > 1, sinks=behind is not None)]
    plan = []
    for start in range(0, steps, block_size):
        stop = min(start + block_size, steps)
        first, last = max(0, past + start - window + 1), past + stop
        query = torch.arange(past + start, past + stop, device=device)[:, None]
        key = torch.arange(first, last, device=device)[None]
        seen = (key <= query) & (key > query - window)
        early, late = None, None
        if valid is None:
            edge = min(stop - start, last - first)
            early, late = ~seen[:, :edge], ~seen[:, last - first - edge :]
        mask = seen[None, None]
        if valid is not None:
            # padded queries still see themselves: a row without any key would give NaN
            mask = mask & valid[:, None, None, first:last] | (key == query)
        sinks = behind[:, None, start:stop] if behind is not None else None
        if sinks is not None and not sinks.any():
            sinks = None
        if sinks is not None:
            mask = torch.cat([sinks, mask.expand(len(sinks), -1, -1, -1)], -1)
        plan.append(Block(start, stop, first, last, mask, False, sinks is not None, early, late))
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
    dtype = products_dtype(q)
    if dtype is not None and not dropout and plan:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # as autocast would
        if plan[0].early is not None:
            return attention_by_products(q, k, v, plan, scale, sinks)
        if q.shape[2] == 1 and plan[0].mask is None and not wants_gradients(q, k, v, *(sinks or ())):
            return _one_query(q, k, v, scale, sinks if plan[0].sinks else None)
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


def best_block_size(x: Tensor, *, padded: bool) -> int:
    """Queries of a block that attention of tensors like ``x`` is fastest with."""
    return BLOCK if padded or products_dtype(x) is None else PRODUCTS_BLOCK


def products_dtype(x: Tensor) -> torch.dtype | None:
    """In what dtype attention of tensors like ``x`` without padding goes by products; None: by PyTorch's kernel.

    In float32 only without gradients: with them PyTorch's kernel is as fast.
    """
    if x.device.type != "cpu":
        return None
    autocast = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if dtype == torch.bfloat16 and has_products():
        return dtype
    return dtype if dtype == torch.float32 and not wants_gradients(x) else None


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Sinks | None) -> Tensor:
    """:func:`sliding_window_attention` where there is one new token, which sees all keys and ``sinks``."""
    shape = len(k) * k.shape[1], -1, k.shape[-1]  # [B, H, 1, D] -> [B * Hkv, G, D]
    values = v.reshape(shape)
    scores = torch.bmm((q * scale).reshape(shape), k.reshape(shape).mT)
    if sinks is None:
        return torch.bmm(scores.softmax(-1), values).view_as(q)
    count = sinks.keys.shape[2]
    behind = torch.bmm((sinks.queries * scale).reshape(shape), sinks.keys.reshape(shape).mT)
    weights = torch.cat([behind, scores], -1).softmax(-1)
    read = torch.bmm(weights[..., count:], values)
    if count == 1:
        return read.addcmul_(weights[..., :1], sinks.values.reshape(shape)).view_as(q)
    return torch.baddbmm(read, weights[..., :count], sinks.values.reshape(shape)).view_as(q)
