"""Invariant 5: a converted model is the base inside the window, the base under a sliding-window mask beyond it."""

import pytest
import torch

READOUTS = [
    {"memory_readout": "layer"},
    {"memory_readout": "head"},
    {"memory_readout": "head", "write_gate": "surprise", "update_rule": "delta_token", "memory_conv_size": 3},
    {"memory_readout": "layer", "write_gate": "surprise", "update_rule": "gated_delta"},
]
INFINI = {"memory_gate": "infini", "memory_num_heads": 4, "memory_head_dim": 8}


def window_mask(steps: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive ``[1, 1, T, T]``: query t sees (t - W, t]."""
    distance = torch.arange(steps)[:, None] - torch.arange(steps)[None]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(steps, steps, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [*READOUTS, INFINI], ids=str)
@torch.no_grad()
def test_inside_the_window_the_bits_are_the_bases(make_base, make_senri, tokens, family, dtype, options):
    base = make_base(family, dtype)
    model = make_senri(family, dtype, random=False, sliding_window_size=16, **options)
    ids = tokens(2, 16)
    assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", READOUTS, ids=str)
@torch.no_grad()
def test_beyond_the_window_it_is_the_base_under_a_window_mask(make_base, make_senri, tokens, family, options):
    base, model = make_base(family), make_senri(family, random=False, **options)
    ids = tokens(2, 40)
    expected = base(ids, attention_mask=window_mask(40, 7, torch.float64)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)
    full = base(ids).logits
    assert (full - expected)[:, 7:].abs().max() > 0.1, "the mask changes nothing: this test would show nothing"


@pytest.mark.parametrize("options", [*READOUTS, INFINI], ids=str)
@torch.no_grad()
def test_an_empty_memory_changes_nothing_whatever_its_weights(make_base, make_senri, tokens, options):
    base, model = make_base(), make_senri(random=True, **options)
    ids = tokens(2, 30)
    assert torch.equal(model(ids[:, :7]).logits, base(ids[:, :7]).logits)
    expected = base(ids, attention_mask=window_mask(30, 7, torch.float64)).logits
    difference = (model(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-10
    assert (difference[7:] > 1e-3).all(), "from the first evicted token on the memory speaks"


@torch.no_grad()
def test_an_infini_gate_dilutes_the_attention_only_once_something_was_written(make_base, make_senri, tokens):
    base, model = make_base(), make_senri(random=False, **INFINI)
    ids = tokens(1, 20)
    expected = base(ids, attention_mask=window_mask(20, 7, torch.float64)).logits
    difference = (model(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-10
    assert difference[7] > 1e-6


@torch.no_grad()
def test_bfloat16_keeps_the_bases_bits_and_exact_positions(make_base, make_senri, tokens, tmp_path):
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path)
    from transformers import LlamaForCausalLM

    from senri.hf.convert import convert_to_senri

    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = convert_to_senri(base, sliding_window_size=64)
    assert model.dtype == torch.bfloat16
    ids = tokens(2, 60)
    assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("options", [{"memory_readout": "layer"}, {"memory_readout": "head"}], ids=str)
@torch.no_grad()
def test_real_weights(make_real, real_base, real_ids, options):
    model = make_real(sliding_window_size=64, **options)
    ids = real_ids(3000, 150)
    assert ids.shape == (1, 150)
    assert torch.equal(model(ids[:, :64]).logits, real_base(ids[:, :64]).logits)
    expected = real_base(ids, attention_mask=window_mask(150, 64, torch.float32)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=5e-4)
    assert (real_base(ids).logits - expected)[:, 64:].abs().max() > 0.5


@torch.no_grad()
def test_real_weights_with_a_random_branch_and_an_empty_memory(make_real, real_base, real_ids):
    model = make_real(random=True, memory_readout="layer", memory_num_heads=1, memory_head_dim=64)
    ids = real_ids(50_000, 40)
    logits, expected = model(ids).logits, real_base(ids).logits
    torch.testing.assert_close(logits[:, :32], expected[:, :32], rtol=1e-4, atol=5e-4)
    assert (logits[:, 32:] - expected[:, 32:]).abs().max() > 0.5
