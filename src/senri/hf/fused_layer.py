"""A decoder layer on a CPU, without gradients: the same arithmetic in fewer passes and fewer roundings.

Shapes as in ``decoder.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from senri.layers import FrozenLinear, PackedLinear, PlainLinear, fuses, is_bare, is_plain

if TYPE_CHECKING:
    from senri.hf.cache import LayerState
    from senri.hf.decoder import AttentionPlan, SenriDecoderLayer


def can_fuse(layer: SenriDecoderLayer, hidden: Tensor, plan: AttentionPlan) -> bool:
    """Whether :func:`fused` computes this layer: plain projections (no LoRA), no memory that reads into it.

    In float32 not for a prompt inside the window, which keeps the base's own operations, and so its bits.
    """
    block = plan.window[0]
    inside = block.mask is None and block.last - block.first == hidden.shape[1]
    return not (hidden.dtype == torch.float32 and inside) and fusable(layer, hidden)


def fusable(layer: SenriDecoderLayer, hidden: Tensor) -> bool:
    """Whether a layer over ``hidden`` is its products with weights and what Llama does between them, and may be that
    alone: nobody listens to its parts, or wants gradients.
    """
    if layer.hidden_act != "silu" or (layer.training and layer.self_attn.dropout):
        return False
    if layer.memory is not None and layer.memory.readout != "head":
        return False
    parts = (layer._modules["self_attn"], layer._modules["mlp"])  # not called as modules
    if not is_bare(*parts) or not is_plain(*projections(layer)):  # type: ignore[arg-type]
        return False
    trained = torch.is_grad_enabled() and any(
        p.requires_grad for name, p in layer.named_parameters() if not name.startswith("memory.")
    )
    return not trained and fuses(hidden)


def fused(
    layer: SenriDecoderLayer, hidden: Tensor, state: LayerState, plan: AttentionPlan
) -> tuple[Tensor, Tensor, LayerState]:
    """``hidden`` ``[B, T, hidden]`` -> the layer's output, its normalised input, and the state with the new window."""
    if torch.is_autocast_enabled("cpu"):  # all is bfloat16 here: it would only round what is meant to be float32
        with torch.autocast("cpu", enabled=False):
            return fused(layer, hidden, state, plan)
    q_proj, k_proj, v_proj, o_proj = _attention(layer)
    gate_proj, up_proj, down_proj = _mlp(layer)

    def form(name: str, *layers: nn.Linear) -> FrozenLinear:
        if hidden.dtype == torch.float32:
            return PlainLinear(*layers)
        return layer.packed.get(name, *layers, make=PackedLinear)

    normed = layer.input_layernorm(hidden)
    read, state = _attend(layer, form("qkv", q_proj, k_proj, v_proj)(normed), state, plan)
    hidden = form("o", o_proj).plus(read, hidden)
    inner = layer.post_attention_layernorm(hidden)
    gate = form("gate", gate_proj).silu(inner)
    inner = form("up", up_proj).times(inner, gate)
    return form("down", down_proj).plus(inner, hidden), normed, state


def _attend(layer: SenriDecoderLayer, raw: Tensor, state: LayerState, plan: AttentionPlan) -> tuple[Tensor, LayerState]:
    """Queries, keys and values ``[B, T, sum of widths]`` before their rotation -> the read ``[B, T, H * D]``."""
    attention = layer.self_attn
    raw = raw.unflatten(-1, (-1, attention.head_dim))
    num_keys = attention.k_proj.out_features // attention.head_dim
    turned = rotated(raw[:, :, :-num_keys], *plan.rotary)
    raw_q, raw_k, v = raw.transpose(1, 2).split([raw.shape[2] - 2 * num_keys, num_keys, num_keys], 1)
    q, k = turned.transpose(1, 2).split([raw_q.shape[1], num_keys], 1)
    read, state = attention.attend(q, k, v, raw_q, raw_k, state, plan)
    return read.flatten(2), state


def projections(layer: SenriDecoderLayer) -> tuple[nn.Linear, ...]:
    """A layer's products with weights: q, k, v, o, gate, up, down."""
    return *_attention(layer), *_mlp(layer)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: heads ``x`` ``[B, T, H, D]``, ``cos`` and ``sin`` ``[B, T, D]`` as transformers has them."""
    half, cos, sin = x.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _attention(layer: SenriDecoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    parts = layer._modules["self_attn"]._modules  # type: ignore[union-attr]  # nn.Module's own lookup costs a token's tenth
    return parts["q_proj"], parts["k_proj"], parts["v_proj"], parts["o_proj"]  # type: ignore[return-value]


def _mlp(layer: SenriDecoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    parts = layer._modules["mlp"]._modules  # type: ignore[union-attr]
    return parts["gate_proj"], parts["up_proj"], parts["down_proj"]  # type: ignore[return-value]
