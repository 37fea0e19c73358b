"""Linear layers in the format that oneDNN's bfloat16 products want, with what follows them done in the same pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 64  # numbers of a weight that are looked at to see whether it has changed
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


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers as PyTorch has them: no subclass (LoRA), no hooks that want to be called."""
    return all(type(x) is nn.Linear and not x._forward_hooks and not x._forward_pre_hooks for x in layers)


class PackedLinear:
    """One or several linear layers of the same input, ``x`` ``[..., in]`` -> ``[..., sum of out]``.

    A single token takes half the time of ``nn.Linear``, for which PyTorch packs the weight anew at each call. The sum
    is not rounded before what follows it.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias.detach() for x in layers]
        self.weight = _OPS._reorder_linear_weight(torch.cat([x.weight.detach() for x in layers]))
        self.bias = torch.cat(biases) if any(x.bias is not None for x in layers) else None

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


class _Seen:
    """A parameter as it was when it was packed."""

    def __init__(self, parameter: Tensor) -> None:
        self.version = _version(parameter)
        # Kept alive, so that no other weight can stand at its address. In-place changes by way of `.data` (PEFT merges
        # LoRA so) raise no version: some of the numbers are compared, too.
        flat = parameter.detach().reshape(-1)
        self.some = flat[:: max(len(flat) // SAMPLE, 1)]
        self.before = self.some.clone()

    def is_still(self, parameter: Tensor) -> bool:
        return self.version == _version(parameter) and torch.equal(self.some, self.before)


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


class PackedWeights:
    """The packed linear layers of a module: made when first used and anew when weights have changed.

    They are no part of the module's state: neither saved nor copied with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[_Seen], PackedLinear]] = {}

    def get(self, name: str, *layers: nn.Linear) -> PackedLinear:
        """The packed form of ``layers``, which always go by this name."""
        parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        seen, packed = self._made.get(name, ([], None))
        if packed is None or not all(s.is_still(p) for s, p in zip(seen, parameters, strict=True)):
            packed = PackedLinear(*layers)
            self._made[name] = ([_Seen(p) for p in parameters], packed)
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()
