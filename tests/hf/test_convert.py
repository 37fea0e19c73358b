"""convert_to_senri(): every way in, every wrong one in one line; the pip-shipped base."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import senri
from senri.hf.base import find_gguf, load_tokenizer, resolve_dtype
from senri.hf.convert import convert_qwen_to_senri, convert_to_senri, take_over
from senri.hf.decoder import build_memory

OPTIONS = {"sliding_window_size": 16, "num_memory_layers": 1, "first_memory_layer": 1}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_from_a_model_and_from_its_folder(make_base, tokens, tmp_path, family):
    base, ids = make_base(family, torch.float32), tokens(1, 12)
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    base.save_pretrained(tmp_path)
    config = base.config.to_dict()
    for source in (base, tmp_path, str(tmp_path)):
        model = convert_to_senri(source, **OPTIONS)
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert not model.training
        assert model.config.qkv_bias == (family == "qwen2")
        assert (model.config.sliding_window_size, model.config.memory_layers) == (16, [1])
        assert model.config.rope_parameters["rope_theta"] == base.config.rope_parameters["rope_theta"]
        assert model.generation_config.eos_token_id == 2
        assert model.lm_head.weight is model.model.embed_tokens.weight
    # the base is left as it was, and shares nothing with the model
    assert base.config.to_dict() == config
    model = convert_to_senri(base, **OPTIONS)
    model.generation_config.eos_token_id = 5
    for parameter in model.parameters():
        parameter.zero_()
    assert base.generation_config.eos_token_id == 2
    assert all(torch.equal(p, weights[name]) for name, p in base.state_dict().items())


@torch.no_grad()
def test_taken_over_weights_exist_once(make_base, tokens):
    base, ids = make_base("llama", torch.float32), tokens(1, 12)
    expected, weights = base(ids).logits, base.state_dict()
    model = take_over(base, **OPTIONS)
    assert torch.equal(model(ids).logits, expected)
    ours = model.state_dict()
    assert all(ours[name].data_ptr() == weight.data_ptr() for name, weight in weights.items())


@torch.no_grad()
def test_biases_come_along(make_base, tokens):
    base = make_base("llama", torch.float32, attention_bias=True, mlp_bias=True)
    model = convert_to_senri(base, **OPTIONS)
    ids = tokens(1, 12)
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert model.model.layers[0].self_attn.o_proj.bias.abs().max() > 0.1


@torch.no_grad()
def test_untied_embeddings_stay_untied(make_base, tokens):
    base = make_base("llama", torch.float32, tie_word_embeddings=False)
    model = convert_to_senri(base, **OPTIONS)
    ids = tokens(1, 12)
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="memory_readout 'head' needs tie_word_embeddings=True"):
        convert_to_senri(base, memory_readout="head", **OPTIONS)


def test_the_memory_starts_silent_with_its_own_start_values(make_base):
    """Not with nn.Linear's random ones, as transformers would have it."""
    for options in ({}, {"memory_conv_size": 3, "update_rule": "gated_delta", "write_gate": "surprise"}):
        memory = convert_to_senri(make_base(), **OPTIONS, **options).model.layers[1].memory
        assert torch.equal(memory.q_proj.weight, torch.eye(32, dtype=torch.float64))
        assert memory.o_proj.weight.abs().max() == 0
    assert torch.equal(memory.k_conv, torch.tensor([[0.5, 1.0, 0.0]], dtype=torch.float64).expand(32, 3))
    assert memory.write_gate.out_proj.bias.tolist() == [2.0] * 4
    assert memory.forget_gate_proj.bias.tolist() == [-8.0] * 4
    wide = convert_to_senri(make_base(), memory_head_dim=24, memory_readout="head", **OPTIONS).model.layers[1].memory
    product = wide.k_proj.weight.T @ wide.k_proj.weight  # 96 x 32: orthonormal columns
    torch.testing.assert_close(product, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-5)
    assert wide.read_gate.scale.abs().max() == 0
    torch.testing.assert_close(wide.o_proj.weight, wide.v_proj.weight.T)


