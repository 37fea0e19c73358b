"""Frozen linear layers in the form that is fastest on a CPU, with what follows them done in the same pass.

Forms with one interface: :class:`PackedLinear` (bfloat16, oneDNN's layout) and :class:`PlainLinear` (any dtype,
PyTorch's own product). Single tokens have one of their own: ``int8_step.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of a weight that are looked at to see whether it has changed. A small change leaves most of bfloat16's alone.
SAMPLE, HALF_SAMPLE = 8, 64
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


def is_bare(*modules: nn.Module) -> bool:
    """Whether all that calling them would do is what their class says: nobody listens, and ``forward`` is its own."""
    for x in modules:  # noqa: SIM110  # no generator: decoding asks for three hundred of them a token
        if x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__:
            return False
    return True


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers as PyTorch has them: no subclass (LoRA), no hooks that want to be called."""
    return all(type(x) is nn.Linear for x in layers) and is_bare(*layers)


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


class _Seen:
    """A parameter as it was when it was packed. Looked at for every token: no more than needed."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner._parameters, name
        self.parameter = parameter = cast(Tensor, owner._parameters[name])
        # none is counted for what was made in inference mode
        self.address, self.version = parameter.data_ptr(), None if parameter.is_inference() else parameter._version
        # In-place changes by way of `.data` (PEFT merges LoRA so) raise no version: some of the numbers are compared,
        # too. This view keeps the memory alive, so that no other weight can stand at its address.
        flat, half = parameter.detach().reshape(-1), parameter.dtype == torch.bfloat16
        step = len(flat) // (HALF_SAMPLE if half else SAMPLE)
        some = flat[:: max(step, 1) | 1]  # odd: not one column alone of a width that is even
        self.some: Any = (some.view(torch.int16) if half else some).numpy()
        self.before = self.some.tobytes()

    def is_still(self) -> bool:
        parameter = self.parameter
        return (
            self.owner.get(self.name) is parameter
            and parameter.data_ptr() == self.address
            and (self.version is None or parameter._version == self.version)
            and self.some.tobytes() == self.before
        )


Form = TypeVar("Form")


class PackedWeights:
    """Frozen forms of modules: made when first used and anew when their parameters have changed.

    They are no part of the owner's state: neither saved nor copied with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[nn.Module, ...], list[_Seen], Any]] = {}

    def get(self, name: str, *modules: nn.Module, make: Callable[..., Form]) -> Form:
        """What ``make(*modules)`` gives; ``modules`` always go by this name."""
        before, seen, form = self._made.get(name, ((), [], None))
        if before != modules or not all(s.is_still() for s in seen):
            form = make(*modules)
            parameters = [(x, key) for x in modules for key, p in x._parameters.items() if p is not None]
            self._made[name] = (modules, [_Seen(*where) for where in parameters], form)
        return form

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()
