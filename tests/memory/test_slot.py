"""Rule slot: a pair a slot, the weakest gives way, what is written under the same key again replaces what was."""

import math

import pytest
import torch

from senri.memory import SlotParameters, read, scan

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHARP = SlotParameters(*(torch.tensor([x], dtype=torch.float64) for x in (60.0, 0.8, 100.0)))


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def write(keys, values, num_slots, beta=None, state=None, **gates):
    """Pairs ``[T, D]`` written one by one; the state."""
    gates = {n: torch.tensor(x, dtype=torch.float64)[None, :, None] for n, x in {"beta": beta, **gates}.items() if x}
    k, v = keys[None, :, None], values[None, :, None]
    return scan(torch.zeros_like(k), k, v, state, rule="slot", num_slots=num_slots, slot=SHARP, **gates)[1]


def ask(state, queries, null=10.0):
    """Reads ``[T, D]``."""
    logits = torch.full((1, len(queries), 1), null, dtype=torch.float64)
    return read(queries[None, :, None], state, rule="slot", slot=SHARP, null=logits)[0, :, 0]


def test_what_was_written_is_read():
    state = write(eye(8), 3 * eye(8).flip(0), num_slots=8)
    torch.testing.assert_close(ask(state, 5 * eye(8)), 3 * eye(8).flip(0), rtol=0, atol=1e-9)
    assert (state.slots.strength == 1).all()


def test_what_was_never_written_is_not_found():
    state = write(eye(8)[:3], eye(8)[:3], num_slots=8)
    assert ask(state, eye(8)[3:]).abs().max() < 1e-3  # 3 / (3 + exp(10))


def test_the_logit_of_nothing_decides():
    state = write(eye(2)[:1], torch.ones(1, 2, dtype=torch.float64), num_slots=4)
    for null in (40.0, 60.0, 80.0):
        found = ask(state, eye(2)[:1], null)
        torch.testing.assert_close(found, torch.full_like(found, 1 / (1 + math.exp(null - 60))), **EXACT)


def test_the_end_is_said_by_a_memory_that_holds_anything():
    """Beside the slots, as loud as its logit is; to no query of an empty memory."""
    one, numbers = eye(4)[:1], {"rule": "slot", "null": torch.full((1, 1, 1), 10.0, dtype=torch.float64)}
    bias = torch.tensor([2.0], dtype=torch.float64)
    slot = SHARP._replace(end_key=30 * eye(4)[1:2], end_bias=bias, end_value=5 * eye(4)[3:])
    for empty, state in ((False, write(one, one, num_slots=3)), (True, write(one, one, num_slots=3, beta=[0.0]))):
        asked = read(eye(4)[1:2][None, :, None], state, slot=slot, **numbers)[0, 0, 0, 3]
        assert asked == (0 if empty else pytest.approx(5 / (1 + math.exp(10 - 32) + math.exp(0 - 32)), rel=1e-12))
        other = read(one[None, :, None], state, slot=slot, **numbers)[0, 0, 0]
        assert other[3] < 1e-6
        assert (other[0] > 0.99) != empty


def test_a_run_is_read_in_its_order():
    """What stands inside a run costs more, unless the value before it has just been said; its beginning never does."""
    keys, values = torch.eye(6, 4, dtype=torch.float64), eye(6)
    keys[3:] = eye(4)[:3]  # a second run of the same keys
    keys = keys + 1e-3
    beta = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]  # the fourth is not written and ends the first run
    slot = SHARP._replace(slope=torch.zeros(1).double(), jump_cost=torch.tensor([4.0], dtype=torch.float64))
    slot = slot._replace(same_at=torch.full((1,), 1e9, dtype=torch.float64))
    k, v = keys[None, :, None], values[None, :, None]
    gate = torch.tensor(beta, dtype=torch.float64)[None, :, None]
    state = scan(torch.zeros_like(k), k, v, rule="slot", num_slots=8, slot=slot, beta=gate)[1]
    # the same query, behind each of the values: both runs hold the key of their second pair
    asked = eye(4)[1:2].expand(6, 4)[None, :, None]
    found = read(asked, state, rule="slot", slot=slot, said=eye(6)[None, :, None])[0, :, 0]
    free = read(asked, state, rule="slot", slot=slot)[0, :, 0]
    odds = (found[:, 1] / found[:, 4]).log() - (free[:, 1] / free[:, 4]).log()
    # the second pair of the first run costs 4 but behind its first; the first of the second run never
    torch.testing.assert_close(odds, torch.tensor([0.0, -4.0, -4.0, -4.0, -4.0, -4.0]).double(), **EXACT)


