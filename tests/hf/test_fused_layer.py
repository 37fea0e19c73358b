"""Without gradients a CPU computes fused layers: no less exact than the plain ones, and never stale."""

import copy
import pickle

import pytest
import torch

import senri.hf.decoder as decoder
from senri.hf.fused_layer import can_fuse, rotated
from senri.layers import PackedLinear, PlainLinear
from senri.layers.packed_linear import has_products

needs_products = pytest.mark.skipif(not has_products(), reason="a processor without bfloat16 products")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_products)]
STEPS = 40
HEAD = {"memory_readout": "head", "update_rule": "slot", "memory_context_size": 5, "sliding_window_size": 8}


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def fast(make_senri, request):
    """A model in a dtype that is fused, and the float64 model with the very same weights."""

    def make(dtype=request.param, **options):
        model = make_senri(**{**HEAD, **options}).to(dtype)
        return model, copy.deepcopy(model).double()

    return make


def plan_of(model, steps, past):
    """The attention of ``steps`` tokens behind ``past`` others."""
    index = past + torch.arange(steps)[None]
    return model.model._plan(torch.zeros(1, steps, 32, dtype=model.dtype), past, index, index)


def logits(model, ids, cuts=()):
    cache, parts = model.model.new_cache(), []
    for part in ids.tensor_split(cuts, dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    return torch.cat(parts, 1)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("cuts", [(), (13, 14, 15, 30), tuple(range(1, STEPS))], ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("options", [{}, {"num_sink_tokens": 0}, {"num_sink_tokens": 3}, {"family": "qwen2"}])
@torch.no_grad()
def test_as_exact_as_the_plain_layers(fast, tokens, monkeypatch, options, cuts):
    model, exact = fast(**options)
    ids = tokens(2, STEPS)
    expected = logits(exact, ids)
    calls = []
    monkeypatch.setattr(decoder, "fused", lambda *args, fused=decoder.fused: calls.append(1) or fused(*args))
    ours = error(logits(model, ids, cuts), expected)
    first = model.dtype == torch.float32 and cuts[:1] == (1,)  # a prompt inside the window keeps the base's bits
    assert len(calls) == 3 * (len(cuts) + 1 - first), "a layer was not fused"
    monkeypatch.setattr(decoder, "can_fuse", lambda *_: False)
    plain = error(logits(model, ids, cuts), expected)
    assert 0 < ours < 1.3 * plain < (0.1 if model.dtype == torch.bfloat16 else 1e-5)


def test_only_where_nothing_is_lost(fast):
    model, exact = fast()
    layer, hidden, plan = model.model.layers[1], torch.randn(1, 3, 32, dtype=model.dtype), plan_of(model, 3, 7)
    assert not can_fuse(layer, hidden, plan), "it would have no gradients"
    with torch.no_grad():
        assert can_fuse(layer, hidden, plan)
        assert not can_fuse(exact.model.layers[1], hidden.double(), plan)
        inside = can_fuse(layer, hidden, plan_of(model, 3, 0))
        assert inside == (model.dtype == torch.bfloat16), "a float32 prompt inside the window keeps the base's bits"
        layer.self_attn.dropout = 0.1
        assert can_fuse(layer, hidden, plan)
        assert not can_fuse(layer.train(), hidden, plan)
        layer.eval()
        for module in (layer.mlp, layer.self_attn, layer.self_attn.q_proj, layer.mlp.down_proj):
            hook = module.register_forward_hook(lambda *_: None)
            assert not can_fuse(layer, hidden, plan), "the hook would not be called"
            hook.remove()
        assert can_fuse(layer, hidden, plan)
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)  # as PEFT wraps it
        assert not can_fuse(layer, hidden, plan)
        assert not can_fuse(fast(memory_readout="layer")[0].model.layers[1], hidden, plan)
        with torch.autocast("cpu", torch.bfloat16):
            others = fast()[0].model.layers[1]
            assert can_fuse(others, hidden, plan) == (model.dtype == torch.bfloat16), "autocast would be left out"


@needs_products
def test_a_frozen_base_is_fused_while_its_memory_is_trained(fast, tokens):
    model, exact = fast(torch.bfloat16)
    plan = plan_of(model, 3, 7)
    for name, parameter in [*model.named_parameters(), *exact.named_parameters()]:
        parameter.requires_grad_(".memory." in name)
    assert can_fuse(model.model.layers[1], torch.randn(1, 3, 32, dtype=torch.bfloat16), plan)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    assert not can_fuse(model.model.layers[1], torch.randn(1, 3, 32, dtype=torch.bfloat16), plan)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    for module in model.model.memories.values():
        module.float()  # as the trainer has it
    gradients = []
    for trained in (model, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=trained is model):
            trained(tokens(2, STEPS), labels=tokens(2, STEPS)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in trained.parameters() if p.requires_grad]))
    assert error(*gradients) < 0.1


