"""A small Senri folder with the real tokenizer, and the specs of rows that measure it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from senri.hf.convert import convert_to_senri

PIECE, WINDOW, LAYERS = 32, 64, 3
MEMORY = {"sliding_window_size": WINDOW, "chunk_size": 16, "num_memory_layers": 1, "first_memory_layer": 1} | {
    "memory_num_heads": 1,
    "memory_head_dim": 32,
    "update_rule": "slot",
    "memory_num_slots": 16,
    "memory_readout": "head",
    "memory_context_size": 4,
    "write_gate": "hidden",
}


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 49152}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    special = {"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**fields, **heads, **special, initializer_range=0.2)).eval()


@pytest.fixture(scope="session")
def load_script():
    """``(name)`` -> the module of a script in benchmarks/."""

    def load(name: str) -> Any:
        path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def base_folder(real_tokenizer, tmp_path_factory):
    """A tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_base().save_pretrained(folder)
    real_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def senri_folder(real_tokenizer, randomise, tmp_path_factory):
    """A tiny Senri whose memory speaks."""
    folder = tmp_path_factory.mktemp("models") / "senri"
    randomise(convert_to_senri(tiny_base(), **MEMORY)).save_pretrained(folder)
    real_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spec(senri_folder):
    """``(measurement, **values)`` -> the spec of a row of the tiny model."""

    def make(measurement: str, **values: Any) -> dict[str, Any]:
        model = {"name": str(senri_folder), "dtype": "float32", "adapter": "none", "overrides": {}}
        return {"key": measurement, "measurement": measurement, "model": model, "piece_size": PIECE} | values

    return make
