"""The numbers of a training run."""

from __future__ import annotations

from dataclasses import dataclass

LORA, ALL = "memory+lora", "all"
NOTES = "training.json"  # beside full weights: what an adapter says in its header


class TrainingError(ValueError):
    """A training that cannot start or go on; the message is one line and says how to mend it."""


@dataclass(frozen=True)
class Stage:
    """Some steps at one length."""

    max_length: int  # tokens of a sample
    steps: int


@dataclass(frozen=True)
class FeatureSettings:
    """Names and meanings as in config/training.yaml, section features."""

    streams: int
    pages: int
    page_size: int
    questions: int
    learns: str
    gate_steps: int
    write_rate: float
    steps: int
    texts: int
    fact_pages: int
    plain_pages: int
    learning_rate: float
    gate_learning_rate: float
    weight_decay: float
    save_steps: int


@dataclass(frozen=True)
class TrainingSettings:
    """Names and meanings as in config/training.yaml."""

    batch_size: int
    max_length: int
    seed: int
    trainable: str
    lora_rank: int
    piece_length: int
    bptt_pieces: int | None
    learning_rate: float
    gate_learning_rate: float
    weight_decay: float
    max_grad_norm: float
    max_steps: int
    warmup_steps: int
    curriculum: tuple[Stage, ...]
    write_loss_weight: float
    distillation_weight: float
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    bf16: bool
    save_steps: int
    probe_steps: int

    @property
    def stages(self) -> list[Stage]:
        """The curriculum, and what it leaves of ``max_steps`` at ``max_length``."""
        rest = self.max_steps - sum(stage.steps for stage in self.curriculum)
        return [*self.curriculum, Stage(self.max_length, rest)]

    def length_at(self, step: int) -> int:
        """Tokens of the samples of step ``step``, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage.max_length
            step -= stage.steps
        return self.max_length
