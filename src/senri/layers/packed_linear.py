"""Frozen linear layers in the form that is fastest on a CPU, with what follows them done in the same pass.

Forms with one interface: :class:`PackedLinear` (bfloat16, oneDNN's layout) and :class:`PlainLinear` (any dtype,
PyTorch's own product) for any number of tokens; :class:`Int4Linear` and :class:`HalfLinear` for a few at a time, whose
products are bound by the bytes of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OFF_LEVEL = 0.1  # of a level: more is no rounding of weights that were on four-bit levels
GROUP = 32  # weights of a row that share a scale in four bits: GGUF's blocks
FEW = 4  # tokens up to which four bits are faster than full products
INT4_ROWS = 16  # what the kernel's rows have to be a multiple of
SAMPLE = 64  # numbers of a weight that are looked at to see whether it has changed
_OPS = torch.ops.mkldnn  # what torch.compile's freezing calls, too


@functools.cache
def has_products() -> bool:
    """Whether oneDNN computes bfloat16 products on this processor."""
    return torch.backends.mkldnn.is_available() and bool(_OPS._is_mkldnn_bf16_supported())


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd would follow an operation on them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def fuses(x: Tensor) -> bool:
    """Whether a layer over ``x`` may be computed in fused form: on a CPU, without gradients, in a dtype that it is
    fast in.
    """
    if x.dtype != torch.float32:
        return packs(x)
    plain = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return plain and x.device.type == "cpu" and not wants_gradients(x)


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
    return all(
        type(x) is nn.Linear and not x._forward_hooks and not x._forward_pre_hooks and "forward" not in x.__dict__
        for x in layers
    )


class FrozenLinear(Protocol):
    """One or several linear layers of the same input, ``x`` ``[..., in]`` -> ``[..., sum of out]``."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def silu(self, x: Tensor) -> Tensor:
        """``silu(Wx)``."""
        ...

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``other * Wx``."""
        ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """``other + Wx``."""
        ...


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


class _InPlace:
    """What follows the product, done in place."""

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("a subclass computes the product")

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class PlainLinear(_InPlace):
    """:class:`FrozenLinear` by PyTorch's own products, which need no copy of the weights."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return self.layers[0](x)
        out = x.new_empty(*x.shape[:-1], sum(self.sizes))
        rows = x.flatten(0, -2)
        for layer, part in zip(self.layers, out.flatten(0, -2).split(self.sizes, -1), strict=True):
            if layer.bias is None:
                torch.mm(rows, layer.weight.t(), out=part)
            else:
                torch.addmm(layer.bias, rows, layer.weight.t(), out=part)
        return out


class HalfLinear:
    """A linear layer by a bfloat16 copy of its weight: half of what float32 reads for one token."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.detach().bfloat16()
        self.bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)


class Int4Linear:
    """One or several linear layers of the same input with weights in four bits, 32 of a row to a scale and an offset.

    ``x`` ``[..., in]`` -> ``[..., sum of out]``, both bfloat16. Levels are spread evenly from the least to the greatest
    weight of a group, as GGUF's Q4_1 does: weights that come from there fall on their own levels again.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers]).float()
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        exact = (groups - low) / scale
        levels = exact.round().clamp(0, 15)
        self.off_level = (exact - levels).abs().max().item()  # by how much of a level, at most
        self.weight = torch._convert_weight_to_int4pack_for_cpu(levels.flatten(1).to(torch.int32), 1)
        # the kernel's weight is (level - 8) * scale + offset; [in / 32, out, 2]
        self.scales = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
        biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias.detach() for x in layers]
        self.bias = torch.cat(biases).bfloat16() if any(x.bias is not None for x in layers) else None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weights."""
        return self.weight.nbytes + self.scales.nbytes

    @staticmethod
    def takes(*layers: nn.Linear) -> bool:
        """Whether the kernel knows these shapes."""
        return all(x.in_features % GROUP == 0 and x.out_features % INT4_ROWS == 0 for x in layers)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.weight, GROUP, self.scales)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class _Seen:
    """A linear layer's weights as they were when they were packed. Looked at for every token: no more than needed."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.parameters = [(name, p) for name, p in layer._parameters.items() if p is not None]
        self.versions = [_version(p) for _, p in self.parameters]
        # In-place changes by way of `.data` (PEFT merges LoRA so) raise no version: some of the numbers are compared,
        # too. These views keep the memory alive, so that no other weight can stand at its address.
        self.some = [_sample(p) for _, p in self.parameters]
        self.before = [some.tobytes() for some in self.some]

    def is_still(self) -> bool:
        now = self.layer._parameters
        return all(now[name] is p for name, p in self.parameters) and (
            [_version(p) for _, p in self.parameters] == self.versions
            and [some.tobytes() for some in self.some] == self.before
        )


def _sample(parameter: Tensor) -> Any:
    """A view of some of its numbers, in numpy, which compares them fastest."""
    flat = parameter.detach().reshape(-1)
    some = flat[:: max(len(flat) // SAMPLE, 1) | 1]  # odd: not one column alone of a width that is even
    return (some.view(torch.int16) if some.dtype == torch.bfloat16 else some).numpy()


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


Form = TypeVar("Form")


class PackedWeights:
    """The frozen forms of a module's linear layers: made when first used and anew when weights have changed.

    They are no part of the module's state: neither saved nor copied with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[nn.Linear, ...], list[_Seen], Any]] = {}

    def get(self, name: str, *layers: nn.Linear, make: Callable[..., Form]) -> Form:
        """What ``make(*layers)`` gives; ``layers`` always go by this name."""
        before, seen, form = self._made.get(name, ((), [], None))
        if before != layers or not all(s.is_still() for s in seen):
            form = make(*layers)
            self._made[name] = (layers, [_Seen(layer) for layer in layers], form)
        return form

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()
