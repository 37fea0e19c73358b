"""A decoder layer on a CPU, without gradients: the same arithmetic in fewer passes and fewer roundings.

Shapes as in ``decoder.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.layers import (
    FEW,
    OFF_LEVEL,
    FrozenLinear,
    Int4Linear,
    PackedLinear,
    PlainLinear,
    fuses,
    is_plain,
)

if TYPE_CHECKING:
    from senri.hf.cache import LayerState
    from senri.hf.decoder import AttentionPlan, SenriDecoderLayer


def can_fuse(layer: SenriDecoderLayer, hidden: Tensor, plan: AttentionPlan) -> bool:
    """Whether :func:`fused` computes this layer: plain projections (no LoRA), no memory that reads into it.

    In float32 not for a prompt inside the window, which keeps the base's own operations, and so its bits.
    """
    block = plan.window[0]
    inside = block.mask is None and block.last - block.first == hidden.shape[1]
    return not (hidden.dtype == torch.float32 and inside) and _fusable(layer, hidden)


def _fusable(layer: SenriDecoderLayer, hidden: Tensor) -> bool:
    if layer.hidden_act != "silu" or (layer.training and layer.self_attn.dropout):
        return False
    if layer.memory is not None and layer.memory.readout != "head":
        return False
    if not is_plain(*projections(layer)):
        return False
    if any(x._forward_hooks or x._forward_pre_hooks for x in (layer.self_attn, layer.mlp)):  # not called as modules
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
    weights = _four_bits(layer, hidden)
    if weights is not None:
        return _in_int4(layer, weights, hidden, state, plan)
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


def in_four_bits(layer: SenriDecoderLayer, hidden: Tensor) -> Int4Layer | None:
    """The four-bit weights that the layer takes for the few tokens of ``hidden`` behind others; None: full ones."""
    return _four_bits(layer, hidden) if _fusable(layer, hidden) else None


def _four_bits(layer: SenriDecoderLayer, hidden: Tensor) -> Int4Layer | None:
    """:func:`in_four_bits` of a layer that can be fused.

    ``auto`` takes them where nothing is lost, and where they were seen to be faster: beside float32, not beside a
    processor's bfloat16 products.
    """
    wanted, few = layer.decoding_weights, hidden.shape[0] * hidden.shape[1] <= FEW
    if not few or wanted == "full" or (wanted == "auto" and hidden.dtype != torch.float32):
        return None
    make = Int4Layer.of if wanted == "int4" else Int4Layer.lossless
    return layer.packed.get(wanted, *projections(layer), make=make)


class Int4Layer(NamedTuple):
    """The products with weights of one layer, in four bits."""

    qkv: Int4Linear
    o: Int4Linear
    gate_up: Int4Linear
    down: Int4Linear

    @classmethod
    def of(cls, *layers: nn.Linear) -> Int4Layer | None:
        """Of q, k, v, o, gate, up, down; None: shapes that the kernel does not know."""
        if not Int4Linear.takes(*layers):
            return None
        q, k, v, o, gate, up, down = layers
        return cls(Int4Linear(q, k, v), Int4Linear(o), Int4Linear(gate, up), Int4Linear(down))

    @classmethod
    def lossless(cls, *layers: nn.Linear) -> Int4Layer | None:
        """As :meth:`of`; None also where the weights did not come from such levels, but for rounding."""
        form = cls.of(*layers)
        return form if form is not None and all(part.off_level <= OFF_LEVEL for part in form) else None


def _in_int4(
    layer: SenriDecoderLayer, weights: Int4Layer, hidden: Tensor, state: LayerState, plan: AttentionPlan
) -> tuple[Tensor, Tensor, LayerState]:
    """:func:`fused` with weights in four bits; hidden states, norms and attention keep their dtype."""
    normed = _norm(layer.input_layernorm, hidden)
    read, state = _attend(layer, weights.qkv(normed.bfloat16()).to(hidden.dtype), state, plan)
    hidden = weights.o(read.bfloat16()).to(hidden.dtype).add_(hidden)
    inner = _norm(layer.post_attention_layernorm, hidden).bfloat16()
    gate, up = weights.gate_up(inner).chunk(2, -1)
    return weights.down(F.silu(gate).mul_(up)).to(hidden.dtype).add_(hidden), normed, state


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


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """What the layer's RMSNorm gives, in fewer operations."""
    if norm._forward_hooks or norm._forward_pre_hooks or x.dtype != torch.float32:
        return norm(x)
    scale = x.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()  # type: ignore[arg-type]
    return (x * scale).mul_(norm.weight)  # type: ignore[arg-type]


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
    parts = layer.self_attn._modules  # nn.Module's own lookup costs a tenth of a token's time
    return parts["q_proj"], parts["k_proj"], parts["v_proj"], parts["o_proj"]  # type: ignore[return-value]


def _mlp(layer: SenriDecoderLayer) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    parts = layer.mlp._modules
    return parts["gate_proj"], parts["up_proj"], parts["down_proj"]  # type: ignore[return-value]
