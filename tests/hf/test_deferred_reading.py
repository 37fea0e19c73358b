"""SenriModel.read leaves out the layers that only look back; what was left out is made up for exactly."""

import itertools
import random

import pytest
import torch

import senri.hf.model as modeling

from ..conftest import STORES

STEPS = 60
EXACT = {"rtol": 1e-9, "atol": 1e-9}
HEAD = {"memory_readout": "head", "update_rule": "delta_token", "write_gate": "hidden"}
CASES = [
    HEAD,
    {**HEAD, "num_memory_layers": 1},  # one layer below, the rest waits
    {**HEAD, "num_memory_layers": 1, "first_memory_layer": 0},  # every layer waits
    {**HEAD, "num_memory_layers": 1, "first_memory_layer": 2},  # only the last layer waits
    {**HEAD, "num_sink_tokens": 0},
    {**HEAD, "num_sink_tokens": 3},
    {**HEAD, "memory_context_size": 5},
    {**HEAD, "memory_conv_size": 3},
    {**HEAD, "write_gate": "none"},
    {**HEAD, "update_rule": "slot", "memory_num_slots": 7},
    {**HEAD, "update_rule": "slot", "memory_context_size": 5, "num_memory_layers": 1},
    {**HEAD, "update_rule": "slot", "write_gate": "none"},
    *({**HEAD, "update_rule": rule, "write_gate": gate} for rule in ("linear", "delta", "gated_delta")
      for gate in ("none", "hidden")),
    {**HEAD, "sliding_window_size": 1},
    {**HEAD, "sliding_window_size": 40},
    {**HEAD, "write_gate": "surprise"},  # all below: read() is a forward
    {**HEAD, "memory_readout": "layer"},
    {"memory_gate": "infini", "memory_head_dim": 8},
    {"num_memory_layers": 0},
    *({**HEAD, "update_rule": "linear", "memory_context_size": 4, **store} for store in STORES),
]  # fmt: skip


def name(options) -> str:
    return "-".join(f"{value}" for key, value in options.items() if HEAD.get(key) != value) or "plain"


def read(model, ids, cuts, cache=None):
    cache = model.model.new_cache() if cache is None else cache
    for start, stop in itertools.pairwise([0, *cuts, ids.shape[1]]):
        model.model.read(ids[:, start:stop], cache)
    return cache


def assert_same(left, right):
    a, b = left.named_tensors(), right.named_tensors()
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], **EXACT, msg=lambda m, key=key: f"{key}: {m}")
    assert (left.tokens_read, left.columns) == (right.tokens_read, right.columns)


def never(*_args, **_kwargs):
    raise AssertionError("a layer ran that should have waited")


@pytest.mark.parametrize("steps", [1, 8, 17, 21, STEPS])
@pytest.mark.parametrize("options", CASES, ids=name)
@torch.no_grad()
def test_reading_ends_in_the_state_of_a_forward(make_senri, tokens, options, steps):
    model, ids = make_senri(**options), tokens(2, steps)
    whole = model.model.new_cache()
    model(ids, past_key_values=whole)
    chance = random.Random(str(options))
    cuts = sorted(chance.sample(range(1, steps), min(5, steps - 1)))
    for cut in ([], [1] if steps > 1 else [], cuts, range(1, steps)):
        cache = read(model, ids, cut)
        model.model.catch_up(cache)
        assert_same(cache, whole)


@pytest.mark.parametrize(
    "options", [{"update_rule": rule} for rule in ("delta_token", "linear", "slot")] + STORES, ids=name
)
@torch.no_grad()
def test_what_a_closed_gate_leaves_out_is_left_out_of_both(make_senri, tokens, options):
    """Reading computes the written pairs alone, and where a run of them ends."""
    model, ids = make_senri(**{**HEAD, "update_rule": "linear", **options, "memory_num_slots": 40}), tokens(2, STEPS)
    for memory in model.model.memories.values():
        if memory.writes:
            memory.write_gate.out_proj.weight.mul_(30)
            memory.write_gate.out_proj.bias.zero_()
    whole = model.model.new_cache()
    model(ids, past_key_values=whole)
    if options.get("update_rule") == "slot":
        states = [memory.slots for memory in whole.memories.values()]
        assert all(slots.run.amax() > 3 for slots in states), "several runs"
        assert any((slots.strength > 0).sum() > slots.run.amax(-1).sum() for slots in states), "of several tokens"
    for cuts in ([], [1], [13, 14, 30], range(1, STEPS)):
        cache = read(model, ids, cuts)
        model.model.catch_up(cache)
        assert_same(cache, whole)


