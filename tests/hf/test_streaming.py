"""Invariant 1 at model level: how a text is cut into calls changes neither logits nor the final state."""

import itertools
import random

import pytest
import torch

import senri.hf.model as modeling
from senri.memory import RULES

from ..conftest import STORES

STEPS = 30
EXACT = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": gate, "memory_conv_size": conv}
    for rule, readout, gate, conv in itertools.product(RULES, ("layer", "head"), ("none", "hidden", "surprise"), (0, 3))
]
INFINI = [{"memory_gate": "infini", "memory_head_dim": 8, "update_rule": rule, "memory_conv_size": 2} for rule in RULES]
CONTEXT = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": gate, "memory_context_size": 5}
    for rule in RULES
    for readout, gate in (("layer", "hidden"), ("head", "none"), ("head", "surprise"))
]
CONTEXT.append({"memory_gate": "infini", "memory_head_dim": 8, "memory_context_size": 3})
MANY = [
    {"memory_readout": readout, "write_gate": gate, keys: 4} | store
    for store in STORES
    for readout, gate, keys in (
        ("layer", "surprise", "memory_conv_size"),
        ("head", "hidden", "memory_context_size"),
    )
]
MANY += [{"memory_gate": "infini", "memory_head_dim": 8, "memory_context_size": 3} | store for store in STORES[-2:]]


def name(options) -> str:
    return "-".join(str(value) for value in options.values())


def in_pieces(model, ids, cuts):
    """Logits of ``ids`` read in calls that end at ``cuts``, and the cache afterwards."""
    cache, parts = model.model.new_cache(), []
    for start, stop in itertools.pairwise([0, *cuts, ids.shape[1]]):
        parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return torch.cat(parts, 1), cache


def assert_caches_equal(left, right, **tolerance):
    left_tensors, right_tensors = left.named_tensors(), right.named_tensors()
    assert left_tensors.keys() == right_tensors.keys()
    for key, tensor in left_tensors.items():
        torch.testing.assert_close(tensor, right_tensors[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance)
    assert left.tokens_read == right.tokens_read
    assert left.columns == right.columns


@pytest.mark.parametrize("options", [*OPTIONS, *INFINI, *CONTEXT, *MANY], ids=name)
def test_any_cut_gives_the_same(make_senri, tokens, options):
    model = make_senri(**options)
    ids = tokens(2, STEPS)
    chance = random.Random(str(options))
    cuts = [
        list(range(1, STEPS)),  # token by token
        [7, 14],  # at the window
        *(sorted(chance.sample(range(1, STEPS), chance.randint(1, 6))) for _ in range(2)),
    ]
    with torch.enable_grad():  # without gradient one call would be cut inside
        whole, cache = in_pieces(model, ids, [])
    with torch.no_grad():
        for cut in cuts:
            logits, other = in_pieces(model, ids, cut)
            torch.testing.assert_close(logits, whole, **EXACT, msg=lambda m, cut=cut: f"{cut}: {m}")
            assert_caches_equal(other, cache, **EXACT)
    memory, _ = cache.state.layers[1].memory
    assert memory.written.tolist() == [STEPS - 7] * 2
    assert memory.M.abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64])
@torch.no_grad()
def test_the_chunk_size_changes_nothing(make_senri, tokens, chunk_size):
    ids = tokens(2, STEPS)
    for options in [{"update_rule": rule, "segment_size": 8} for rule in RULES] + STORES:
        logits, cache = in_pieces(make_senri(chunk_size=4, **options), ids, [])
        other_logits, other = in_pieces(make_senri(chunk_size=chunk_size, **options), ids, [])
        torch.testing.assert_close(other_logits, logits, **EXACT)
        assert_caches_equal(other, cache, **EXACT)