def test_what_cannot_be_converted(make_base, make_senri, tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
    message = "architecture 'gpt2' is not supported: Senri converts Llama-architecture models"
    with pytest.raises(ValueError, match=message):
        convert_to_senri(gpt2)
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=message):
        convert_to_senri(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"a Senri model already: load it with SenriForCausalLM\.from_pretrained"):
        convert_to_senri(make_senri())
    make_senri().save_pretrained(tmp_path / "senri")
    with pytest.raises(ValueError, match="a Senri model already"):
        convert_to_senri(tmp_path / "senri")
    with pytest.raises(ValueError, match="this is a 'llama' model, not qwen2"):
        convert_qwen_to_senri(make_base())
    with pytest.raises(ValueError, match="update_rule 'x' is not one of"):
        convert_to_senri(make_base(), update_rule="x")
    with pytest.raises(ValueError, match="no field 'window'"):
        convert_to_senri(make_base(), window=7)
    assert convert_qwen_to_senri(make_base("qwen2"), **OPTIONS).config.qkv_bias


def test_a_path_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"has neither config\.json nor a \.gguf file"):
        convert_to_senri(tmp_path)
    with pytest.raises(ValueError, match=r"nothing\.gguf: no such file"):
        convert_to_senri(tmp_path / "nothing.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has several \.gguf files: name one"):
        convert_to_senri(tmp_path)
    with pytest.raises(ValueError, match="cannot load a model from") as caught:
        convert_to_senri(tmp_path / "no-such-folder")
    assert "\n" not in str(caught.value)
    for damaged in (b"", b"GGUF", b"MZ" * 100, find_gguf().read_bytes()[:1_000_000]):
        (tmp_path / "a.gguf").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot load a model from") as caught:
            convert_to_senri(tmp_path / "a.gguf")
        assert "\n" not in str(caught.value)


def test_the_real_base(real_base, real_tokenizer):
    config = real_base.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49_152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (
        9,
        3,
        8192,
    )
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert sum(p.numel() for p in real_base.parameters()) == 134_515_008
    assert real_base.generation_config.eos_token_id == real_tokenizer.eos_token_id
    assert isinstance(config, LlamaConfig)
    assert isinstance(real_base, LlamaForCausalLM)


def test_the_real_tokenizer_splits_digits_and_ends_turns(real_tokenizer, real_folder):
    ids = real_tokenizer("1984")["input_ids"]
    assert real_tokenizer.convert_ids_to_tokens(ids) == ["1", "9", "8", "4"]
    assert (real_tokenizer.eos_token, real_tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "In the year 1984, KEY-ABC12345:\n  naïve café, 千里!"
    assert real_tokenizer.decode(real_tokenizer(text)["input_ids"]) == text
    assert load_tokenizer(real_folder)(text)["input_ids"] == real_tokenizer(text)["input_ids"]


def test_dtypes_by_name():
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == resolve_dtype(torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype 'float16' is not one of: auto, float32, bfloat16"):
        resolve_dtype("float16")
    assert senri.convert_to_senri is convert_to_senri


def test_grouped_memory_heads_start_matched(make_senri):
    """GQA: query head h reads memory h // G, in q_proj and in the head read-out's way back."""
    model = make_senri(
        random=False, memory_readout="head", memory_num_heads=4, memory_num_key_value_heads=2, memory_head_dim=8
    )
    memory = next(iter(model.model.memories.values()))
    keys, queries = (w.unflatten(0, (-1, 8)) for w in (memory.k_proj.weight, memory.q_proj.weight))
    for head in range(4):
        assert torch.equal(queries[head], keys[head // 2])
    values = memory.v_proj.weight.unflatten(0, (-1, 8))
    stored = torch.randn(32, dtype=values.dtype)
    read = torch.cat([values[head // 2] @ stored for head in range(4)])
    expected = memory.v_proj.weight.T @ (memory.v_proj.weight @ stored)  # its projection on what the heads hold
    torch.testing.assert_close(memory.o_proj(read), expected)


@pytest.mark.parametrize(("eos", "end"), [(0, 0), (7, 7), ([5, 3, 6], 6), ([], None), (None, None)])
def test_the_end_that_a_memory_says_is_that_of_a_chat_turn(make_senri, eos, end):
    """Of several the last, as Llama's instruction models list them."""
    config = make_senri(update_rule="slot", memory_readout="head").config
    config.eos_token_id = eos
    memory = build_memory(config, config.memory_layers[0])
    assert memory.end_token == end
    assert memory.slot_gate.ends == (end is not None)
