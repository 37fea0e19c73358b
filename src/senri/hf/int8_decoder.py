"""Decoding by :class:`senri.layers.int8_step.Int8Layers`: when it may be, and the model's state before and after."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from senri.hf.decoder import SenriDecoderLayer
from senri.hf.fused_layer import fusable, projections
from senri.layers import fuses, is_bare, reserve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from senri.hf.cache import LayerState
    from senri.hf.configuration_senri import SenriConfig
    from senri.hf.decoder import AttentionPlan
    from senri.hf.model import SenriModel
    from senri.layers.int8_step import Int8Layers, Int8Linear

MOST_ROWS = 4  # up to which single tokens are faster in eight bits
# Error of weights that were made of such levels and rounded to bfloat16: 0.0014 (the base that ships) to 0.0029. Others
# have 0.0034 (uniform) and more.
LOSSLESS = 3e-3


def int8_layers(model: SenriModel, hidden: Tensor) -> Int8Layers | None:
    """The layers in eight bits, if ``hidden`` ``[B, 1, hidden]`` behind others may go through them; None: it may not.

    They are made when first asked for, and anew when weights have changed.
    """
    wanted = model.config.decoding_weights
    if wanted == "full" or not is_next(hidden):
        return None
    layers = cast("list[SenriDecoderLayer]", list(model.layers))
    if not all(_is_llamas(layer, hidden) for layer in layers):
        return None
    modules = [m for layer in layers for m in (*projections(layer), *_norms(layer))]
    return model.packed.get(wanted, *modules, make=lambda *_: _made(layers, model.config, wanted))


def is_next(hidden: Tensor) -> bool:
    """Whether ``hidden`` is one token a row of a few, on a CPU, without gradients, in a dtype that it is fast in."""
    few = hidden.shape[1] == 1 and len(hidden) <= MOST_ROWS
    return few and not torch.is_grad_enabled() and fuses(hidden)


def int8_head(head: nn.Linear, wanted: str) -> Int8Linear | None:
    """A language-model head in eight bits; None: it stays as it is."""
    int8 = _int8_step()
    form = int8.Int8Linear(head) if int8.Int8Linear.takes(head) else None
    return form if form is not None and (wanted == "int8" or form.error <= LOSSLESS) else None


def next_token(
    layers: Int8Layers, hidden: Tensor, states: Sequence[LayerState], plan: AttentionPlan, window: int
) -> tuple[Tensor, Tensor, list[LayerState]] | None:
    """``hidden`` ``[B, 1, hidden]`` through ``layers``.

    Returns:
        their output, each one's normalised input ``[L, B, 1, hidden]`` and the states with the new windows; None where
        a row's token is a sink or does not see all that its window holds, or the state is of another dtype or device.
    """
    block = plan.window[0]
    if plan.new_sinks is not None or block.mask is not None or not states[0].keys.shape[2]:
        return None
    if any(x.dtype != hidden.dtype or x.device != hidden.device for state in states for x in state[:4]):
        return None
    keys, kept_keys = zip(*(reserve(state.keys, 1, window - 1) for state in states), strict=True)
    values, kept_values = zip(*(reserve(state.values, 1, window - 1) for state in states), strict=True)
    sinks = [(s.sink_keys.contiguous(), s.sink_values.contiguous()) for s in states] if block.sinks else None
    out, normed = layers(hidden, plan.rotary, list(zip(keys, values, strict=True)), sinks)
    new = [state._replace(keys=k, values=v) for state, k, v in zip(states, kept_keys, kept_values, strict=True)]
    return out, normed, new


def _is_llamas(layer: SenriDecoderLayer, hidden: Tensor) -> bool:
    """Whether a layer over ``hidden`` computes what Llama's does, on a CPU, and nobody wants its parts to be called."""
    if type(layer) is not SenriDecoderLayer or not fusable(layer, hidden):
        return False
    norms = _norms(layer)
    weight = cast(Tensor, projections(layer)[0]._parameters["weight"])
    return weight.device.type == "cpu" and is_bare(layer, *norms) and all(type(x) is LlamaRMSNorm for x in norms)


def _made(layers: Sequence[SenriDecoderLayer], config: SenriConfig, wanted: str) -> Int8Layers | None:
    """None: shapes that cannot be, or weights that would lose something where that is not wanted."""
    int8, shapes = _int8_step(), [[x.weight.shape for x in projections(layer)] for layer in layers]
    if config.head_dim % int8.GROUP or not int8.Int8Linear.takes(*projections(layers[0])):
        return None
    if any(shape != shapes[0] for shape in shapes):
        return None
    made = []
    for layer in layers:
        q, k, v, o, gate, up, down = projections(layer)
        before, after = (cast(Tensor, norm.weight).detach().float().contiguous() for norm in _norms(layer))
        products = (int8.Int8Linear(*part) for part in ((q, k, v), (o,), (gate, up), (down,)))
        made.append(int8.Int8Layer(*products, (before, after)))
        if wanted == "auto" and not made[-1].error <= LOSSLESS:
            return None
    return int8.Int8Layers(made, config.rms_norm_eps)


def _int8_step() -> ModuleType:
    """numba takes a second to import, and reading needs none."""
    if "numba" not in sys.modules:  # of a thread too many even an idle one is waited for, five times a layer
        os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
    from senri.layers import int8_step

    return int8_step


def _norms(layer: SenriDecoderLayer) -> tuple[nn.Module, nn.Module]:
    parts = layer._modules
    return parts["input_layernorm"], parts["post_attention_layernorm"]  # type: ignore[return-value]
