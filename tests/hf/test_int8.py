"""Decoding with weights in eight bits: what it loses, when it is taken, and that the full weights stay as they are."""

import copy
import itertools

import pytest
import torch

import senri.hf.int8_decoder as int8_decoder
import senri.hf.model as hf_model
from senri import convert_to_senri, load_base
from senri.hf.int8_decoder import MOST_ROWS
from senri.layers.int8_kernels import GROUP
from senri.layers.packed_linear import has_products

HEAD = {"memory_readout": "head", "update_rule": "slot", "memory_context_size": 5, "sliding_window_size": 8}
SOFT = {"num_memory_layers": 0}  # takes embeddings for tokens
SMALL = {"num_memory_layers": 2, "first_memory_layer": 1, "memory_layer_interval": 1, "memory_num_heads": 1,
         "memory_head_dim": 8, "memory_num_slots": 16}  # fmt: skip


def on_levels(weight):
    """The nearest of 16 evenly spread levels in each group, as Q4_1 has them, rounded to bfloat16 as the base is."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return (low + ((groups - low) / (high - low) * 15).round() * (high - low) / 15).flatten(1).bfloat16().float()


@pytest.fixture
def make(make_base, randomise):
    """A float32 model of shapes that the compiled layers take; ``levels``: with weights on four-bit levels."""

    def build(decoding_weights, *, levels, family="llama", senri=None, **fields):
        base = make_base(family, dtype=torch.float32, **{"intermediate_size": 64, "head_dim": 32, **fields})
        numbers = {**HEAD, **SMALL, **(senri or {}), "decoding_weights": decoding_weights}
        model = randomise(convert_to_senri(base, **numbers))
        for layer in model.model.layers:
            for module in (*layer.self_attn.children(), *layer.mlp.children()):
                if isinstance(module, torch.nn.Linear) and levels:
                    module.weight.data = on_levels(module.weight.data)
        return model

    return build


@pytest.fixture
def calls(monkeypatch):
    """How often a token went through the compiled layers."""
    found, original = [], hf_model.next_token

    def counting(*args):
        result = original(*args)
        found.extend([1] * (result is not None))
        return result

    monkeypatch.setattr(hf_model, "next_token", counting)
    return found


def one_by_one(model, ids):
    cache, out = model.model.new_cache(), []
    for i in range(ids.shape[1]):
        out.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def test_auto_takes_them_only_where_nothing_is_lost(make, tokens, calls):
    ids = tokens(1, 20)
    for levels in (False, True):
        full, auto = make("full", levels=levels), make("auto", levels=levels)
        expected, ours = one_by_one(full, ids), one_by_one(auto, ids)
        assert len(calls) == (19 if levels else 0)  # the first token is a prompt inside the window, and a sink
        if not levels:
            assert torch.equal(ours, expected)
        assert (ours - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("senri", [{}, {"num_sink_tokens": 0}, {"num_sink_tokens": 3}, {"num_memory_layers": 0}])
def test_all_of_the_state_is_as_with_full_weights(make, tokens, calls, family, senri):
    """Logits, windows, sinks, memories, over texts longer than the window, in several rows."""
    ids = tokens(2, 30)
    models = [make(name, levels=True, family=family, senri=senri) for name in ("full", "auto")]
    caches, logits = [model.model.new_cache() for model in models], [[], []]
    for model, cache, out in zip(models, caches, logits, strict=True):
        out.append(model(ids[:, :5], past_key_values=cache).logits)
        out.extend(model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 30))
    partly = max(senri.get("num_sink_tokens", 1) - 1, 0)  # tokens that see some sinks behind the window, but not all
    assert len(calls) == 25 - partly
    expected, ours = (torch.cat(out, 1) for out in logits)
    assert (ours - expected).norm() < 0.02 * expected.norm()
    states = [cache.named_tensors() for cache in caches]
    for name, value in states[0].items():
        assert states[1][name].shape == value.shape, name
        if value.is_floating_point():
            assert (states[1][name] - value).norm() <= 0.05 * value.norm(), name
        else:
            assert torch.equal(states[1][name], value), name


@torch.no_grad()
def test_int8_takes_them_always(make, tokens, calls):
    ids = tokens(1, 20)
    expected, ours = (one_by_one(make(name, levels=False), ids) for name in ("full", "int8"))
    assert len(calls) == 19
    assert 0.002 < (ours - expected).norm() / expected.norm() < 0.1, "weights that are on no levels lose something"


@torch.no_grad()
def test_a_bfloat16_model_goes_through_them_too(make, tokens, calls, monkeypatch):
    """Here on any processor; else on one that has bfloat16 products."""
    monkeypatch.setattr(int8_decoder, "fuses", lambda x: True)
    monkeypatch.setattr(int8_decoder, "fusable", lambda layer, x: True)
    ids = tokens(2, 30)
    expected = one_by_one(make("full", levels=True), ids)
    off = {}
    for name in ("full", "int8"):
        model = make(name, levels=True).bfloat16()
        found = one_by_one(model, ids)
        assert found.dtype == torch.bfloat16
        off[name] = ((found - expected).norm() / expected.norm()).item()
    assert len(calls) == 29
    assert off["int8"] < 1.5 * off["full"] < 0.04


@torch.no_grad()
def test_a_bfloat16_model_on_no_levels_stays_as_it_is(make, tokens, calls, monkeypatch):
    monkeypatch.setattr(int8_decoder, "fuses", lambda x: True)
    monkeypatch.setattr(int8_decoder, "fusable", lambda layer, x: True)
    ids = tokens(1, 20)
    assert torch.equal(*(one_by_one(make(name, levels=False).bfloat16(), ids) for name in ("full", "auto")))
    assert not calls


@torch.no_grad()
def test_a_fork_goes_on_by_itself(make, tokens):
    """The compiled layers write into the window's room: nobody else may see it."""
    model, ids = make("int8", levels=True), tokens(1, 40)
    cache = model(ids[:, :12]).past_key_values
    model(ids[:, 12:13], past_key_values=cache)
    kept = {name: value.clone() for name, value in cache.named_tensors().items()}
    fork = cache.fork()
    ours = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(13, 25)]
    theirs = [model(ids[:, i : i + 1], past_key_values=fork).logits for i in range(26, 38)]
    again = model(ids[:, :12]).past_key_values
    alone = [model(ids[:, i : i + 1], past_key_values=again).logits for i in (12, *range(26, 38))][1:]
    assert not torch.equal(ours[0], theirs[0])
    assert torch.equal(torch.cat(theirs), torch.cat(alone))
    before = model(ids[:, :12]).past_key_values
    model(ids[:, 12:13], past_key_values=before)
    assert all(torch.equal(value, kept[name]) for name, value in before.named_tensors().items())


