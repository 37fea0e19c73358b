"""A decoder layer in bfloat16 on a CPU, without gradients: the same arithmetic in fewer passes and fewer roundings.

Shapes as in ``decoder.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from senri.layers import is_plain, packs

if TYPE_CHECKING:
    from senri.hf.cache import LayerState
    from senri.hf.decoder import AttentionPlan, SenriDecoderLayer


def can_fuse(layer: SenriDecoderLayer, hidden: Tensor) -> bool:
    """Whether :func:`fused` computes this layer: plain projections (no LoRA), no memory that reads into it."""
    if layer.hidden_act != "silu" or (layer.training and layer.self_attn.dropout):
        return False
    if layer.memory is not None and layer.memory.readout != "head":
        return False
    if not is_plain(*_attention(layer), *_mlp(layer)):
        return False
    if any(x._forward_hooks or x._forward_pre_hooks for x in (layer.self_attn, layer.mlp)):  # not called as modules
        return False
    trained = torch.is_grad_enabled() and any(
        p.requires_grad for name, p in layer.named_parameters() if not name.startswith("memory.")
    )
    return not trained and packs(hidden)


def fused(
    layer: SenriDecoderLayer, hidden: Tensor, state: LayerState, plan: AttentionPlan
) -> tuple[Tensor, Tensor, LayerState]:
    """``hidden`` ``[B, T, hidden]`` -> the layer's output, its normalised input, and the state with the new window."""
    if torch.is_autocast_enabled("cpu"):  # all is bfloat16 here: it would only round what is meant to be float32
        with torch.autocast("cpu", enabled=False):
            return fused(layer, hidden, state, plan)
    q_proj, k_proj, v_proj, o_proj = _attention(layer)
    gate_proj, up_proj, down_proj = _mlp(layer)
    attention, packed = layer.self_attn, layer.packed
    normed = layer.input_layernorm(hidden)
    raw = packed.get("qkv", q_proj, k_proj, v_proj)(normed).unflatten(-1, (-1, attention.head_dim))
    num_keys = k_proj.out_features // attention.head_dim
    turned = rotated(raw[:, :, :-num_keys], *plan.rotary)
    raw_q, raw_k, v = raw.transpose(1, 2).split([raw.shape[2] - 2 * num_keys, num_keys, num_keys], 1)
    q, k = turned.transpose(1, 2).split([raw_q.shape[1], num_keys], 1)
    read, state = attention.attend(q, k, v, raw_q, raw_k, state, plan)
    hidden = packed.get("o", o_proj).plus(read.reshape(*hidden.shape[:2], -1), hidden)
    inner = layer.post_attention_layernorm(hidden)
    gate = packed.get("gate", gate_proj).silu(inner)
    inner = packed.get("up", up_proj).times(inner, gate)
    return packed.get("down", down_proj).plus(inner, hidden), normed, state


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: heads ``x`` ``[B, T, H, D]``, ``cos`` and ``sin`` ``[B, T, D]`` as transformers has them."""
    half, cos, sin = x.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _attention(layer: SenriDecoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _mlp(layer: SenriDecoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
