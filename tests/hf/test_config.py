"""SenriConfig: the defaults of SPEC section 4, and what is refused, by name."""

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from senri.hf import SenriConfig
from senri.hf.configuration_senri import PRESETS, preset_for

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def test_the_defaults():
    config = SenriConfig()
    assert config.model_type == "senri"
    assert isinstance(config, LlamaConfig)
    assert (config.sliding_window_size, config.num_sink_tokens, config.chunk_size) == (1024, 1, 64)
    assert (config.num_memory_layers, config.first_memory_layer, config.memory_layer_interval) == (2, 10, 10)
    assert config.memory_layers == [10, 20]
    assert (config.update_rule, config.store) == ("linear", "single")
    assert (config.memory_gate, config.memory_readout) == ("additive", "layer")
    assert (config.memory_num_heads, config.memory_num_key_value_heads, config.memory_head_dim) == (9, 9, 64)
    assert config.qkv_bias is False


def test_the_presets_are_the_tables():
    smollm = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    assert preset_for(smollm) == {
        "sliding_window_size": 1024, "num_memory_layers": 2, "first_memory_layer": 10, "memory_layer_interval": 10,
        "memory_num_heads": 9, "memory_head_dim": 64,
    }  # fmt: skip
    qwen = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
    config = SenriConfig(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, **preset_for(qwen))
    assert config.memory_layers == [12, 16, 20]
    assert config.sliding_window_size == 4096
    assert set(PRESETS) == {"smollm-135m", "qwen2.5-0.5b"}


