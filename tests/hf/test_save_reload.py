"""save_pretrained() and back: the same model, by its own class and by the Auto classes."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from senri.hf import SenriForCausalLM, SenriModel

from ..conftest import STORES

CASES = [
    {"update_rule": "gated_delta", "memory_conv_size": 3, "write_gate": "surprise"},
    {"update_rule": "delta_token", "memory_readout": "head", "write_gate": "hidden"},
    {"update_rule": "delta_token", "memory_readout": "head", "write_gate": "hidden", "memory_context_size": 5},
    {"memory_gate": "infini", "memory_head_dim": 8},
    {},
    *STORES,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_the_same_model_comes_back(make_senri, tokens, tmp_path, options, family, dtype):
    model, ids = make_senri(family, dtype, **options), tokens(2, 30)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for cls in (SenriForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path, dtype=dtype)
        assert type(loaded) is SenriForCausalLM
        assert not loaded.training
        ours, theirs = model.config.to_dict(), loaded.config.to_dict()
        ours["_name_or_path"] = str(tmp_path)
        assert {key: theirs[key] for key in ours} == ours
        assert torch.equal(loaded(ids).logits, expected)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert sum(".memory." in key for key in ours) >= 14 if not options else True
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
            assert theirs[key].dtype == dtype
    inner = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(inner) is SenriModel
    assert torch.equal(inner(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_untied_weights_come_back_untied(make_base, tokens, tmp_path):
    from senri.hf.convert import convert_to_senri

    model = convert_to_senri(make_base("llama", torch.float32, tie_word_embeddings=False), sliding_window_size=8)
    model.save_pretrained(tmp_path)
    loaded = SenriForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_checkpoint_without_memory_gets_silent_ones(make_senri, tokens, tmp_path, dtype):
    """What no file brought starts as it should, what it brought is left alone."""
    make_senri(dtype=torch.float32, num_memory_layers=1, memory_head_dim=6).save_pretrained(tmp_path)
    loaded, info = SenriForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, num_memory_layers=2, output_loading_info=True
    )
    assert {key.split(".memory.")[0] for key in info["missing_keys"]} == {"model.layers.2"}
    kept, new = loaded.model.layers[1].memory, loaded.model.layers[2].memory
    source = make_senri(dtype=torch.float32, num_memory_layers=1, memory_head_dim=6).model.layers[1].memory
    for key, parameter in kept.state_dict().items():
        assert torch.equal(parameter, source.state_dict()[key].to(dtype)), key
    assert new.o_proj.weight.abs().max() == 0
    assert new.q_proj.bias.abs().max() == 0
    product = (new.k_proj.weight @ new.k_proj.weight.T).float()  # orthonormal rows
    torch.testing.assert_close(product, torch.eye(len(product)), rtol=0, atol=0.02)
    assert torch.equal(new.q_proj.weight, new.for_query_heads(new.k_proj.weight))


@torch.no_grad()
def test_what_a_session_read_is_not_saved_with_the_model(make_senri, tokens, tmp_path):
    model = make_senri(dtype=torch.float32)
    fresh = model(tokens(1, 20)).logits
    model.read(tokens(1, 40, seed=3))
    model.save_pretrained(tmp_path)
    loaded = SenriForCausalLM.from_pretrained(tmp_path)
    assert loaded.session is None
    assert torch.equal(loaded(tokens(1, 20)).logits, fresh)
