"""ALiBi: the published slopes, and the weight of a pair by the segments that have passed."""

import pytest
import torch

from senri.memory import Multi, scan
from senri.memory.alibi import alibi_log_alpha, alibi_slopes


def test_the_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(16), torch.exp2(-torch.arange(1, 17) / 2))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    torch.testing.assert_close(alibi_slopes(12), torch.cat([alibi_slopes(8), alibi_slopes(16)[0:8:2]]))


@pytest.mark.parametrize("store", [None, Multi(3)])
def test_a_pair_weighs_by_the_segments_since(store):
    draw = torch.Generator().manual_seed(0)
    steps, heads, segment_size = 11, 2, 4
    k, v = (torch.randn(1, steps, heads, width, dtype=torch.float64, generator=draw) for width in (6, 3))
    slopes = alibi_slopes(heads).double() * 10
    gate = alibi_log_alpha(torch.arange(steps)[None], slopes, segment_size)
    _, state = scan(k, k, v, log_alpha=gate, segment_size=segment_size, chunk_size=3, store=store)
    distance = (steps - 1) // segment_size - torch.arange(steps) // segment_size
    weight = torch.exp(-slopes[:, None] * distance)  # [H, T]
    sigma = torch.nn.functional.elu(k) + 1
    expected = torch.einsum("ht,bthv,bthf->bhvf", weight, v, sigma)
    M = state.M if store is None else state.M.sum(2)
    torch.testing.assert_close(M, expected, rtol=1e-10, atol=1e-10)


def test_how_the_text_is_cut_changes_nothing():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 12, 2, 4, dtype=torch.float64, generator=draw)
    gate = alibi_log_alpha(torch.arange(12)[None], alibi_slopes(2), 5)
    whole, final = scan(q, q, q, log_alpha=gate, delay=3)
    state, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        part = slice(start, stop)
        gate = alibi_log_alpha(torch.arange(start, stop)[None], alibi_slopes(2), 5)
        out, state = scan(q[:, part], q[:, part], q[:, part], state, log_alpha=gate, delay=3)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.M, final.M, rtol=1e-10, atol=1e-10)
