"""Linear layers in the format that oneDNN's bfloat16 products want, with what follows them done in the same pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_OPS = torch.ops.mkldnn  # what torch.compile's freezing calls, too


@functools.cache
def has_products() -> bool:
    """Whether oneDNN computes bfloat16 products on this processor."""
    return torch.backends.mkldnn.is_available() and bool(_OPS._is_mkldnn_bf16_supported())


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd would follow an operation on them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def packs(x: Tensor) -> bool:
    """Whether products of ``x`` and frozen weights go by :class:`PackedLinear`: bfloat16 on a CPU, no gradients."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not wants_gradients(x)
        and not torch.compiler.is_compiling()
        and has_products()
    )


class PackedLinear:
    """One or several linear layers of the same input, ``x`` ``[..., in]`` -> ``[..., sum of out]``.

    A single token takes half the time of ``nn.Linear``, for which PyTorch packs the weight anew at each call. The sum
    is not rounded before what follows it.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        biases = [x.bias for x in layers if x.bias is not None]
        self.weight = _OPS._reorder_linear_weight(torch.cat([x.weight.detach() for x in layers]))
        self.bias = torch.cat([b.detach() for b in biases]) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        return _OPS._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """``silu(Wx)``."""
        return _OPS._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``other * Wx``."""
        return _OPS._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """``other + Wx``."""
        return _OPS._linear_pointwise.binary(x, other, self.weight, self.bias, "add")


class PackedWeights:
    """The packed linear layers of a module: made when first used and anew when weights have changed.

    They are no part of the module's state: neither saved nor copied with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[tuple[int, int]], PackedLinear]] = {}

    def get(self, name: str, *layers: nn.Linear) -> PackedLinear:
        """The packed form of ``layers``, which always go by this name."""
        parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        version = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        made = self._made.get(name)
        if made is None or made[0] != version:
            made = self._made[name] = (version, PackedLinear(*layers))
        return made[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()
