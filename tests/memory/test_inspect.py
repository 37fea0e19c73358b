"""Effective rank: how many directions a memory matrix uses."""

import math

import pytest
import torch

from senri.memory.inspect import effective_rank


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
