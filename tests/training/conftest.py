"""A small mix of real text for tiny models, and trainers that take seconds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from senri.data.training_sample import TrainingSample
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