def test_the_last_value_of_a_key_is_the_one_that_counts():
    one = eye(4)[[0, 1, 0, 0]]
    state = write(one, torch.arange(1.0, 5.0, dtype=torch.float64)[:, None].expand(4, 4), num_slots=8)
    torch.testing.assert_close(ask(state, eye(4)[:2])[:, 0], torch.tensor([4.0, 2.0]).double(), rtol=1e-6, atol=0)
    assert (state.slots.strength > 0.9).sum() == 2, "the older ones are as good as gone"


def test_a_key_of_a_little_likeness_leaves_the_others_alone():
    near = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)  # cosine 0.6
    state = write(near, eye(2), num_slots=2)
    assert (state.slots.strength > 1 - 1e-6).all()


def test_a_weak_write_weakens_little_and_is_heard_less():
    state = write(eye(4)[[0, 0, 0]], eye(4)[[0, 1, 1]], num_slots=4, beta=[1.0, 0.0, 0.25])
    old, new = ask(state, eye(4)[:1])[0, :2]
    assert new / old == pytest.approx(0.25 / 0.75, rel=1e-4)


@pytest.mark.parametrize("pieces", [[20], [7, 13], [1] * 20])
def test_when_all_slots_are_taken_the_weakest_gives_way(pieces):
    keys, state = eye(20), None
    for part in keys.split(pieces):
        state = write(part, part, num_slots=6, state=state)
    # none has anything in common: all are as strong, and the oldest is given up
    assert state.slots.strength.shape == (1, 1, 6)
    found = ask(state, keys).diagonal()
    assert (found > 0.99).tolist() == [False] * 14 + [True] * 6
    assert state.written.tolist() == [20]


def test_what_was_replaced_gives_way_first():
    keys = eye(8)[[0, 1, 2, 1, 3]]
    state = write(keys, keys, num_slots=4)
    torch.testing.assert_close(ask(state, eye(8)[:4]), eye(8)[:4], rtol=0, atol=1e-6)


def test_what_was_written_weakly_gives_way_first():
    keys = eye(8)[:5]
    state = write(keys, keys, num_slots=4, beta=[1.0, 1.0, 0.5, 1.0, 1.0])
    assert (ask(state, keys).diagonal() > 0.99).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("pieces", [[6], [2, 4], [1] * 6])
def test_what_matters_least_gives_way_first_however_strong(pieces):
    keys, importance, state, done = eye(6), [0.5, 90.0, -0.2, 0.8, -300.0, 0.7], None, 0
    for part in keys.split(pieces):
        state = write(part, part, num_slots=3, state=state, importance=importance[done : done + len(part)])
        done += len(part)
    # the third one goes when the fourth comes... and so on; what is new always finds a place
    assert (ask(state, keys).diagonal() > 0.99).tolist() == [False, True, False, True, False, True]
    assert state.slots.importance[0, 0].tolist() == [90.0, 0.8, 0.7]
    assert (state.slots.strength == 1).all(), "reading does not know of it"


def test_what_was_replaced_gives_way_before_what_matters_less():
    keys = eye(4)[[0, 1, 0, 2, 3]]
    state = write(keys, keys, num_slots=3, importance=[3.0, 0.0, 3.0, 2.0, 2.0])
    assert (ask(state, eye(4)).diagonal() > 0.99).tolist() == [True, False, True, True]


