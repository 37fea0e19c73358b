"""SVD cleaning: the best approximation, its statistics, and when it happens."""

import pytest
import torch

from senri.memory import MemoryState, Multi, Routed, orthogonal_basis, read, scan
from senri.memory.svd import every, never, svd_cleaning, svd_cleaning_of_all, when_idle, when_rank_exceeds

SINGULAR = torch.tensor([4.0, 2.0, 1.0, 0.5])  # energies 16, 4, 1, 0.25 of 21.25


def state_of(*matrices):
    """One row whose heads hold the given matrices ``[Dv, F]`` (or ``[n, Dv, F]``)."""
    M = torch.stack(matrices)[None]
    return MemoryState(M, torch.ones(M.shape[:-2] + M.shape[-1:]), None, None, torch.tensor([100]))


def matrix(singular, seed=0):
    """``[6, 8]`` with the given singular values."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=draw))[0][:, : len(singular)] for size in (6, 8))
    return U * singular @ V.T


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"energy_threshold": 0.7}, 1),  # 0.753
        ({"energy_threshold": 0.8}, 2),
        ({"energy_threshold": 0.94}, 2),  # 0.941
        ({}, 3),
        ({"energy_threshold": 1.0}, 4),
        ({"max_rank": 1}, 1),
        ({"energy_threshold": 1.0, "max_rank": 9}, 4),
    ],
)
def test_the_fewest_directions_that_hold_the_energy(options, rank):
    before = state_of(matrix(SINGULAR))
    after, stats = svd_cleaning(before, **options)
    assert (stats.original_rank, stats.retained_rank) == (4, rank)
    assert stats.energy_retained == pytest.approx(float((SINGULAR[:rank] ** 2).sum() / (SINGULAR**2).sum()), abs=1e-5)
    torch.testing.assert_close(stats.singular_values_before[0, 0, :4], SINGULAR, rtol=0, atol=1e-5)
    assert int(torch.linalg.matrix_rank(after.M[0, 0], rtol=1e-4)) == rank
    # Eckart-Young: the error is what was left out, and no matrix of this rank is nearer
    error = (after.M - before.M).norm()
    torch.testing.assert_close(error, (SINGULAR[rank:] ** 2).sum().sqrt(), rtol=0, atol=1e-5)
    assert torch.equal(after.z, before.z)
    assert f"{stats.energy_retained:.2%}".endswith("%")


def test_each_memory_for_itself():
    strong, weak = matrix(SINGULAR), matrix(SINGULAR[:1] / 1000, seed=1)
    empty = torch.zeros(6, 8)
    together, stats = svd_cleaning(state_of(torch.stack([strong, weak, empty])))
    assert stats.singular_values_before.shape == (1, 1, 3, 6)
    for i, alone in enumerate((strong, weak)):
        expected, _ = svd_cleaning(state_of(alone))
        torch.testing.assert_close(together.M[0, 0, i], expected.M[0, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(together.M[0, 0, 1], weak, rtol=0, atol=1e-6)  # not noise beside the strong one
    assert not together.M[0, 0, 2].any()


@pytest.mark.parametrize("store", [None, Multi(2), Routed(orthogonal_basis("identity", 6))])
def test_noise_goes_and_facts_stay(store):
    draw = torch.Generator().manual_seed(0)
    facts = 5 * torch.eye(6)[None, :3, None]
    _, state = scan(facts, facts, facts, feature_map="relu", segment_size=2, store=store)
    noisy = state._replace(M=state.M + 0.1 * torch.randn(state.M.shape, generator=draw) * state.M.any((-1, -2), True))
    clean, _ = svd_cleaning(noisy, energy_threshold=0.99)
    error, noise = ((s.M - state.M).norm() for s in (clean, noisy))
    assert error < 0.9 * noise


def test_an_empty_memory_is_an_error_and_so_are_impossible_numbers():
    with pytest.raises(RuntimeError, match="the memory is empty"):
        svd_cleaning(state_of(torch.zeros(6, 8)))
    for options in ({"energy_threshold": 0.0}, {"energy_threshold": 1.1}, {"max_rank": 0}):
        with pytest.raises(ValueError, match="must be in"):
            svd_cleaning(state_of(matrix(SINGULAR)), **options)
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match="rule 'slot'"):
        svd_cleaning(scan(q, q, q, rule="slot")[1])


def test_no_gradient_passes():
    q = torch.randn(1, 5, 1, 4, requires_grad=True)
    state, stats = svd_cleaning(scan(q, q, q)[1])
    assert not state.M.requires_grad
    assert not state.z.requires_grad
    assert not stats.singular_values_before.requires_grad


def test_the_delta_rule_corrects_against_the_cleaned_memory():
    q = torch.randn(1, 10, 1, 6, generator=torch.Generator().manual_seed(0))
    _, state = scan(q, q, q, rule="delta", segment_size=8)
    clean, _ = svd_cleaning(state, max_rank=1)
    known = read(q, clean, rule="delta")
    _, after = scan(q[:, :1], q[:, :1], known[:, :1], clean, rule="delta", segment_size=8)
    torch.testing.assert_close(after.M, clean.M)  # what it knows already is not written again


def test_memories_of_several_layers_have_one_statistics():
    states = [state_of(matrix(SINGULAR)), state_of(torch.zeros(6, 8)), state_of(matrix(SINGULAR, seed=1))]
    cleaned, stats = svd_cleaning_of_all(states, max_rank=2)
    for state, after in zip(states, cleaned, strict=True):
        if state.M.any():
            torch.testing.assert_close(after.M, svd_cleaning(state, max_rank=2)[0].M)
        else:
            assert not after.M.any()
    alone = svd_cleaning(states[0], max_rank=2)[1]
    assert stats[:2] == alone[:2]
    assert stats.energy_retained == pytest.approx(alone.energy_retained)
    assert stats.singular_values_before.shape == (3, *alone.singular_values_before.shape)


def test_policies():
    with pytest.raises(ValueError, match="at least 1, not 0; for no cleaning take never"):
        every(0)
    before, after = state_of(matrix(SINGULAR)), state_of(matrix(SINGULAR))._replace(written=torch.tensor([120]))
    assert not never(before, after)
    assert [every(n)(before, after) for n in (10, 50, 60, 120, 121)] == [True, False, True, True, False]
    assert when_rank_exceeds(2.0)(before, after)
    assert not when_rank_exceeds(4.0)(before, after)
    answers = iter([True, False])
    policy = when_idle(lambda: next(answers))
    assert [policy(before, after), policy(before, after)] == [True, False]