@pytest.mark.parametrize("piece", [1, 5, 7, 8])
@torch.no_grad()
def test_inner_pieces_change_nothing(make_senri, tokens, monkeypatch, piece):
    model, ids = (
        make_senri(update_rule="gated_delta", memory_readout="head", write_gate="surprise"),
        tokens(2, STEPS),
    )
    whole = model(ids, output_hidden_states=True)
    monkeypatch.setattr(modeling, "INFERENCE_PIECE", piece)
    monkeypatch.setattr(modeling, "SURPRISE_BLOCK", 3)
    cut = model(ids, output_hidden_states=True)
    torch.testing.assert_close(cut.logits, whole.logits, **EXACT)
    assert_caches_equal(cut.past_key_values, whole.past_key_values, **EXACT)
    assert len(cut.hidden_states) == len(whole.hidden_states) == 4
    for ours, theirs in zip(cut.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("num_sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 2, 29, 30, 64])
@torch.no_grad()
def test_any_window_streams(make_senri, tokens, window, num_sinks):
    options = {"sliding_window_size": window, "num_sink_tokens": num_sinks, "update_rule": "delta_token"}
    model, ids = make_senri(**options), tokens(2, STEPS)
    whole, cache = in_pieces(model, ids, [])
    logits, other = in_pieces(model, ids, [1, 2, 3, 17])
    torch.testing.assert_close(logits, whole, **EXACT)
    assert_caches_equal(other, cache, **EXACT)
    assert cache.state.layers[1].memory.memory.written.tolist() == [max(STEPS - window, 0)] * 2
    assert cache.state.layers[0].keys.shape[2] == min(window - 1, STEPS)


@torch.no_grad()
def test_the_sinks_of_a_state_are_the_first_tokens(make_senri, tokens):
    model, ids = make_senri(num_sink_tokens=2), tokens(2, STEPS)
    start, early, late = (in_pieces(model, ids[:, :n], [])[1] for n in (1, 2, STEPS))
    for first, second, last in zip(start.state.layers, early.state.layers, late.state.layers, strict=True):
        assert first.sink_keys.shape == last.sink_keys.shape == (2, 2, 2, 8)
        assert not first.sink_values[:, :, 1].any(), "the second is not there yet"
        for name in ("sink_keys", "sink_values"):
            torch.testing.assert_close(getattr(last, name), getattr(second, name), **EXACT)
            torch.testing.assert_close(getattr(last, name)[:, :, 0], getattr(first, name)[:, :, 0], **EXACT)
        torch.testing.assert_close(second.sink_values, second.values, **EXACT)
    assert late.state.since_flush.tolist() == [STEPS] * 2


@torch.no_grad()
def test_no_memory_layer_is_a_window_alone(make_senri, tokens):
    model, ids = make_senri(num_memory_layers=0, write_gate="surprise"), tokens(1, STEPS)
    whole, cache = in_pieces(model, ids, [])
    assert cache.memory_nbytes == 0
    torch.testing.assert_close(in_pieces(model, ids, [4, 19])[0], whole, **EXACT)
    model.read(ids)
    model.flush()
    assert model.session.tokens_read == [STEPS]


def test_an_input_without_tokens_is_refused(make_senri, tokens):
    with pytest.raises(ValueError, match="the input has no tokens"):
        make_senri()(tokens(1, 0))


@torch.no_grad()
def test_logits_to_keep_takes_the_last_ones(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 20)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:], **EXACT)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([4, 9])).logits, full[:, [4, 9]], **EXACT)


@torch.no_grad()
def test_a_changed_token_changes_nothing_before_it(make_senri, tokens):
    both = itertools.product(("layer", "head"), ("memory_conv_size", "memory_context_size"), [{}, *STORES])
    for readout, keys, store in both:
        model = make_senri(memory_readout=readout, write_gate="surprise", **{keys: 3}, **store)
        ids = tokens(1, STEPS)
        changed = ids.clone()
        changed[0, 11] = (changed[0, 11] + 1) % 97
        difference = (model(ids).logits - model(changed).logits).abs().amax((0, 2))
        assert difference[:11].max() < 1e-12
        assert difference[11] > 1e-3
        # it has left the window of the last layers long ago: only the memory can still know
        assert difference[-1] > 1e-6


@torch.no_grad()
def test_a_fork_goes_on_independently(make_senri, tokens):
    model, ids = make_senri(), tokens(1, STEPS)
    cache = model(ids[:, :15]).past_key_values
    fork = cache.fork()
    model(tokens(1, 9, seed=5), past_key_values=fork)
    assert cache.tokens_read == [15]
    logits = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 15:], **EXACT)


@pytest.mark.parametrize("keys", ["memory_conv_size", "memory_context_size"])
@torch.no_grad()
def test_the_state_does_not_grow(make_senri, tokens, keys):
    model = make_senri(update_rule="delta", write_gate="surprise", **{keys: 3})
    cache = model(tokens(1, 20)).past_key_values
    size = cache.nbytes
    model(tokens(1, 200), past_key_values=cache)
    assert cache.nbytes == size
    assert cache.tokens_read == [220]
    # two layers, two memories of 8 x 8 with z, each twice (delta's snapshot), and the counter
    assert cache.memory_nbytes == 2 * (2 * 2 * (8 * 8 + 8) * 8 + 8)


@pytest.mark.parametrize("keys", [{"memory_conv_size": 3}, {"memory_context_size": 5}], ids=["conv", "context"])
@torch.no_grad()
def test_real_weights(make_real, real_ids, keys):
    model = make_real(random=True, update_rule="gated_delta", write_gate="hidden", first_memory_layer=3, **keys)
    ids = real_ids(200_000, 90)
    whole, cache = in_pieces(model, ids, [])
    logits, other = in_pieces(model, ids, [1, 2, 30, 64, 65, 81])
    torch.testing.assert_close(logits, whole, rtol=0, atol=2e-3)
    assert_caches_equal(other, cache, rtol=1e-3, atol=2e-3)
    for layer in model.config.memory_layers:
        model.model.layers[layer].memory.o_proj.weight.zero_()
    spoken = (model(ids).logits - whole).abs().amax((0, 2))
    assert spoken[:32].max() < 1e-3
    assert spoken[33:].min() > 0.05, "the memory is silent here"