@pytest.mark.parametrize("layers", range(1, 40))
def test_a_base_without_a_preset_gets_memories_that_fit(layers):
    base = LlamaConfig(num_hidden_layers=layers, **SMALL)
    config = SenriConfig(num_hidden_layers=layers, **SMALL, **preset_for(base))
    assert 1 <= len(config.memory_layers) <= 2
    assert config.memory_layers[-1] < layers
    assert (config.memory_num_heads, config.memory_head_dim) == (4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window_size": 0}, "sliding_window_size must be at least 1, not 0"),
        ({"num_sink_tokens": -1}, "num_sink_tokens must be at least 0, not -1"),
        ({"num_sink_tokens": True}, "num_sink_tokens must be a whole number, not True"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"segment_size": 0}, "segment_size must be at least 1"),
        ({"num_memory_layers": -1}, "num_memory_layers must be at least 0"),
        ({"first_memory_layer": -1}, "first_memory_layer must be at least 0"),
        ({"memory_layer_interval": 0}, "memory_layer_interval must be at least 1"),
        ({"memory_num_heads": 0}, "memory_num_heads must be at least 1"),
        ({"memory_head_dim": 0}, "memory_head_dim must be at least 1"),
        ({"memory_conv_size": -1}, "memory_conv_size must be at least 0"),
        ({"memory_conv_size": 1}, "memory_conv_size 1 convolves nothing"),
        ({"memory_conv_size": 4, "sliding_window_size": 3}, "sliding_window_size must be at least memory_conv_size"),
        ({"memory_context_size": -1}, "memory_context_size must be at least 0"),
        ({"memory_context_size": 4, "sliding_window_size": 3}, "must be at least memory_context_size"),
        ({"memory_conv_size": 2, "memory_context_size": 2}, "memory_conv_size and memory_context_size both make the"),
        ({"update_rule": "hebb"}, "update_rule 'hebb' is not one of: linear, delta, delta_token, gated_delta, slot"),
        ({"feature_map": "gelu"}, "feature_map 'gelu' is not one of: elu_plus_one"),
        ({"feature_map": "identity"}, "feature_map 'identity' can be negative, so update_rule 'linear' cannot"),
        ({"feature_map": "identity", "update_rule": "delta"}, "update_rule 'delta' cannot divide by z"),
        ({"store": "many"}, "store 'many' is not one of: single, routed, banks, multi, hierarchical"),
        ({"routing": "maybe"}, "routing 'maybe' is not one of: auto, on, off"),
        ({"routing_basis": "fourier"}, "routing_basis 'fourier' is not one of: identity, hadamard, random"),
        ({"top_k_memories": 0}, "top_k_memories must be at least 1, not 0"),
        ({"num_memory_banks": 0}, "num_memory_banks must be at least 1, not 0"),
        ({"segments_per_bank": 0}, "segments_per_bank must be at least 1, not 0"),
        ({"num_memories": 0}, "num_memories must be at least 1, not 0"),
        ({"store": "routed", "update_rule": "slot"},
         "store 'routed' works with update_rule: linear; update_rule 'slot' works with store: single$"),
        ({"store": "multi", "update_rule": "delta_token"}, "update_rule 'delta_token' works with store: single, banks"),
        ({"store": "hierarchical", "update_rule": "gated_delta"}, "works with update_rule: linear, delta;"),
        ({"store": "banks", "update_rule": "slot"}, "works with update_rule: linear, delta, delta_token, gated_delta;"),
        ({"store": "routed", "routing_basis": "hadamard", "memory_head_dim": 576},
         "routing_basis 'hadamard' needs a memory_head_dim that is a power of two, not 576"),
        ({"memory_sharing": True, "num_memory_layers": 1}, "memory_sharing needs num_memory_layers of at least 2, not"),
        ({"memory_sharing": 1}, "memory_sharing must be true or false, not 1"),
        ({"use_alibi": "yes"}, "use_alibi must be true or false, not 'yes'"),
        ({"use_alibi": True, "update_rule": "slot"},
         "use_alibi needs an update_rule that forgets: linear, delta, gated_delta; 'slot' does not"),
        ({"alibi_scale": 0.0}, "alibi_scale must be a number above 0, not 0.0"),
        ({"alibi_scale": "fast"}, "alibi_scale must be a number above 0, not 'fast'"),
        ({"memory_readout": "logits"}, "memory_readout 'logits' is not one of: layer, head"),
        ({"memory_gate": "none"}, "memory_gate 'none' is not one of: additive, infini"),
        ({"write_gate": "always"}, "write_gate 'always' is not one of: none, hidden, surprise"),
        ({"num_memory_layers": 3}, r"memory layers \[10, 20, 30\] do not fit into 30 layers: lower first_memory_layer"),
        ({"memory_num_key_value_heads": 2}, r"memory_num_heads \(9\) must be a multiple of memory_num_key_value_heads"),
        ({"memory_num_key_value_heads": 0}, "memory_num_key_value_heads must be at least 1, not 0"),
        ({"memory_readout": "head", "tie_word_embeddings": False}, "memory_readout 'head' needs tie_word_embeddings"),
        ({"write_gate": "surprise", "tie_word_embeddings": False}, "write_gate 'surprise' needs tie_word_embeddings"),
        ({"memory_gate": "infini", "memory_readout": "head"}, "memory_gate 'infini' .* needs memory_readout 'layer'"),
        ({"memory_gate": "infini"}, r"needs memory_num_heads and memory_head_dim equal to the attention's: \(4, 8\)"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"sliding_window_size": "1024"}, "sliding_window_size must be a whole number, not '1024'"),
        ({"memory_head_dim": 6.5}, "memory_head_dim must be a whole number, not 6.5"),
        ({"chunk_size": True}, "chunk_size must be a whole number, not True"),
        ({"sliding_window": 64}, "SenriConfig has no field 'sliding_window'; did you mean 'sliding_window_size'"),
        ({"update_rul": "delta"}, "no field 'update_rul'; did you mean 'update_rule'"),
        ({"quite_unlike_anything": 1}, "no field 'quite_unlike_anything'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        SenriConfig(**{"num_hidden_layers": 30, **SMALL, **options})
    assert "\n" not in str(caught.value)


def test_what_may_be_is_taken():
    for options in (
        {"feature_map": "identity", "update_rule": "delta_token"},
        {"num_memory_layers": 0, "num_hidden_layers": 3},
        {"memory_num_key_value_heads": 3},
        {"memory_gate": "infini", "memory_num_heads": 4, "memory_head_dim": 8},
        {"sliding_window_size": 3, "memory_conv_size": 3},
        {"sliding_window_size": 3, "memory_context_size": 3},
        {"memory_context_size": 1},
        {"num_sink_tokens": 0},
        {"num_sink_tokens": 4, "sliding_window_size": 2},
        {"store": "routed", "routing_basis": "hadamard", "top_k_memories": 1000},
        {"store": "banks", "update_rule": "gated_delta", "use_alibi": True, "alibi_scale": 2},
        {"store": "hierarchical", "update_rule": "delta", "memory_sharing": True},
    ):
        config = SenriConfig(**{"num_hidden_layers": 30, **SMALL, **options})
        assert {name: getattr(config, name) for name in options} == options
    assert SenriConfig(num_hidden_layers=30, rope_theta=5e4, **SMALL).rope_parameters["rope_theta"] == 5e4


@pytest.mark.parametrize("keys", [{"memory_conv_size": 4}, {"memory_context_size": 5}], ids=["conv", "context"])
def test_saved_and_loaded_it_is_the_same(tmp_path, keys):
    config = SenriConfig(
        num_hidden_layers=8, sliding_window_size=5, update_rule="gated_delta", first_memory_layer=2,
        memory_layer_interval=3, memory_num_heads=6, memory_num_key_value_heads=2,
        write_gate="surprise", memory_readout="head", **keys,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **SMALL,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for loaded in (SenriConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SenriConfig
        ours, theirs = config.to_dict(), loaded.to_dict()
        ours["_name_or_path"] = theirs["_name_or_path"]  # where it was loaded from
        assert {k: theirs[k] for k in ours} == ours
        assert loaded.memory_layers == [2, 5]
        assert loaded.rope_parameters["rope_theta"] == 1e5
    assert SenriConfig.from_pretrained(tmp_path, sliding_window_size=9).sliding_window_size == 9
    with pytest.raises(ValueError, match="update_rule 'x'"):
        SenriConfig.from_pretrained(tmp_path, update_rule="x")
