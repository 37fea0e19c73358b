"""Adapters: the added weights alone, back onto the base they were made for and no other."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from senri.hf.adapter import adapter_weights, load_adapter, read_adapter_header, save_adapter

from ..conftest import STORES

CASES = [
    {"update_rule": "gated_delta", "write_gate": "surprise", "memory_conv_size": 3},
    {"memory_readout": "head", "update_rule": "delta_token", "feature_map": "relu", "memory_conv_size": 2},
    {"memory_gate": "infini"},
    {"memory_readout": "head", "update_rule": "delta_token", "write_gate": "hidden", "memory_context_size": 5},
    *STORES,
]


@pytest.fixture
def saved(make_senri, tmp_path):
    """A model and its adapter's file."""
    model = make_senri(dtype=torch.float32)
    save_adapter(model, tmp_path / "a.safetensors", made_on=["a text"])
    return model, tmp_path / "a.safetensors"


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_on_a_fresh_base_the_model_is_back(make_senri, make_base, tokens, tmp_path, options):
    model, ids, path = make_senri(dtype=torch.float32, **options), tokens(2, 40), tmp_path / "a.safetensors"
    save_adapter(model, path)
    base = make_base(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    for parameter in adapter_weights(model).values():
        parameter.copy_(parameter.bfloat16())  # as the file keeps them
    expected = model(ids).logits
    assert (base(ids).logits - expected).abs().max() > 1e-2, "a silent memory would show nothing"
    for source in (base, tmp_path / "base"):
        loaded = load_adapter(source, path)
        assert torch.equal(loaded(ids).logits, expected)
        assert loaded.config.to_dict() == model.config.to_dict()
        assert not loaded.training
    assert base.dtype == torch.float32


def test_the_file_holds_the_added_weights_and_what_they_need(saved):
    model, path = saved
    tensors = load_file(path)
    assert tensors.keys() == {name for name, _ in model.named_parameters() if ".memory." in name}
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    header = read_adapter_header(path)
    assert header["notes"] == {"made_on": ["a text"]}
    assert all(getattr(model.config, name) == value for name, value in header["config"].items())
    assert header["config"]["memory_head_dim"] == 8
    assert "hidden_size" not in header["config"]


@torch.no_grad()
def test_what_changes_no_weight_may_be_another(saved, make_base, tokens):
    model, path = saved
    ids = tokens(1, 40)
    loaded = load_adapter(make_base(dtype=torch.float32), path, sliding_window_size=11)
    assert (loaded.config.sliding_window_size, loaded.config.memory_head_dim) == (11, 8)
    assert not torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-3)
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        load_adapter(make_base(dtype=torch.float32), path, memory_head_dim=4)


def test_a_base_of_the_same_shape_with_other_weights_is_refused(saved, make_base):
    other = make_base(dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    with pytest.raises(ValueError, match="adapter for another base model: its base_fingerprint differs"):
        load_adapter(other, saved[1])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": 64}, "is an adapter for another base model: its base_fingerprint differs"),
        ({"num_hidden_layers": 2}, r"does not fit this base model: memory layers \[1, 2\] do not fit into 2 layers"),
    ],
)
def test_another_base_is_refused(saved, fields, reason):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    other = LlamaForCausalLM(LlamaConfig(**{**shape, **fields}, vocab_size=97, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=reason) as caught:
        load_adapter(other, saved[1])
    assert str(saved[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_adapter(saved, make_base, tmp_path):
    model, path = saved
    base = make_base(dtype=torch.float32)
    save_file({"a": torch.ones(3)}, tmp_path / "foreign.safetensors")
    model.reset_memory()
    model.save_memory(tmp_path / "memory.senri")
    data = path.read_bytes()
    for name, content in {"head": data[:50], "short": data[:-7], "empty": b"", "text": b"In the beginning" * 9}.items():
        (tmp_path / name).write_bytes(content)
    for name, reason in {
        "none": "no such adapter file",
        "foreign.safetensors": "is a safetensors file but no Senri adapter",
        "memory.senri": "is a safetensors file but no Senri adapter",
        "head": "is no adapter, or truncated or corrupt",
        "short": "is no adapter, or truncated or corrupt",
        "empty": "is no adapter, or truncated or corrupt",
        "text": "is no adapter, or truncated or corrupt",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            load_adapter(base, tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_adapter_is_written_whole_or_not_at_all(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match=r"cannot write .*none/a\.safetensors: No such file or directory"):
        save_adapter(model, tmp_path / "none" / "a.safetensors")
    save_adapter(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["senri_adapter"]


def test_a_model_wrapped_by_peft_is_refused(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = saved[0]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        save_adapter(wrapped.base_model.model, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
