"""The bounds are of the products and the bytes that they name."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from senri.benchmark import bounds
from senri.benchmark.work import layer_shapes


def test_rates_by_dtype_and_kernel(make_senri):
    rates = bounds.matrix_rates(make_senri().config, 16, rounds=1)
    assert set(rates) == {"bfloat16", "float32"}
    assert all(set(kernels) == {"linear", "packed"} and kernels["linear"] > 0 for kernels in rates.values())


def test_the_rate_is_work_by_time(make_senri, monkeypatch):
    config = make_senri().config
    monkeypatch.setattr(bounds, "median_seconds", lambda run, rounds: 0.5)
    flop = sum(2 * 16 * rows * columns for rows, columns in layer_shapes(config).values())
    assert bounds.matrix_rates(config, 16)["float32"]["linear"] == flop / 0.5
    assert bounds.bandwidth(4096) == {"one thread": 4096 / 0.5, "all threads": 4096 / 0.5}


def test_packed_weights_multiply_as_others_do():
    """The private operators that the kernel ``packed`` uses."""
    x, weight = torch.randn(16, 24), torch.randn(40, 24)
    if bounds._packed([(x, weight)], 16) is None:
        pytest.skip("this build of PyTorch has none")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    torch.testing.assert_close(
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), F.linear(x, weight), rtol=1e-4, atol=1e-4
    )


def test_the_median_leaves_the_first_runs_out(monkeypatch):
    now = iter([0, 100, 200, 201, 201, 204, 204, 206])  # two that do not count, then 1, 3, 2
    monkeypatch.setattr(bounds, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert bounds.median_seconds(lambda: None, 3) == 2


def test_threads_are_as_before():
    bounds.bandwidth(1 << 16, rounds=1)
    assert torch.get_num_threads() == 1
