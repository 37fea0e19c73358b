"""The kernels of flash-linear-attention behind ``scan``, against the float64 reference; and when they are picked.

They run on a GPU (package fla-core), or without one in Triton's interpreter, much slower, which must be switched on
before Triton is loaded: by `TRITON_INTERPRET=1 pytest tests/memory/test_kernels.py`, and by a test here of its own.
The interpreter knows no bfloat16 (it multiplies the bit patterns), so that needs a GPU.
"""

import importlib.util
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from senri.memory import MemoryState, kernels, reference, scan
from senri.memory.state import map_tensors, named_tensors

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = [name for name in ("fla", "triton") if importlib.util.find_spec(name) is None]
DEVICE = "cuda" if ON_GPU and not INTERPRETED else "cpu"
# float32: that nothing but rounding differs. On a GPU its products are rounded to 10 bits.
TOLERANCE = {
    torch.float32: 2e-5 if DEVICE == "cpu" else 5e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def documented(q, k, v, g, beta, *, scale, initial_state, output_final_state):
    """What fla documents of its operation, token by token: lets the rest be tested where it is not installed."""
    assert q.shape == k.shape
    assert v.shape[:3] == beta.shape == g.shape == k.shape[:3]
    assert q.dtype == k.dtype == v.dtype
    assert output_final_state
    S, outputs = initial_state, []  # [B, H, K, V]
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        known = torch.einsum("bhk,bhkv->bhv", k[:, t].float(), S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t].float(), (v[:, t] - known) * beta[:, t, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t].float(), S))
    return torch.stack(outputs, 1).to(q.dtype), S


def interpret(monkeypatch):
    """Let fla's kernels run in the interpreter: without a device to tune them on, its loops counting in tensors."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import TensorHandle

    def count(*bounds):
        for i in range(*map(int, bounds)):
            yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kwargs: self.configs[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no device
        from fla.ops.common import chunk_delta_h
    monkeypatch.setattr(chunk_delta_h, "range", count, raising=False)


@pytest.fixture(params=["documented", "kernels"])
def computed_by(request, monkeypatch):
    """Scans are computed by fla, or what it documents, whatever their dtype; lists the calls."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(kernels, "DTYPES", tuple(TOLERANCE))
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    if request.param == "documented":
        fake = types.ModuleType("fla.ops.gated_delta_rule")
        fake.chunk_gated_delta_rule = documented
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", fake)
        for parent in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    elif MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    elif INTERPRETED:
        interpret(monkeypatch)
    elif not ON_GPU:
        pytest.skip("no GPU, and Triton's interpreter is not on: TRITON_INTERPRET=1")
    calls, delta = [], kernels.delta
    monkeypatch.setattr(kernels, "delta", lambda *args: calls.append(args) or delta(*args))
    return calls


def inputs(steps, dtype, seed=0, batch=2, heads=2, group=1, key_dim=6, value_dim=4):
    """Queries, keys, values and gates on the CPU; the gates in float32."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(batch, steps, *shape, generator=gen)

    tensors = {"q": randn(heads * group, key_dim), "k": randn(heads, key_dim), "v": randn(heads, value_dim)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    beta = randn(heads).sigmoid() * (randn(heads) > -0.5)  # a write gate that closes
    return {**tensors, "beta": beta, "log_alpha": -randn(heads).exp() * 0.2, "mask": randn() > -0.5}


def weigh(out, state):
    """A number that every entry of output and state has a part in."""
    floats = [t for t in [out, *named_tensors(state).values()] if t.is_floating_point()]
    return sum((t.double() * torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t)).sum() for t in floats)


def compare(tensors, state, dtype, **options):
    """scan and reference agree on output, final state and every gradient, to a share of the largest entry."""
    results = []
    for fn, device in ((scan, DEVICE), (reference.scan, "cpu")):
        given = {n: x.detach().clone().to(device) for n, x in tensors.items()}
        before = map_tensors(lambda t, device=device: t.detach().clone().to(device), state)
        learnt = [*given.values(), *named_tensors(before).values()]
        learnt = [x.requires_grad_() for x in learnt if x.is_floating_point()]
        q, k, v = (given.pop(name) for name in "qkv")
        here = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        out, after = fn(q, k, v, before, **given, **here)
        grads = torch.autograd.grad(weigh(out, after), learnt, allow_unused=True)
        names = [n for n in [*tensors, *named_tensors(state)] if n not in ("mask", "written", "pending.valid")]
        found = {"out": out, **named_tensors(after)}
        found |= {f"d {n}": x if x is not None else torch.zeros(()) for n, x in zip(names, grads, strict=True)}
        results.append({n: x.detach().cpu() for n, x in found.items()})
    got, expected = results
    assert got.keys() == expected.keys()
    worst = {}
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        if not x.is_floating_point():
            assert torch.equal(got[name], x), name
            continue
        worst[name] = float((got[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-3))
    print({name: f"{error:.1e}" for name, error in worst.items()})
    assert max(worst.values()) < TOLERANCE[dtype], worst
    return got


DTYPE_CASES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dtype", DTYPE_CASES)
@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("group", [1, 2])
def test_kernels_equal_reference_with_every_gradient(computed_by, rule, group, dtype):
    """Two calls, the second from the first one's state and pending pairs; closed gates, padding, several chunks."""
    forgets = rule == "gated_delta"
    tensors = [inputs(steps, dtype, seed, group=group) for seed, steps in enumerate((70, 67))]
    options = {"rule": rule, "delay": 5, "chunk_size": 8}
    for part in tensors:
        if not forgets:
            del part["log_alpha"]
    q, k, v, *gates = tensors[0].values()
    _, state = reference.scan(q, k, v, **dict(zip(list(tensors[0])[3:], gates, strict=True)), **options)
    state = map_tensors(lambda t: t.float() if t.is_floating_point() else t, state)
    state = state._replace(pending=state.pending._replace(k=tensors[0]["k"][:, -5:], v=tensors[0]["v"][:, -5:]))
    got = compare(tensors[1], state, dtype, **options)
    assert len(computed_by) == 1
    assert got["out"].dtype == dtype
    assert got["M"].dtype == torch.float32
    assert got["M"].is_contiguous()
    assert (got["written"] < state.written + 67).all()  # the mask closes some


