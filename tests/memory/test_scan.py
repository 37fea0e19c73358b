"""Reading without writing, and stretches in which nothing is written, against the whole scan."""

import pytest
import torch

from senri.memory import RULES, read, scan

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 40


def inputs(seed=0):
    """Two rows, two memories, four query heads."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, STEPS, heads, 6, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    return q, k, v, torch.rand(2, STEPS, 2, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("feature_map", [None, "dpfp"])
@pytest.mark.parametrize("rule", RULES)
def test_reading_alone_is_a_scan_that_writes_nothing(rule, feature_map):
    q, k, v, beta = inputs()
    options = {"rule": rule, "feature_map": feature_map}
    _, state = scan(q, k, v, beta=beta, **options)
    q, k, v, beta = inputs(seed=1)
    nothing = torch.zeros(2, STEPS, dtype=torch.bool)
    expected, after = scan(q, k, v, state, beta=beta, mask=nothing, **options)
    torch.testing.assert_close(read(q, state, **options), expected, **EXACT)
    torch.testing.assert_close(after.M, state.M, rtol=0, atol=0)
    assert expected.abs().min() > 1e-6


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("rule", RULES)
def test_stretches_without_a_write_are_read_as_they_are(rule, chunk_size):
    """Without gradients they are one product; with them, chunks like all others."""
    q, k, v, beta = inputs()
    written = torch.tensor([3, 4, 5, 21, 39])
    sparse = torch.zeros_like(beta).index_copy(1, written, beta[:, written])
    options = {"rule": rule, "beta": sparse, "chunk_size": chunk_size, "segment_size": 16}
    with torch.enable_grad():
        expected, state = scan(q, k, v, **options)
    with torch.no_grad():
        found, after = scan(q, k, v, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    for name in ("M", "z", "M_segment", "z_segment", "written"):
        if getattr(state, name) is not None:
            torch.testing.assert_close(getattr(after, name), getattr(state, name), **EXACT)
    assert found[:, 2].abs().max() == 0
    assert found[:, 3].abs().min() > 0
