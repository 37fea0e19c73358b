"""Window and sinks against a plain loop over queries: outputs and every gradient, for any cut, padding and grouping."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import senri.layers.sliding_window as sliding
from senri.layers import Sinks, new_sinks, sinks_behind, sliding_window_attention, window_plan
from senri.layers.attention_products import attention_by_products
from senri.layers.sinks import with_scores

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SCALE = 0.7


def rotate(x, position):
    """RoPE by complex numbers: ``x`` ``[..., D]``, ``position`` of its leading shape or one number."""
    half = x.shape[-1] // 2
    frequency = 0.6 ** torch.arange(half, dtype=torch.float64)
    angle = torch.as_tensor(position, dtype=torch.float64)[..., None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def reference(q, k, v, window, num_sinks, padding):
    """Query by query over unrotated ``q`` ``[B, H, T, D]``, ``k``, ``v`` ``[B, Hkv, T, D]``; ``padding`` per row."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b, first in enumerate(padding):
        for h in range(q.shape[1]):
            keys, values = k[b, h // groups, first:], v[b, h // groups, first:]
            for t in range(len(keys)):
                seen = [(s, t - s) for s in range(max(0, t - window + 1), t + 1)]
                seen += [(i, window + num_sinks - 1 - i) for i in range(num_sinks) if t - i >= window]
                scores = [SCALE * q[b, h, first + t] @ rotate(keys[s], -distance) for s, distance in seen]
                weights = torch.stack(scores).softmax(0)
                out[b, h, first + t] = sum(w * values[s] for w, (s, _) in zip(weights, seen, strict=True))
    return out


def streamed(q, k, v, window, num_sinks, padding, cuts, block_size, attention=sliding_window_attention):
    """The same in pieces that end at ``cuts``, as a decoder layer calls it."""
    steps = q.shape[2]
    valid = torch.arange(steps)[None] >= torch.tensor(padding)[:, None]
    index = valid.cumsum(1) - 1
    rotated_q, rotated_k = (rotate(x, index[:, None]) for x in (q, k))
    distance = window + num_sinks - 1 - torch.arange(num_sinks)
    sink_k = sink_v = k.new_zeros(*k.shape[:2], num_sinks, k.shape[3])
    parts = []
    for start, stop in pairwise([0, *cuts, steps]):
        first = max(0, start - window + 1)
        new = new_sinks(index[:, start:stop], valid[:, start:stop], num_sinks)
        if new is not None:
            sink_k = new.put(sink_k, rotate(new.take(k[:, :, start:stop]), -distance))
            sink_v = new.put(sink_v, new.take(v[:, :, start:stop]))
        plan = window_plan(
            stop - start, start - first, window, valid[:, first:stop] if any(padding) else None, q.device,
            sinks_behind(index[:, start:stop], num_sinks, window), block_size,
        )  # fmt: skip
        part = slice(start, stop)
        sinks = Sinks(q[:, :, part], sink_k, sink_v)
        queries, keys, values = rotated_q[:, :, part], rotated_k[:, :, first:stop], v[:, :, first:stop]
        parts.append(attention(queries, keys, values, plan, scale=SCALE, sinks=sinks))
    return torch.cat(parts, 2) * valid[:, None, :, None]


def gradients(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_is_the_plain_loop_in_outputs_and_gradients(data):
    draw = data.draw
    rows, steps, window = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 6))
    heads, groups, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    num_sinks = draw(st.integers(0, 3))
    padding = draw(st.lists(st.integers(0, steps - 1), min_size=rows, max_size=rows)) if draw(st.booleans()) else []
    padding = padding or [0] * rows
    cuts = sorted(draw(st.sets(st.integers(1, steps - 1)))) if steps > 1 else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(rows, heads * groups, steps, width), *[(rows, heads, steps, width)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = reference(*inputs, window, num_sinks, padding)
    block_size = draw(st.integers(1, 5))
    out = streamed(*inputs, window, num_sinks, padding, cuts, block_size)
    torch.testing.assert_close(out, expected, **EXACT)
    wanted = gradients(expected, inputs)
    for ours, theirs in zip(gradients(out, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    if not any(padding):  # and by products
        out = streamed(*inputs, window, num_sinks, padding, cuts, block_size, always_by_products)
        torch.testing.assert_close(out, expected, **EXACT)
        for ours, theirs in zip(gradients(out, inputs), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


def always_by_products(q, k, v, plan, *, scale, sinks):
    if plan[0].early is None:
        return sliding_window_attention(q, k, v, plan, scale=scale, sinks=sinks)
    return attention_by_products(q, k, v, plan, scale, sinks)


def test_what_goes_by_products(monkeypatch):
    calls = []
    monkeypatch.setattr(sliding, "has_products", lambda: True)
    monkeypatch.setattr(sliding, "attention_by_products", lambda q, *rest: calls.append(q.dtype) or q)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v, plan, sinks = make_case(dtype=dtype)
        sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks)
        sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks, dropout=0.5)
        sliding_window_attention(q.clone().requires_grad_(), k, v, plan, scale=SCALE, sinks=sinks)
        with torch.autocast("cpu", torch.bfloat16):
            sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks)
    # float32 without gradients, and by autocast; bfloat16 with and without gradients, and under autocast
    assert calls == [torch.float32, torch.bfloat16, *[torch.bfloat16] * 3]


@pytest.mark.parametrize("steps", [1, 5])
def test_gradients_by_products_in_half_precision(steps):
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, plan, sinks = make_case(steps, dtype=torch.bfloat16, width=64, num_sinks=1)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, *sinks)]
        plan = window_plan(steps, 3, 4, None, q.device, plan[0].mask.new_ones(2, steps, 1)) if steps > 1 else plan
        out = always_by_products(*inputs[:3], plan, scale=0.1, sinks=Sinks(*inputs[3:]))
        found.append([out, *gradients(out, inputs)])
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 0.02 * exact.norm()