def test_kernels_without_gates(computed_by):
    tensors = {name: x for name, x in inputs(70, torch.float32).items() if name in "qkv"}
    state = MemoryState.zeros(2, 2, 4, 6, rule="gated_delta")
    compare(tensors, state, torch.float32, rule="gated_delta", chunk_size=8)
    assert len(computed_by) == 1


@pytest.mark.parametrize("key_dim", [66, 256])
def test_kernels_of_wide_heads(computed_by, key_dim):
    """Wider than one of the kernels' blocks, of 64 features, and as wide as they can be."""
    tensors = inputs(66, torch.float32, batch=1, heads=1, key_dim=key_dim, value_dim=70)
    M = torch.randn(1, 1, 70, key_dim, generator=torch.Generator().manual_seed(1))
    state = MemoryState.zeros(1, 1, 70, key_dim, rule="gated_delta")._replace(M=M)
    compare(tensors, state, torch.float32, rule="gated_delta", chunk_size=8)
    assert len(computed_by) == 1


def test_kernels_keep_packed_documents_apart(computed_by):
    tensors = inputs(80, torch.float32, batch=1)
    state = MemoryState.zeros(2, 2, 4, 6, rule="gated_delta")
    compare(
        tensors, state, torch.float32, rule="gated_delta", delay=3, chunk_size=8, cu_seqlens=torch.tensor([0, 11, 80])
    )
    assert len(computed_by) == 1


# what overflows, and times 0, lies above the diagonal and is masked then
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_kernels_forget_everything_where_a_gate_is_zero(computed_by):
    tensors = inputs(70, torch.float32)
    tensors["log_alpha"][:, [20, 21, 66]] = -torch.inf
    del tensors["mask"]
    state = MemoryState.zeros(2, 2, 4, 6, rule="gated_delta")
    compare(tensors, state, torch.float32, rule="gated_delta", chunk_size=8)
    assert len(computed_by) == 1


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_kernels_equal_reference_in_the_interpreter():
    """The tests of this file in a process of their own, where Triton was loaded with its interpreter on."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "kernels and not documented and not picked and not gpus and not interpreter",
        __file__,
    ]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert "skipped" not in result.stdout


def picked(monkeypatch, changes):
    """Whether a scan that suits the kernels, but for the changes, is computed by them."""
    calls = []
    monkeypatch.setattr(kernels, "delta", lambda M, chunk, dtype: calls.append(dtype) or (chunk.v[:, :, None], M))
    options = {"rule": "delta_token", "dtype": torch.bfloat16, "steps": 9, "key_dim": 6, "value_dim": 4, **changes}
    shape = {name: options.pop(name) for name in ("steps", "dtype", "key_dim", "value_dim")}
    q, k, v, *_ = inputs(**shape).values()
    q = q[:, :, : options.pop("query_heads", None)]
    if "value_dtype" in options:
        v = v.to(options.pop("value_dtype"))
    scan(q, k, v, chunk_size=8, **options)
    return calls == [shape["dtype"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"rule": "gated_delta"}, True),
        ({"dtype": torch.float16}, True),
        ({"key_dim": 256}, True),
        ({"rule": "linear"}, False),
        ({"rule": "delta"}, False),
        ({"rule": "slot"}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64}, False),
        ({"value_dtype": torch.float32}, False),
        ({"steps": 8}, False),
        ({"steps": 0}, False),
        ({"query_heads": 0}, False),
        ({"key_dim": 258}, False),
        ({"key_dim": 5}, False),
        ({"value_dim": 3}, False),
        ({"feature_map": "dpfp"}, True),
        ({"feature_map": "dpfp", "key_dim": 130}, False),
    ],
)
def test_kernels_are_picked_where_they_suit(monkeypatch, changes, expected):
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    assert picked(monkeypatch, changes) == expected
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    assert not picked(monkeypatch, changes)


def test_kernels_are_for_gpus_only(monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    assert not picked(monkeypatch, {})