def test_slots_stand_in_the_order_of_their_writing():
    state = write(eye(6)[:4], eye(6)[:4], num_slots=6)
    torch.testing.assert_close(state.slots.K[0, 0, 2:], eye(6)[:4], **EXACT)
    assert not state.slots.strength[0, 0, :2].any()


def test_a_closed_gate_writes_nothing():
    keys = eye(5)
    state = write(keys, keys, num_slots=5, beta=[1.0, 0.0, 0.0, 1.0, 0.0])
    assert (state.slots.strength > 0).sum() == 2
    kept = write(keys[[0, 3]], keys[[0, 3]], num_slots=5)
    torch.testing.assert_close(state.M, kept.M, **EXACT)
    torch.testing.assert_close(state.slots.K, kept.slots.K, **EXACT)


def test_tokens_written_one_after_the_other_do_not_weaken_each_other():
    """One value, whose keys, a token apart, are alike."""
    same = eye(2)[[0] * 7]
    beta = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    for pieces in ([7], [1] * 7, [1, 4, 2], [3, 4]):
        state, done = None, 0
        for part in same.split(pieces):
            state = write(part, part, num_slots=6, state=state, beta=beta[done : done + len(part)])
            done += len(part)
        assert state.slots.run[0, 0].tolist() == [0, 1, 1, 2, 2, 2]
        strength = state.slots.strength[0, 0]
        assert strength[:3].max() < 1e-6, "the second value replaces the first"
        assert strength[3:].tolist() == [1.0] * 3
        assert not state.slots.running.any()


def test_a_call_that_writes_nothing_is_as_any_other():
    """Token by token without gradients, where closed gates take a short cut, as all at once with them."""
    rng = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, 8, heads, 4, dtype=torch.float64, generator=rng) for heads in (1, 1, 3))
    beta = torch.tensor([[1, 1, 0, 0, 0.5, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0, 0]]).double()[..., None]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0, 1]]).bool()
    importance, null = (torch.randn(2, 8, heads, dtype=torch.float64, generator=rng) for heads in (1, 3))
    each = {"beta": beta, "mask": mask, "importance": importance, "null": null}
    expected, at_once = scan(q, k, v, rule="slot", num_slots=3, slot=SHARP, **each)
    outs, state = [], None
    for t in range(8):
        part = slice(t, t + 1)
        gates = {name: x[:, part] for name, x in each.items()}
        with torch.no_grad():
            out, state = scan(q[:, part], k[:, part], v[:, part], state, rule="slot", num_slots=3, slot=SHARP, **gates)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)
    assert torch.equal(state.written, at_once.written)
    for name in ("K", "strength", "run", "running", "importance"):
        torch.testing.assert_close(getattr(state.slots, name), getattr(at_once.slots, name), **EXACT)
    torch.testing.assert_close(state.M, at_once.M, **EXACT)
    with torch.no_grad():
        closed = scan(
            q[:, :0], k[:, :0], v[:, :0], state, rule="slot", slot=SHARP, **{n: x[:, :0] for n, x in each.items()}
        )
    assert closed[0].shape == (2, 0, 3, 4)
    assert torch.equal(closed[1].slots.running, state.slots.running)


def test_padding_is_no_end_of_a_run():
    beta = torch.ones(1, 6, 1, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0]])
    k = torch.ones(1, 6, 1, 2, dtype=torch.float64)
    state = scan(k, k, k, rule="slot", num_slots=4, slot=SHARP, beta=beta, mask=mask)[1]
    assert state.slots.run[0, 0].tolist() == [0, 0, 1, 1]
    assert state.slots.running.all()


def test_a_state_says_how_large_it_is():
    state = write(eye(6), eye(6), num_slots=10)
    assert state.nbytes == 10 * (6 + 6 + 1 + 1 + 1) * 8 + 1 + 8
    with pytest.raises(ValueError, match="made by another rule than 'delta_token'"):
        scan(*(torch.zeros(1, 1, 1, 6, dtype=torch.float64) for _ in range(3)), state, rule="delta_token")
