"""The compiled layers against their definition in float64, and the weights against what they were made of."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from senri.layers.int8_kernels import GROUP, PART
from senri.layers.int8_step import Int8Layer, Int8Layers, Int8Linear

EPSILON = 1e-5


def weights_of(form):
    """Float64 ``[R, in]``: the numbers that a product is made with."""
    numbers = form.blocks[..., GROUP:].clone().view(torch.float32).double()
    return (form.blocks[..., :GROUP].double() * numbers[..., :1] + numbers[..., 1:]).flatten(1)


def q4_1(weight):
    """The nearest of 16 levels from the least to the greatest weight of a group."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return (low + ((groups - low) / (high - low) * 15).round() * (high - low) / 15).flatten(1)


def q8_0(weight):
    """The nearest of 255 levels to both sides of zero."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(1)


def linear(inner, outer, bias=False):
    return nn.Linear(inner, outer, bias=bias)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_is_that_of_the_rounded_weights(bias, rows):
    layers = [linear(96, 40, bias), linear(96, 7)]
    form, x = Int8Linear(*layers), torch.randn(rows, 1, 96)
    biases = torch.cat([layers[0].bias.detach() if bias else torch.zeros(40), torch.zeros(7)])
    expected = x.double() @ weights_of(form).T + biases
    out = form(x)
    assert out.shape == (rows, 1, 47)
    assert (out - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(form(x.expand(rows, 2, 96))[:, 1], out[:, 0], rtol=0, atol=0)


@torch.no_grad()
def test_weights_of_evenly_spread_levels_are_kept():
    whole = torch.randn(48, 64)
    for on_levels in (q4_1, q8_0):
        layer = linear(64, 48)
        layer.weight.copy_(on_levels(whole))
        form = Int8Linear(layer)
        assert form.error < 1e-6
        torch.testing.assert_close(weights_of(form), layer.weight.double(), rtol=1e-5, atol=1e-6)
        layer.weight.copy_(layer.weight.bfloat16())
        assert 5e-4 < Int8Linear(layer).error < 3e-3, "rounded to bfloat16, as the base is kept"
    layer.weight.copy_(whole)
    assert 4e-3 < Int8Linear(layer).error < 5e-3, "half a level of 256, spread evenly"


@torch.no_grad()
def test_the_error_is_that_of_the_layer_that_loses_most():
    layers = [linear(64, 400), linear(64, 8)]
    layers[0].weight.copy_(q4_1(layers[0].weight))
    assert Int8Linear(*layers).error == Int8Linear(layers[1]).error > 3e-3


@torch.no_grad()
def test_the_default_dtype_does_not_matter():
    form, x = Int8Linear(linear(64, 40)), torch.randn(1, 1, 64)
    expected = form(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(form(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_a_group_of_equal_weights():
    layer = linear(64, 4)
    for value in (0.0, 0.25):
        layer.weight.fill_(value)
        form = Int8Linear(layer)
        torch.testing.assert_close(form(torch.ones(1, 1, 64))[0, 0], torch.full((4,), 64 * value), rtol=1e-5, atol=1e-6)


def test_bytes_of_a_weight():
    assert Int8Linear(linear(64, 10)).nbytes == 10 * 2 * (GROUP + 4 + 4)
    assert Int8Linear.takes(linear(64, 10), linear(32, 1))
    assert not Int8Linear.takes(linear(64, 10), linear(48, 32))


class Stack:
    """Layers, a window, and what they should give."""

    def __init__(
        self, rows, seen, sinks, *, size=64, heads=4, kv_heads=2, width=32, inner=96, depth=2, dtype=torch.float32
    ):
        self.heads, self.kv_heads, self.width, self.dtype = heads, kv_heads, width, dtype
        make = lambda i, o: linear(i, o, bias=True)  # noqa: E731
        self.layers = [
            Int8Layer(
                Int8Linear(*(make(size, n * width) for n in (heads, kv_heads, kv_heads))),
                Int8Linear(make(heads * width, size)),
                Int8Linear(make(size, inner), make(size, inner)),
                Int8Linear(make(inner, size)),
                (torch.rand(size) + 0.5, torch.rand(size) + 0.5),
            )
            for _ in range(depth)
        ]
        self.hidden, self.rotary = (
            torch.randn(rows, 1, size),
            (torch.randn(rows, 1, width), torch.randn(rows, 1, width)),
        )
        rooms = [torch.randn(rows, kv_heads, seen + 9, width).to(dtype) for _ in range(2 * depth)]
        windows = [room[:, :, 5 : 5 + seen] for room in rooms]
        self.windows = list(zip(windows[::2], windows[1::2], strict=True))
        self.sinks = [
            tuple(torch.randn(rows, kv_heads, sinks, width).to(dtype) for _ in range(2)) for _ in range(depth)
        ]

    def by_definition(self, with_sinks):
        hidden, normed, new = self.hidden.double(), [], []
        cos, sin = (x.double()[:, :, None] for x in self.rotary)
        half, groups = self.width // 2, self.heads // self.kv_heads

        def norm(x, weight):
            return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()

        def product(form, x):
            return x @ weights_of(form).T + form.bias.double()

        def turned(x):
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        for layer, (keys, values), (sink_keys, sink_values) in zip(self.layers, self.windows, self.sinks, strict=True):
            x = norm(hidden, layer.norms[0])
            normed.append(x)
            qkv = product(layer.qkv, x).unflatten(-1, (-1, self.width))
            raw, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
            k, v = (x.transpose(1, 2).to(self.dtype).double() for x in (turned(k), v))
            new.append((k, v))
            every = [torch.cat([old.double()[:, :, :-1], x], 2) for old, x in ((keys, k), (values, v))]
            queries = torch.cat([turned(raw)] * every[0].shape[2], 1)
            if with_sinks:
                every = [torch.cat([a.double(), b], 2) for a, b in zip((sink_keys, sink_values), every, strict=True)]
                queries = torch.cat([raw] * sink_keys.shape[2] + [queries], 1)
            k, v = (x.repeat_interleave(groups, 1) for x in every)
            weight = (torch.einsum("bphd,bhpd->bhp", queries, k) / math.sqrt(self.width)).softmax(-1)
            hidden = hidden + product(layer.o, torch.einsum("bhp,bhpd->bhd", weight, v).flatten(1)[:, None])
            gate, up = product(layer.gate_up, norm(hidden, layer.norms[1])).chunk(2, -1)
            hidden = hidden + product(layer.down, F.silu(gate) * up)
        return hidden, torch.stack(normed), new


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("rows", "seen"), [(1, 1), (1, PART), (2, PART + 1), (4, 3 * PART + 7)])
def test_layers_against_their_definition(rows, seen, with_sinks, dtype):
    stack = Stack(rows, seen, sinks=2, dtype=dtype)
    before = [x.clone() for window in stack.windows for x in window]
    expected, normed, new = stack.by_definition(with_sinks)
    layers = Int8Layers(stack.layers, EPSILON)
    out, found = layers(stack.hidden, stack.rotary, stack.windows, stack.sinks if with_sinks else None)
    for ours, theirs in ((out, expected), (found, normed)):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < (1e-4 if dtype == torch.float32 else 5e-4) * theirs.norm()
    for window, made, old in zip(stack.windows, new, zip(before[::2], before[1::2], strict=True), strict=True):
        for now, column, then in zip(window, made, old, strict=True):
            own = now[:, :, -1:]
            if dtype == torch.float32:
                assert (own - column).norm() < 1e-4 * column.norm(), "its own key and value are in the window"
            else:  # the nearest number, but for one that lies between two
                assert (own != column).float().mean() < 0.2
                assert (own - column).norm() < 5e-3 * column.norm()
            assert torch.equal(now[:, :, :-1], then[:, :, :-1])


@torch.no_grad()
def test_a_bfloat16_model_gets_what_a_float32_one_would_rounded():
    stack = Stack(2, 40, sinks=1, dtype=torch.bfloat16)
    layers, found = Int8Layers(stack.layers, EPSILON), []
    stack.hidden, stack.rotary = stack.hidden.bfloat16(), tuple(x.bfloat16() for x in stack.rotary)
    for dtype in (torch.float32, torch.bfloat16):
        rotary = tuple(x.to(dtype) for x in stack.rotary)
        found.append(layers(stack.hidden.to(dtype), rotary, stack.windows, stack.sinks))
        assert all(x.dtype == dtype for x in found[-1])
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(*found, strict=True))
    product, x = stack.layers[0].o, torch.randn(3, 128).bfloat16()
    assert torch.equal(product(x), product(x.float()).bfloat16())


@torch.no_grad()
def test_great_scores_and_gates_do_not_overflow():
    stack = Stack(1, 40, sinks=1)
    stack.hidden.mul_(1e4)
    for window in stack.windows:
        window[0].mul_(1e3)
    expected, *_ = stack.by_definition(True)
    out, _ = Int8Layers(stack.layers, EPSILON)(stack.hidden, stack.rotary, stack.windows, stack.sinks)
    assert (out - expected).norm() < 1e-4 * expected.norm()


THREADS = """
import torch
from senri.layers.int8_step import Int8Linear
torch.manual_seed(0)
out = Int8Linear(torch.nn.Linear(64, 5000))(torch.randn(3, 64))
print(torch.get_num_threads(), out.sum().item(), out.abs().max().item())
"""


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing():
    found = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        run = [sys.executable, "-c", THREADS]
        found.append(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split())
        assert found[-1][0] == threads
    assert found[0][1:] == found[1][1:]