@pytest.mark.parametrize("options", CASES, ids=name)
@torch.no_grad()
def test_a_forward_catches_up_by_itself(make_senri, tokens, options):
    model, ids = make_senri(**options), tokens(2, STEPS)
    whole = model(ids).logits
    for begin, goes_on in ((20, 25), (40, 41), (7, 58)):
        cache = read(model, ids[:, :begin], [3])
        middle = model(ids[:, begin:goes_on], past_key_values=cache).logits
        read(model, ids[:, goes_on : STEPS - 1], [], cache)  # and waits again
        last = model(ids[:, STEPS - 1 :], past_key_values=cache).logits
        torch.testing.assert_close(middle, whole[:, begin:goes_on], **EXACT)
        torch.testing.assert_close(last, whole[:, STEPS - 1 :], **EXACT)


@pytest.mark.parametrize("piece", [1, 2, 8])
@torch.no_grad()
def test_catching_up_in_pieces(make_senri, tokens, monkeypatch, piece):
    model, ids = make_senri(**HEAD), tokens(1, STEPS)
    whole = model.model.new_cache()
    model(ids, past_key_values=whole)
    cache = read(model, ids, [9, 30])
    monkeypatch.setattr(modeling, "INFERENCE_PIECE", piece)
    model.model.catch_up(cache)
    assert_same(cache, whole)


@torch.no_grad()
def test_the_upper_layers_wait_until_they_are_needed(make_senri, tokens, monkeypatch):
    model, ids = make_senri(**HEAD, num_memory_layers=1), tokens(1, STEPS)
    cache = read(model, ids[:, :1], [])
    for layer in model.model.layers[1:]:
        monkeypatch.setattr(layer, "forward", never)
    read(model, ids[:, 1:], [20], cache)
    # (3 - 1) layers look back over 6 tokens each
    assert cache.state.deferred.shape == (1, 12, 32)
    model.model.flush(cache)  # the end of a text: nobody will look back at it
    assert cache.state.deferred is None
    model.model.catch_up(cache)
    monkeypatch.undo()
    whole = model.model.new_cache()
    model(ids, past_key_values=whole)
    model.model.flush(whole)
    assert_same(cache, whole)
    # the next text begins like the first
    follow = tokens(1, 30, seed=3)
    torch.testing.assert_close(
        model(follow[:, 20:], past_key_values=read(model, follow[:, :20], [4], cache)).logits,
        model(follow, past_key_values=whole).logits[:, 20:],
        **EXACT,
    )


@torch.no_grad()
def test_a_fork_that_catches_up_leaves_the_other_waiting(make_senri, tokens):
    model, ids = make_senri(**HEAD), tokens(1, STEPS)
    cache = read(model, ids, [9])
    fork = cache.fork()
    model.model.catch_up(fork)
    assert fork.state.deferred is None
    assert cache.state.deferred is not None
    model.model.catch_up(cache)
    assert_same(cache, fork)


@torch.no_grad()
def test_padded_rows_are_read_by_a_forward(make_senri, tokens):
    model, ids = make_senri(**HEAD), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole, cache = model.model.new_cache(), model.model.new_cache()
    model(ids, attention_mask=mask, past_key_values=whole)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    read(model, ids[:, 8:], [], cache)
    assert cache.state.deferred is None
    assert_same(cache, whole)


@torch.no_grad()
def test_wrong_rows_are_refused_and_change_nothing(make_senri, tokens):
    model, ids = make_senri(**HEAD), tokens(2, 20)
    cache = read(model, ids, [9])
    before = cache.state
    with pytest.raises(ValueError, match=r"1 row\(s\) but the running state has 2"):
        model.model.read(ids[:1], cache)
    assert cache.state is before


@torch.no_grad()
def test_a_session_reads_so(make_senri, tokens, tmp_path):
    model, ids = make_senri(**HEAD), tokens(1, STEPS)
    model.reset_memory()
    model.read(ids, piece_size=16)
    assert model.session.state.deferred is not None
    saved = tmp_path / "a.senri"
    model.save_memory(saved)  # what waits is not saved: it is made up for
    model.read(tokens(1, 9, seed=5), piece_size=4)
    later = model(tokens(1, 5, seed=6)).logits
    model.load_memory(saved)
    model(tokens(1, 9, seed=5))
    torch.testing.assert_close(model(tokens(1, 5, seed=6)).logits, later, **EXACT)
    state = model.get_memory_state()
    assert state.state.deferred is None
    model.set_memory_state(state)