def make_case(steps=5, window=4, num_sinks=2, dtype=torch.float64, width=8):
    """Queries far into a text: past keys fill the window, every sink is behind it."""
    generator = torch.Generator().manual_seed(0)
    q, raw, k, v, sink_k, sink_v = (
        torch.randn(2, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length in [(6, steps), (6, steps), *[(2, window - 1 + steps)] * 2, *[(2, num_sinks)] * 2]
    )
    behind = sinks_behind(torch.full((2, steps), 100), num_sinks, window)
    return q, k, v, window_plan(steps, window - 1, window, None, q.device, behind), Sinks(raw, sink_k, sink_v)


@pytest.mark.parametrize("steps", [1, 5])
def test_gradients_of_the_sinks_themselves(steps):
    q, k, v, plan, sinks = make_case(steps)
    leaves = [x.requires_grad_() for x in (q, k, v, *sinks)]
    out = sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks)
    keys, values, sink_k, sink_v = (x.repeat_interleave(3, 1) for x in (k, v, *sinks[1:]))
    expected = torch.zeros_like(out)
    for t in range(steps):
        scores = torch.cat([sinks.queries[:, :, t, None] @ sink_k.mT, q[:, :, t, None] @ keys[:, :, t : t + 4].mT], -1)
        expected[:, :, t] = ((SCALE * scores).softmax(-1) @ torch.cat([sink_v, values[:, :, t : t + 4]], 2))[:, :, 0]
    torch.testing.assert_close(out, expected, **EXACT)
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_half_precision_keeps_a_large_score(monkeypatch):
    q, k, v, plan, sinks = make_case(dtype=torch.bfloat16, width=64)
    sinks = sinks._replace(queries=sinks.queries + 8, keys=sinks.keys + 1)  # scores far from 0, as a real sink's
    exact = torch.einsum("bhtd,bhsd->bhts", sinks.queries.double(), sinks.keys.double().repeat_interleave(3, 1))
    coarse, rest = with_scores(q, sinks)[..., 64:68].double().split(2, -1)
    assert exact.abs().min() > 100
    assert ((coarse + rest) / exact - 1).abs().max() < 2e-5
    assert (coarse / exact - 1).abs().max() > 1e-3, "one part would have done"
    monkeypatch.setattr(sliding, "products_dtype", lambda _: None)  # there scores are rounded
    out = sliding_window_attention(q, k, v, plan, scale=0.02, sinks=sinks)
    assert out.dtype == torch.bfloat16
    doubles, sinks = [x.detach().double() for x in (q, k, v)], Sinks(*(x.double() for x in sinks))
    expected = sliding_window_attention(*doubles, plan, scale=0.02, sinks=sinks)
    assert expected.abs().max() > 1
    torch.testing.assert_close(out.detach().double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_fused_kernel_takes_it(steps, dtype, monkeypatch):
    monkeypatch.setattr(sliding, "products_dtype", lambda _: None)
    q, k, v, plan, sinks = make_case(steps, dtype=dtype, width=64, num_sinks=1)
    expected = sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # nothing else: it would raise
        assert torch.equal(sliding_window_attention(q, k, v, plan, scale=SCALE, sinks=sinks), expected)


def test_inside_the_window_the_plan_is_the_one_without_sinks():
    for steps, past in [(1, 0), (7, 0), (1, 6), (4, 3)]:
        index = past + torch.arange(steps)[None]
        behind = sinks_behind(index, 2, 7)
        assert behind is None
        plain = window_plan(steps, past, 7, None, index.device)
        assert not any(block.sinks for block in plain)
        (block,) = plain
        assert (block.mask is None) == (past == 0 or steps == 1)
    assert sinks_behind(torch.tensor([[6, 7, 8]]), 2, 7).tolist() == [[[False, False], [True, False], [True, True]]]
