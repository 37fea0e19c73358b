"""Effective rank and load: how many directions a memory matrix uses, how many pairs of those it can tell apart."""

import math

import pytest
import torch

from senri.memory import MemoryState, scan
from senri.memory.inspect import capacity, effective_rank, key_overlap, load


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equal_directions_count_one_each(size, scale):
    torch.testing.assert_close(effective_rank(scale * torch.eye(size)), torch.tensor(float(size)))
    rotated = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
    torch.testing.assert_close(effective_rank(scale * rotated), torch.tensor(float(size)))


def test_one_pair_is_one_direction():
    v, k = torch.arange(1.0, 6.0), torch.arange(1.0, 10.0)
    torch.testing.assert_close(effective_rank(v[:, None] * k), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_an_empty_memory_has_none():
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_unequal_directions_count_by_their_share():
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    torch.testing.assert_close(effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))), torch.tensor(expected))


def test_each_matrix_for_itself():
    M = torch.zeros(2, 3, 5, 4)
    M[0, 1] = torch.eye(5, 4)
    M[1, 2, 0, 0] = -7
    expected = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(effective_rank(M), expected)


@pytest.mark.parametrize(("value_dim", "key_dim"), [(1, 1), (4, 8), (64, 64), (576, 576)])
def test_capacity_solves_its_equation(value_dim, key_dim):
    pairs = capacity(value_dim, key_dim)
    assert pairs > 1
    assert pairs * math.log(pairs) == pytest.approx(value_dim * key_dim / 2)


def test_random_pairs_are_told_apart_below_the_capacity_and_not_far_above():
    draw = torch.Generator().manual_seed(0)
    for share, lowest, highest in ((0.25, 0.99, 1.0), (4.0, 0.0, 0.5)):
        pairs = int(share * capacity(48, 48))
        k, v = (torch.nn.functional.normalize(torch.randn(pairs, 48, generator=draw), dim=-1) for _ in range(2))
        found = ((k @ (k.T @ v)) @ v.T).argmax(-1)
        assert lowest <= (found == torch.arange(pairs)).float().mean() <= highest


def orthonormal(rows, width, seed=0):
    return torch.linalg.qr(torch.randn(width, rows, generator=torch.Generator().manual_seed(seed)))[0].T


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9])
def test_the_overlap_of_keys(cosine):
    """Two keys and values that are orthogonal: a pair counts with itself; slots know which pairs differ."""
    first, other = orthonormal(2, 8)
    keys = torch.stack([first, cosine * first + (1 - cosine**2) ** 0.5 * other])
    values = orthonormal(2, 6, seed=1)
    k, v = keys[None, :, None], values[None, :, None]
    expected = torch.tensor([[((2 + 2 * cosine**2) / 4) ** 0.5]])
    # the second pair is not corrected by the linear rule; its features are the keys
    summed = MemoryState.zeros(1, 1, 6, 8, rule="linear")._replace(M=(values.T @ keys)[None, None])
    torch.testing.assert_close(key_overlap(summed), expected, rtol=1e-5, atol=1e-5)
    _, slots = scan(k, k, v, rule="slot", num_slots=5)
    torch.testing.assert_close(key_overlap(slots), torch.tensor([[cosine]]), rtol=1e-4, atol=1e-3)
    assert load(slots).tolist() == [pytest.approx(0.4)]


def test_an_empty_memory_has_no_overlap():
    for options in ({"rule": "linear"}, {"rule": "linear", "num_memories": 3}, {"rule": "slot"}):
        state = MemoryState.zeros(2, 3, 8, 8, **options)
        assert not key_overlap(state).any()
        assert not load(state).any()


def test_load_counts_all_memories_of_a_store():
    written = torch.tensor([10, 20])
    single = MemoryState.zeros(2, 3, 8, 16, rule="linear")._replace(written=written)
    store = MemoryState.zeros(2, 3, 8, 16, rule="linear", num_memories=4)._replace(written=written)
    torch.testing.assert_close(load(single), written / capacity(8, 16))
    torch.testing.assert_close(load(store), written / capacity(8, 16) / 4)