@torch.no_grad()
def test_for_single_tokens_of_few_rows_alone(make, tokens, calls):
    model = make("int8", levels=True)
    for rows, steps in ((1, 2), (MOST_ROWS + 1, 1), (1, 20)):
        cache = model(tokens(rows, 9)).past_key_values
        model(tokens(rows, steps), past_key_values=cache)
        assert not calls
    cache = model(tokens(MOST_ROWS, 9)).past_key_values
    model(tokens(MOST_ROWS, 1), past_key_values=cache)
    assert len(calls) == 1


@torch.no_grad()
def test_not_where_rows_are_padded_or_hidden_states_are_wanted(make, tokens, calls):
    model, ids = make("int8", levels=True), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    model(ids[:, :1], past_key_values=cache)
    cache = model(ids).past_key_values
    states = model(ids[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert not calls


def test_not_where_gradients_are_wanted(make, tokens, calls):
    model = make("int8", levels=True)
    cache = model(tokens(1, 9)).past_key_values
    model(tokens(1, 1), past_key_values=cache).logits.sum().backward()
    assert not calls
    prompt = model.requires_grad_(False).get_input_embeddings()(tokens(1, 9)).requires_grad_()
    cache = make("full", levels=True, senri=SOFT)(inputs_embeds=prompt).past_key_values
    frozen = make("int8", levels=True, senri=SOFT).requires_grad_(False)
    assert frozen(tokens(1, 1), past_key_values=cache).logits.requires_grad, "through the window, into a soft prompt"
    assert not calls


PARTS = ["layers.0", "layers.1.self_attn", "layers.1.mlp", "layers.2.input_layernorm"]


@torch.no_grad()
@pytest.mark.parametrize("place", [*PARTS, "layers.1.self_attn.q_proj"])
def test_not_where_somebody_listens(make, tokens, calls, place):
    """LoRA and hooks want full products, and to be called."""
    model, ids, heard = make("int8", levels=True), tokens(1, 12), []
    part = model.model.get_submodule(place)
    part.register_forward_hook(lambda *_: heard.append(1))
    one_by_one(model, ids)
    assert len(heard) == 12
    part._forward_hooks.clear()
    forward = part.forward
    part.forward = lambda *args, **kwargs: heard.append(1) or forward(*args, **kwargs)
    one_by_one(model, ids)
    assert len(heard) == 24
    assert not calls


@torch.no_grad()
def test_not_where_a_part_is_of_another_class(make, tokens, calls):
    class Loud(type(make("full", levels=True).model.layers[0].input_layernorm)):
        def forward(self, x):
            return 2 * super().forward(x)

    ids, found = tokens(1, 12), []
    for name in ("full", "int8"):
        model = make(name, levels=True)
        model.model.layers[1].input_layernorm.__class__ = Loud
        found.append(one_by_one(model, ids))
    assert not calls
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)  # but for the head


@torch.no_grad()
def test_states_and_positions_of_other_shapes(make, tokens, calls):
    ids = tokens(2, 12)
    found = []
    for name in ("full", "int8"):
        model = make(name, levels=True)
        cache = model(ids).past_key_values
        found.append(model(ids[:, :1], position_ids=torch.tensor([[12]]), past_key_values=cache).logits)
        model = make(name, levels=True, senri={"num_sink_tokens": 0})
        half = model.bfloat16()(ids).past_key_values
        found.append(model.float()(ids[:, :1], past_key_values=half).logits)
    assert len(calls) == 1, "positions for all rows; not a window of another dtype"
    torch.testing.assert_close(found[2], found[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(found[3], found[1], rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"intermediate_size": 48}, {"head_dim": 8}])
def test_shapes_that_cannot_be_stay_full(make, tokens, calls, fields):
    models = [make(name, levels=False, **fields) for name in ("full", "int8")]
    for model in models:
        model.lm_head.register_forward_hook(lambda *_: None)  # the head's own shape could be
    assert torch.equal(*(one_by_one(model, tokens(1, 12)) for model in models))
    assert not calls


@torch.no_grad()
def test_layers_of_different_shapes_stay_full(make, tokens, calls):
    found = []
    for name in ("full", "int8"):
        model = make(name, levels=True)
        mlp = model.model.layers[1].mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data, part.out_features = part.weight.data[:32], 32
        mlp.down_proj.weight.data, mlp.down_proj.in_features = mlp.down_proj.weight.data[:, :32].contiguous(), 32
        model.lm_head.register_forward_hook(lambda *_: None)
        found.append(one_by_one(model, tokens(1, 12)))
    assert torch.equal(*found)
    assert not calls


@torch.no_grad()
def test_auto_looks_at_each_weight(make, tokens, calls):
    """A small matrix that was fine-tuned must not hide beside large ones that were not."""
    model = make("auto", levels=True)
    weight = model.model.layers[2].self_attn.v_proj.weight
    weight.add_(0.05 * torch.randn_like(weight))
    one_by_one(model, tokens(1, 12))
    assert not calls


@torch.no_grad()
def test_changed_weights_are_packed_anew(make, tokens):
    model, ids = make("int8", levels=True), tokens(1, 12)
    before = one_by_one(model, ids)
    first, second, third = model.model.layers
    changed = (first.mlp.up_proj, second.self_attn.v_proj, third.post_attention_layernorm, model.lm_head)
    for change in (lambda w: w.mul_(2), lambda w: w.data.mul_(2)):
        for module in changed:
            change(module.weight)
            assert not torch.equal(one_by_one(model, ids), before)
            module.weight.data.mul_(0.5)
            assert torch.equal(one_by_one(model, ids), before)
    first.mlp.up_proj = copy.deepcopy(first.mlp.up_proj)
    assert torch.equal(one_by_one(model, ids), before)
    first.mlp.up_proj.weight.data.neg_()
    assert not torch.equal(one_by_one(model, ids), before)


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(make, tokens):
    model, ids = make("int8", levels=True), tokens(1, 12)
    before = one_by_one(model, ids)
    copied = copy.deepcopy(model)
    copied.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(one_by_one(copied, ids), before)
    assert torch.equal(one_by_one(model, ids), before)


@pytest.mark.slow
@torch.no_grad()
def test_the_base_that_ships_loses_nothing(real_ids, calls):
    """Its weights are on such levels: token by token answers are nearer to float32's than bfloat16's."""
    ids, found = real_ids(100_000, 120), {}
    half = ["bfloat16"] if has_products() else []
    for kind in itertools.product(["float32", *half], ["full", "auto"]):
        model, _ = load_base(kind[0], decoding_weights=kind[1])
        cache = model(ids[:, :80]).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, ids.shape[1])]
        found[kind] = torch.cat(steps, 1).float().log_softmax(-1)
    assert len(calls) == 40 * (1 + len(half))
    full = found.pop(("float32", "full"))
    kl = {kind: (full.exp() * (full - logits)).sum(-1).mean().item() for kind, logits in found.items()}
    assert kl["float32", "auto"] < 3e-4, kl  # seen: 0.00006
    if half:
        assert kl["bfloat16", "auto"] < kl["bfloat16", "full"] < 3e-3, kl
