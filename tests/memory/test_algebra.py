"""Sums and differences of linear memories, compositions of the delta rules' transitions."""

import pytest
import torch

from senri.memory import Banks, Multi, Routed, orthogonal_basis, scan
from senri.memory.algebra import Transition, apply, compose, forget, merge, transition

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ROUTED = Routed(orthogonal_basis("random", 6))


def inputs(steps=15, seed=0):
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, steps, 2, width, dtype=torch.float64, generator=draw) for width in (6, 3))
    return k, v, torch.rand(2, steps, 2, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("store", [None, ROUTED])
def test_shards_sum_to_the_stream(store):
    k, v, beta = inputs()
    _, whole = scan(k, k, v, beta=beta, store=store)
    cuts = [slice(0, 4), slice(4, 5), slice(5, 15)]
    shards = [scan(k[:, c], k[:, c], v[:, c], beta=beta[:, c], store=store)[1] for c in cuts]
    merged = merge(shards)
    torch.testing.assert_close(merged.M, whole.M, **EXACT)
    torch.testing.assert_close(merged.z, whole.z, **EXACT)
    assert torch.equal(merged.written, whole.written)


def test_shards_of_a_store_that_takes_turns_sum_up_in_all():
    k, v, _ = inputs()
    options = {"store": Multi(3), "segment_size": 4}
    _, whole = scan(k, k, v, **options)
    merged = merge([scan(k[:, c], k[:, c], v[:, c], **options)[1] for c in (slice(0, 6), slice(6, 15))])
    torch.testing.assert_close(merged.M.sum(2), whole.M.sum(2), **EXACT)


def test_a_shard_that_has_faded_weighs_less():
    k, v, _ = inputs()
    log_alpha = torch.full((2, 15, 2), -0.1, dtype=torch.float64)
    _, whole = scan(k, k, v, log_alpha=log_alpha)
    shards = [scan(k[:, c], k[:, c], v[:, c], log_alpha=log_alpha[:, c])[1] for c in (slice(0, 10), slice(10, 15))]
    faded = torch.tensor(-0.1 * 5).double().exp().item()
    torch.testing.assert_close(merge(shards, [faded, 1.0]).M, whole.M, **EXACT)


@pytest.mark.parametrize("store", [None, ROUTED])
def test_what_is_taken_back_was_never_written(store):
    k, v, beta = inputs()
    _, state = scan(k, k, v, beta=beta, delay=2, store=store)
    left = [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    _, expected = scan(k[:, left], k[:, left], v[:, left], beta=beta[:, left], delay=2, store=store)
    found = forget(state, k[:, 3:6], v[:, 3:6], beta=beta[:, 3:6], store=store)
    torch.testing.assert_close(found.M, expected.M, **EXACT)
    torch.testing.assert_close(found.z, expected.z, **EXACT)
    assert torch.equal(found.written, state.written)
    assert found.pending is state.pending


@pytest.mark.parametrize("feature_map", [None, "dpfp"])
@pytest.mark.parametrize("rule", ["delta_token", "gated_delta"])
def test_a_stretch_is_an_affine_map_of_the_memory(rule, feature_map):
    k, v, beta = inputs()
    gates = {"beta": beta, "mask": torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) > 0.2}
    if rule == "gated_delta":
        gates["log_alpha"] = -torch.rand(2, 15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = {"rule": rule, "feature_map": feature_map}
    _, state = scan(*inputs(seed=3)[:1] * 2, inputs(seed=3)[1], **options)

    def step(start, stop):
        part = slice(start, stop)
        return transition(k[:, part], v[:, part], chunk_size=4, **{n: g[:, part] for n, g in gates.items()}, **options)

    _, expected = scan(k, k, v, state, **gates, **options)
    for found in (apply(state, step(0, 15)), apply(state, compose(compose(step(0, 4), step(4, 11)), step(11, 15)))):
        torch.testing.assert_close(found.M, expected.M, **EXACT)
        assert torch.equal(found.written, expected.written)
    associative = compose(step(0, 4), compose(step(4, 11), step(11, 15)))
    for left, right in zip(associative, step(0, 15), strict=True):
        torch.testing.assert_close(left, right, **EXACT)


def test_an_empty_stretch_changes_nothing():
    k, v, _ = inputs(steps=0)
    step = transition(k, v, rule="delta_token")
    torch.testing.assert_close(step.A, torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6), rtol=0, atol=0)
    assert isinstance(step, Transition)
    assert not step.B.any()


def test_what_makes_no_sense_is_named():
    k, v, _ = inputs()
    _, linear = scan(k, k, v)
    _, delta = scan(k, k, v, rule="delta")
    _, delayed = scan(k, k, v, delay=2)
    _, narrow = scan(k[..., :4], k[..., :4], v)
    with pytest.raises(ValueError, match="only memories of rule 'linear'"):
        merge([linear, delta])
    with pytest.raises(ValueError, match="are pending cannot be added"):
        merge([linear, delayed])
    with pytest.raises(ValueError, match="cannot be added"):
        merge([linear, narrow])
    with pytest.raises(ValueError, match="not 0 and 0"):
        merge([])
    with pytest.raises(ValueError, match="not 1 and 2"):
        merge([linear], [1.0, 2.0])
    with pytest.raises(ValueError, match="made by another rule than 'linear'"):
        forget(delta, k, v)
    with pytest.raises(ValueError, match="store 'banks' does not know where"):
        forget(linear, k, v, store=Banks(2))
    with pytest.raises(ValueError, match="rule 'linear' has no affine transition"):
        transition(k, v, rule="linear")
