"""load_model(): a base with the adapter that ships for it, with another, with none; a Senri folder."""

import pytest
import torch
from safetensors.torch import load_file

import senri.hf.base as base_module
from senri import load_base
from senri.hf.adapter import save_adapter
from senri.hf.base import ADAPTERS, BASE_NAME, load_base_config, load_model
from senri.hf.convert import is_added

HEAD = {"memory_readout": "head", "update_rule": "delta_token", "memory_conv_size": 2, "sliding_window_size": 7}
HEAD |= {"num_memory_layers": 1, "first_memory_layer": 1, "memory_num_heads": 1, "memory_num_key_value_heads": 1}
HEAD |= {"memory_head_dim": 32}


@pytest.fixture
def base_folder(make_base, real_tokenizer, tmp_path):
    """A tiny Llama."""
    make_base(dtype=torch.float32).save_pretrained(tmp_path / "base")
    real_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(make_senri, tmp_path):
    """An adapter for it, that speaks."""
    path = tmp_path / "adapters" / f"{BASE_NAME}.safetensors"
    path.parent.mkdir()
    save_adapter(make_senri(dtype=torch.float32, **HEAD), path)
    return path


@pytest.fixture
def shipped(base_folder, adapter, monkeypatch):
    """The tiny base as the one that pip ships, its adapter as the one that comes with it."""
    monkeypatch.setattr(base_module, "base_directory", lambda: base_folder)
    monkeypatch.setattr(base_module, "ADAPTERS", adapter.parent)
    return adapter


def same_weights(model, path):
    added = {name: p.bfloat16() for name, p in model.named_parameters() if is_added(name)}
    saved = load_file(path)
    return added.keys() == saved.keys() and all(torch.equal(added[name], saved[name]) for name in saved)


@torch.no_grad()
def test_the_adapter_that_ships_is_taken_by_default(shipped, base_folder, make_base, tokens):
    model, tokenizer = load_model()
    assert same_weights(model, shipped)
    assert (model.config.memory_readout, model.config.memory_head_dim) == ("head", 32)
    assert not model.training
    assert tokenizer("In the beginning")["input_ids"] == [788, 260, 3616]
    assert same_weights(load_base("float32")[0], shipped)
    # by its name only: the same folder under its path has none
    plain, _ = load_model(base_folder, "float32")
    assert not same_weights(plain, shipped)
    ids = tokens(1, 7)
    assert torch.equal(plain(ids).logits, make_base(dtype=torch.float32)(ids).logits)


@torch.no_grad()
def test_none_leaves_the_memory_silent(shipped, tokens):
    model, _ = load_model(BASE_NAME, "float32", "none", **HEAD)
    silent = load_model(BASE_NAME, "float32", "none", sliding_window_size=7, num_memory_layers=0)[0]
    ids = tokens(1, 40)
    assert torch.equal(model(ids).logits, silent(ids).logits)
    speaking = load_model(BASE_NAME, "float32")[0]
    assert (speaking(ids).logits - silent(ids).logits).abs().max() > 1e-2


def test_another_adapter_by_its_file(base_folder, adapter, tmp_path):
    model, _ = load_model(base_folder, "float32", adapter)
    assert same_weights(model, adapter)
    with pytest.raises(ValueError, match=r"none\.safetensors: no such adapter file"):
        load_model(base_folder, "float32", tmp_path / "none.safetensors")


def test_a_file_beside_the_base_does_not_ship(base_folder, adapter):
    adapter.rename(base_folder.with_suffix(".safetensors"))
    model, _ = load_model(base_folder, "float32", **HEAD)
    assert not model.model.memories[1].read_gate.scale.any()


def test_what_the_adapter_was_not_made_for_is_refused_by_name(shipped):
    for field, value, ours in [("memory_head_dim", 16, 32), ("update_rule", "linear", "'delta_token'")]:
        with pytest.raises(ValueError, match=f"^{field} is {ours} in the adapter {BASE_NAME}.safetensors and cannot"):
            load_model(**{field: value})
    free = {"sliding_window_size": 9, "num_sink_tokens": 3, "chunk_size": 5, "segment_size": 3, "num_memories": 9}
    model, _ = load_model(dtype="float32", **{**HEAD, **free})
    assert model.config.num_sink_tokens == 3
    assert (model.config.sliding_window_size, model.config.chunk_size, model.config.segment_size) == (9, 5, 3)
    assert same_weights(model, shipped)


@torch.no_grad()
def test_a_senri_folder(make_senri, real_tokenizer, tmp_path, adapter, tokens):
    made, ids = make_senri(dtype=torch.float32, **HEAD), tokens(1, 40)
    made.save_pretrained(tmp_path / "senri")
    real_tokenizer.save_pretrained(tmp_path / "senri")
    model, _ = load_model(tmp_path / "senri", "float32", **HEAD)
    assert torch.equal(model(ids).logits, made(ids).logits)
    assert not model.training
    other, _ = load_model(tmp_path / "senri", "float32", "none", sliding_window_size=9)
    assert other.config.sliding_window_size == 9
    made.config.sliding_window_size = 9
    assert other.model.new_cache().sliding_window_size == 9
    assert not torch.allclose(other(ids).logits, model(ids).logits, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"memory_readout is 'head' in the model in .* and cannot become 'layer': leave"
    ):
        load_model(tmp_path / "senri", memory_readout="layer")
    with pytest.raises(ValueError, match="is a Senri model with a memory of its own: set adapter to none"):
        load_model(tmp_path / "senri", adapter=adapter)
    with pytest.raises(ValueError, match="this is a Senri model already"):
        load_base_config(tmp_path / "senri")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), (torch.float64, torch.float64)])
def test_dtype(base_folder, adapter, dtype, expected):
    assert load_model(base_folder, dtype, adapter)[0].dtype == expected
    with pytest.raises(ValueError, match="dtype 'half' is not one of: auto, float32, bfloat16"):
        load_model(base_folder, "half")


def test_places_without_a_model_are_named_in_one_line(tmp_path, base_folder, make_base):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "unheard_of"}')
    make_base(dtype=torch.float32).save_pretrained(tmp_path / "bare")
    for name, reason in {
        "broken": "cannot load a model from .*broken",
        "unknown": "cannot load a model from .*unheard_of",
        "bare": "cannot load a tokenizer from .*bare",
        "empty": "cannot load a model from .*empty",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_the_real_base_with_the_adapter_that_ships(real_ids):
    model, _ = load_base()
    assert same_weights(model, ADAPTERS / f"{BASE_NAME}.safetensors")
    memory = model.model.memories[model.config.memory_layers[0]]
    assert memory.read_gate.scale.min() > 0
    assert (model.config.hidden_size, model.config.memory_readout, model.config.sliding_window_size) == (
        576,
        "head",
        1024,
    )