@torch.no_grad()
def test_changed_weights_are_packed_anew(fast, tokens):
    model, _ = fast()
    ids = tokens(1, 15)
    before = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    layer = model.model.layers[0]
    for weight in (layer.mlp.down_proj.weight, layer.self_attn.k_proj.weight):
        weight.mul_(2)
        changed = logits(model, ids)
        assert not torch.equal(changed, before)
        weight.mul_(0.5)
        assert torch.equal(logits(model, ids), before)
    layer.self_attn.q_proj.weight.data += 0.1  # as PEFT merges LoRA: no version is raised
    assert not torch.equal(logits(model, ids), before)
    layer.self_attn.q_proj.weight.data -= 0.1
    before = logits(model, ids)
    layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros_like(layer.mlp.gate_proj.weight))
    assert not torch.equal(logits(model, ids), before)


@torch.no_grad()
def test_packed_weights_are_no_part_of_the_model(fast, tokens):
    model, _ = fast()
    names, ids = set(model.state_dict()), tokens(1, 15)
    expected = logits(model, ids)
    assert set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)


@needs_products
@torch.no_grad()
def test_packed_linear_is_its_layers_side_by_side():
    x = torch.randn(2, 3, 10, dtype=torch.bfloat16)
    first, second = torch.nn.Linear(10, 4).bfloat16(), torch.nn.Linear(10, 6).bfloat16()
    exact = torch.cat([copy.deepcopy(layer).double()(x.double()) for layer in (first, second)], -1)
    packed, close = PackedLinear(first, second), {"rtol": 8e-3, "atol": 8e-3}
    other = torch.randn(2, 3, 10, dtype=torch.bfloat16)
    torch.testing.assert_close(packed(x).double(), exact, **close)
    torch.testing.assert_close(packed.silu(x).double(), torch.nn.functional.silu(exact), **close)
    torch.testing.assert_close(packed.plus(x, other).double(), exact + other, **close)
    torch.testing.assert_close(packed.times(x, other).double(), exact * other, **close)


def test_rotation_is_transformers_own():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angle = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotated(x, cos, sin).transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_plain_linear_is_its_layers_side_by_side():
    x, other = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
    for bias in (True, False):
        layers = [torch.nn.Linear(10, 4, bias=bias), torch.nn.Linear(10, 6, bias=bias)]
        exact = torch.cat([layer(x) for layer in layers], -1)
        for form in (PlainLinear(*layers), PlainLinear(*layers)):
            torch.testing.assert_close(form(x), exact)
            torch.testing.assert_close(form.silu(x), torch.nn.functional.silu(exact))
            torch.testing.assert_close(form.plus(x, other), exact + other)
            torch.testing.assert_close(form.times(x, other), exact * other)


def test_in_inference_mode(fast, tokens):
    with torch.inference_mode():
        model, exact = fast()  # its weights have no version
        assert error(logits(model, tokens(1, 20)), logits(exact, tokens(1, 20))) < 0.1
