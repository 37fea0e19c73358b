"""One token through all decoder layers on a CPU, in one compiled call, with the weights in eight bits.

A single token's time is that of reading the weights, and of what lies between the products: in PyTorch some thirty
calls a layer, most of which take longer to begin than to do. Here numba compiles them (``int8_kernels.py``); its
threads meet five times a layer. All arithmetic is float32, of a bfloat16 model, too; the weights are the nearest of 256
levels a group (:class:`Int8Linear`).

Shapes: ``L`` layers, ``B`` rows, ``C`` hidden size, ``H`` query heads, ``Hkv`` key heads, ``D`` head width, ``P`` past
tokens, ``S`` sinks, ``R`` rows of a weight, ``N`` groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from senri.layers import int8_kernels
from senri.layers.int8_kernels import BLOCK, GROUP, TINY

ROWS = 512  # that are rounded at a time: what is needed meanwhile is eight times as large


class Int8Linear:
    """One or several linear layers of the same input with weights in eight bits, 32 of a row to a scale and an offset.

    Levels are spread evenly: from the least to the greatest weight of a group, or to both sides of zero, whichever is
    nearer. So weights that were made of GGUF's Q4_1 or Q8_0 fall on their own levels again.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        outer, inner = sum(layer.out_features for layer in layers), layers[0].in_features
        self.blocks = torch.empty(outer, inner // GROUP, BLOCK, dtype=torch.uint8)  # [R, N, 32 + 8]
        # length of what is lost of a layer, as a share of its weights': the greatest one
        self.error, done = 0.0, 0
        for layer in layers:
            lost = 0.0
            for rows in layer.weight.detach().split(ROWS):
                self.blocks[done : done + len(rows)], square = _blocks(rows)
                lost, done = lost + square, done + len(rows)
            self.error = max(self.error, math.sqrt(lost) / max(_length(layer.weight), TINY))
        self.bias = torch.cat([x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in layers])
        self.bias = self.bias.detach().float()
        self.addresses = self.blocks.data_ptr(), self.bias.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weights."""
        return self.blocks.nbytes

    @staticmethod
    def takes(*layers: nn.Linear) -> bool:
        """Whether the weights can be cut into groups."""
        return all(x.in_features % GROUP == 0 for x in layers)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` -> ``[..., sum of out]`` of the same dtype, on a CPU, without a gradient."""
        _set_threads()
        whole, out = x.float().contiguous(), x.new_empty(*x.shape[:-1], len(self.bias), dtype=torch.float32)
        int8_kernels.linear(
            self.addresses, whole.data_ptr(), out.data_ptr(), out[..., 0].numel(), x.shape[-1], out.shape[-1]
        )
        return out.to(x.dtype)


def _blocks(rows: Tensor) -> tuple[Tensor, float]:
    """Of weights ``[R, in]`` each group's levels, its scale and its offset, in the order in which they are read: ``[R,
    N, 40]`` bytes; and the square of what is lost.
    """
    groups = rows.float().unflatten(1, (-1, GROUP))
    low, high, most = groups.amin(-1), groups.amax(-1), groups.abs().amax(-1)
    spread = _on_levels(groups, low, (high - low) / 255)
    around_zero = _on_levels(groups, -128 * most / 127, most / 127)
    nearer = around_zero[1] < spread[1]
    blocks = torch.where(nearer[..., None], around_zero[0], spread[0])
    return blocks, torch.where(nearer, around_zero[1], spread[1]).sum().item()


def _on_levels(groups: Tensor, low: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks ``[R, N, 40]`` on the nearest levels, and the square of what each loses ``[R, N]``."""
    scale = scale.clamp(min=TINY)
    levels = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 255)
    numbers = torch.stack([scale, low], -1).view(torch.uint8)
    blocks = torch.cat([levels.to(torch.uint8), numbers], -1)
    return blocks, levels.mul_(scale[..., None]).add_(low[..., None]).sub_(groups).square_().sum(-1)


def _length(weight: Tensor) -> float:
    return torch.linalg.vector_norm(weight.detach(), dtype=torch.float32).item()


class Int8Layer(NamedTuple):
    """What is constant of a Llama layer (silu): its products with weights, and the weights of its two RMSNorms."""

    qkv: Int8Linear
    o: Int8Linear
    gate_up: Int8Linear
    down: Int8Linear
    norms: tuple[Tensor, Tensor]  # [C] float32, contiguous

    @property
    def error(self) -> float:
        """The greatest one of the products'."""
        return max(x.error for x in self[:4])

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads of the weights of the products."""
        return sum(x.nbytes for x in self[:4])


class Int8Layers:
    """Llama layers one after the other, for one new token a row at a time, without gradients.

    Args:
        layers: of equal shapes; the width of a head is a multiple of 32.
        epsilon: of the RMSNorms.
    """

    def __init__(self, layers: Sequence[Int8Layer], epsilon: float) -> None:
        self.layers, self.epsilon = layers, epsilon
        self.inner = layers[0].down.blocks.shape[1] * GROUP
        self._table = np.zeros((len(layers), 10 + 6), np.int64)  # a layer's addresses, and rooms of its window
        for row, layer in zip(self._table, layers, strict=True):
            row[:8] = [address for product in layer[:4] for address in product.addresses]
            row[8:10] = [x.data_ptr() for x in layer.norms]

    def __call__(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        windows: Sequence[tuple[Tensor, Tensor]],
        sinks: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, Tensor]:
        """Windows and sinks are all float32 or all bfloat16.

        Args:
            hidden: ``[B, 1, C]``.
            rotary: cos and sin ``[B or 1, 1, D]``.
            windows: of each layer keys and values ``[B, Hkv, P + 1, D]`` of what the token sees, parts of contiguous
                buffers. The last column is its own, and is written here.
            sinks: of each layer keys and values ``[B, Hkv, S, D]``, contiguous, if they are seen: by the query as it is
                before its rotation.

        Returns:
            the last layer's output ``[B, 1, C]``, and all layers' normalised inputs ``[L, B, 1, C]``; ``hidden``'s
            dtype.
        """
        _set_threads()
        rows, kv_heads, seen, width = windows[0][0].shape
        table, num_sinks = self._table.copy(), 0  # two threads may decode at once
        for row, (keys, values) in zip(table, windows, strict=True):
            row[10:14] = keys.data_ptr(), values.data_ptr(), keys.stride(1) // width, values.stride(1) // width
        if sinks is not None:
            num_sinks = sinks[0][0].shape[2]
            table[:, 14:] = [(keys.data_ptr(), values.data_ptr()) for keys, values in sinks]
        out = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        normed = out.new_empty(len(table), *out.shape)
        inputs = [out, normed, *(x.float().expand(rows, -1, -1).contiguous() for x in rotary)]
        heads = len(self.layers[0].qkv.bias) // width - 2 * kv_heads
        half = int(windows[0][0].dtype == torch.bfloat16)
        shape = (rows, out.shape[2], self.inner, heads, kv_heads, width, seen, num_sinks, half)
        int8_kernels.layers(tuple(x.data_ptr() for x in inputs), table, shape, self.epsilon)
        return out.to(hidden.dtype), normed.to(hidden.dtype)


def _set_threads() -> None:
    """As many as PyTorch has, if numba's pool is as large."""
    number = torch.get_num_threads()
    numba.set_num_threads(min(number, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != number:  # when it starts its pool, numba sets OpenMP's number for all
        torch.set_num_threads(number)
