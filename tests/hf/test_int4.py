"""Decoding with weights in four bits: what it loses, when it is taken, and that the full weights stay what they are."""

import copy

import pytest
import torch

import senri.hf.fused_layer as fused_layer
from senri import convert_to_senri, load_base
from senri.layers import FEW, GROUP, OFF_LEVEL, Int4Linear

HEAD = {"memory_readout": "head", "update_rule": "slot", "memory_context_size": 5, "sliding_window_size": 8}
SMALL = {"num_memory_layers": 2, "first_memory_layer": 1, "memory_layer_interval": 1, "memory_num_heads": 1,
         "memory_head_dim": 8, "memory_num_slots": 16}  # fmt: skip


def on_levels(weight):
    """The nearest of 16 evenly spread levels in each group, as Q4_1 has them, rounded to bfloat16 as the base is."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return (low + ((groups - low) / (high - low) * 15).round() * (high - low) / 15).flatten(1).bfloat16().float()


@pytest.fixture
def make(make_base, randomise):
    """A float32 model whose layers are of shapes that the kernel takes; ``levels``: with weights on four-bit levels."""

    def build(decoding_weights, *, levels, **fields):
        base = make_base(dtype=torch.float32, intermediate_size=64, **fields)
        model = randomise(convert_to_senri(base, **{**HEAD, **SMALL, "decoding_weights": decoding_weights}))
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear) and levels and module.in_features in (32, 64):
                    module.weight.data = on_levels(module.weight.data)
        return model

    return build


@pytest.fixture
def calls(monkeypatch):
    """How often a layer was computed with four-bit weights."""
    found, original = [], fused_layer._in_int4
    monkeypatch.setattr(fused_layer, "_in_int4", lambda *args: found.append(1) or original(*args))
    return found


def one_by_one(model, ids):
    cache, out = model.model.new_cache(), []
    for i in range(ids.shape[1]):
        out.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def test_the_product_is_that_of_the_rounded_weights():
    x, layers = torch.randn(3, 64).bfloat16(), [torch.nn.Linear(64, 16), torch.nn.Linear(64, 32)]
    for bias in (True, False):
        for layer in layers:
            layer.weight.data = on_levels(layer.weight.data)
            layer.bias = layer.bias if bias else None
        form = Int4Linear(*layers)
        assert form.off_level < OFF_LEVEL, "weights on four-bit levels fall on them again"
        exact = torch.cat([copy.deepcopy(layer).double()(x.double()) for layer in layers], -1)
        out = form(x[:, None])
        assert out.shape == (3, 1, 48)
        assert out.dtype == torch.bfloat16
        assert (out[:, 0].double() - exact).norm() < 0.01 * exact.norm()
    torch.nn.init.normal_(layers[0].weight)
    assert Int4Linear(*layers).off_level > 4 * OFF_LEVEL, "any other weights do not"


def test_which_shapes_the_kernel_takes():
    assert Int4Linear.takes(torch.nn.Linear(64, 16), torch.nn.Linear(32, 48))
    assert not Int4Linear.takes(torch.nn.Linear(64, 16), torch.nn.Linear(48, 16))
    assert not Int4Linear.takes(torch.nn.Linear(64, 24))


@torch.no_grad()
def test_auto_takes_them_only_where_nothing_is_lost(make, tokens, calls):
    ids = tokens(1, 20)
    for levels in (False, True):
        full, auto = make("full", levels=levels), make("auto", levels=levels)
        expected, ours = one_by_one(full, ids), one_by_one(auto, ids)
        assert len(calls) == (3 * 19 if levels else 0)  # the first token is a prompt inside the window
        if not levels:
            assert torch.equal(ours, expected)
        assert (ours - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_int4_takes_them_always(make, tokens, calls):
    ids = tokens(1, 20)
    expected, ours = (one_by_one(make(name, levels=False), ids) for name in ("full", "int4"))
    assert len(calls) == 3 * 19
    assert 0.02 < (ours - expected).norm() / expected.norm() < 0.3, "weights that are on no levels lose something"


@torch.no_grad()
def test_for_few_tokens_alone(make, tokens, calls):
    model = make("int4", levels=True)
    for rows, steps in ((1, FEW + 1), (FEW + 1, 1), (1, 20)):
        cache = model(tokens(rows, 9)).past_key_values
        model(tokens(rows, steps), past_key_values=cache)
        assert not calls
    cache = model(tokens(2, 9)).past_key_values
    model(tokens(2, FEW // 2), past_key_values=cache)
    assert len(calls) == 3


def test_not_where_gradients_are_wanted(make, tokens, calls):
    model = make("int4", levels=True)
    cache = model(tokens(1, 9)).past_key_values
    model(tokens(1, 1), past_key_values=cache).logits.sum().backward()
    assert not calls


@torch.no_grad()
def test_not_where_a_layer_is_not_plain(make, tokens, calls):
    """LoRA and hooks want full products; the head then keeps its own too."""
    model, ids = make("int4", levels=True), tokens(1, 12)
    whole = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(one_by_one(model, ids), whole, rtol=1e-4, atol=1e-4)
    assert not calls
    assert not model.packed._made


@torch.no_grad()
def test_shapes_that_the_kernel_does_not_know_stay_full(make_base, randomise, tokens, calls):
    models = [
        randomise(convert_to_senri(make_base(dtype=torch.float32), **{**HEAD, **SMALL, "decoding_weights": name}))
        for name in ("full", "int4")  # an inner width of 48
    ]
    assert torch.equal(*(one_by_one(model, tokens(1, 12)) for model in models))
    assert not calls


@torch.no_grad()
def test_changed_weights_are_packed_anew(make, tokens):
    model, ids = make("int4", levels=True), tokens(1, 12)
    before = one_by_one(model, ids)
    for change in (lambda w: w.mul_(2), lambda w: w.data.mul_(2)):
        for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.v_proj, model.lm_head):
            change(layer.weight)
            assert not torch.equal(one_by_one(model, ids), before)
            layer.weight.data.mul_(0.5)
            assert torch.equal(one_by_one(model, ids), before)


@pytest.mark.slow
@torch.no_grad()
def test_the_base_that_ships_loses_nothing(real_ids, calls):
    """Its weights are four-bit: answers are as near to float32's as bfloat16's, token by token."""
    ids = real_ids(100_000, 120)
    found = {}
    for name in ("full", "auto"):
        model, _ = load_base("float32", decoding_weights=name)
        cache = model(ids[:, :80]).past_key_values
        found[name] = torch.cat(
            [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, ids.shape[1])], 1
        ).log_softmax(-1)
    assert len(calls) == 30 * 40
    kl = (found["full"].exp() * (found["full"] - found["auto"])).sum(-1)
    assert kl.mean() < 0.003  # seen: 0.0006; bfloat16's is 0.0009
