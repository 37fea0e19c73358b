"""A small mix of real text for tiny models, and trainers that take seconds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from senri.data.corpus import Document
from senri.data.pages import Page, RecallPages
from senri.data.training_sample import TrainingSample
from senri.hf.convert import convert_to_senri
from senri.training.features import collect
from senri.training.settings import TrainingSettings
from senri.training.trainer import Trainer, run_identity

from ..conftest import VOCABULARY

SETTINGS = TrainingSettings(
    batch_size=2,
    max_length=30,
    seed=0,
    trainable="memory",
    lora_rank=2,
    piece_length=8,
    bptt_pieces=None,
    learning_rate=1e-2,
    gate_learning_rate=1.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    max_steps=6,
    warmup_steps=1,
    curriculum=(),
    write_loss_weight=0.5,
    distillation_weight=0.0,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    bf16=False,
    save_steps=3,
    probe_steps=3,
)


@dataclass(frozen=True)
class Verses:
    """Real text by letters; each third sample is a little shorter, and asks at its end for what it began with."""

    text: str
    length: int = 30

    def __getitem__(self, index: int) -> TrainingSample:
        recall = index % 3 == 0
        length = self.length - 11 if recall else self.length
        start = 1000 * index + 17
        letters = self.text[start : start + length]
        ids = np.array([3 + ord(letter) % (VOCABULARY - 3) for letter in letters], dtype=np.int32)
        weight, write = np.full(length, 1.0, np.float32), np.full(length, -1, np.int8)
        if recall:
            ids[-4:] = ids[2:6]
            weight[:-4] = 0
            write[:] = 0
            write[2:6] = 1
        return TrainingSample(ids, weight, write, "recall" if recall else "text", f"verse {index}")

    def at_length(self, max_length: int) -> "Verses":
        return replace(self, length=max_length)


class One:
    """The same sample again and again."""

    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, index):
        return self.sample

    def at_length(self, length):
        return self


@pytest.fixture(scope="session")
def verses(real_text) -> Verses:
    return Verses(real_text)


@pytest.fixture
def make_trainer(make_senri, verses, tmp_path):
    """``(folder, model options, teacher, probed, **settings)`` -> a trainer on a tiny model."""

    def make(folder: str = "run", model: Any = None, mix: Any = None, options: Any = None, **changes: Any) -> Trainer:
        extra = {name: changes.pop(name) for name in list(changes) if not hasattr(SETTINGS, name)}
        model = model or make_senri(**{"memory_conv_size": 2, "memory_readout": "head"} | (options or {}))
        settings = replace(SETTINGS, **changes)
        identity = run_identity(settings, {"model": "tiny"})
        return Trainer(model, settings, mix or verses, Path(tmp_path) / folder, identity, **extra)

    return make


# training on features --------------------------------------------------------------------------------------------

# A window that holds most questions, and far less than a stream of pages.
READER = {
    "sliding_window_size": 112,
    "chunk_size": 16,
    "num_memory_layers": 2,
    "first_memory_layer": 1,
    "memory_layer_interval": 1,
    "memory_num_heads": 2,
    "memory_num_key_value_heads": 1,
    "memory_head_dim": 8,
    "update_rule": "delta_token",
    "memory_readout": "head",
    "memory_conv_size": 4,
    "write_gate": "hidden",
}


@pytest.fixture(scope="session")
def make_reader(randomise):
    """``(random, **config)`` -> a tiny Senri with the real vocabulary in float32, as is trained on features."""

    def make(random: bool = True, **config: Any) -> Any:
        torch.manual_seed(0)
        fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 49152}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
        special = {"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        base = LlamaForCausalLM(LlamaConfig(**fields, **heads, **special, initializer_range=0.2)).eval()
        model = convert_to_senri(base, **{**READER, **config})
        return randomise(model) if random else model

    return make


class FewPrompts(RecallPages):
    """The base's answers to what no page answers take their time; and small pages would hold hardly a message."""

    def stream(self, index: int) -> list[Page]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("senri.data.pages.MESSAGE", 0.6)
            return super().stream(index)

    def unrelated(self) -> list[list[int]]:
        return super().unrelated()[:6]


@pytest.fixture(scope="session")
def pages(real_text, real_tokenizer) -> RecallPages:
    """Streams of two small pages."""
    documents = [Document(f"book {i}", real_text[start : start + 40_000]) for i, start in enumerate((0, 1_000_000))]
    return FewPrompts(documents, real_tokenizer, size=160, pages=2, questions=2, chat=0.3, seed=0)


@pytest.fixture(scope="session")
def make_features(pages):
    """``(model, streams)`` -> their features."""

    def make(model: Any, streams: Any = range(4)) -> Any:
        return collect(model, pages, streams, batch=3)

    return make
