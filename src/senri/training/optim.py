"""What is trained, how fast, and whether that is fast enough."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from senri.hf.adapter import add_lora
from senri.hf.modeling_senri import SenriForCausalLM
from senri.training.settings import ALL, LORA, TrainingError, TrainingSettings

# A write gate starts at logit 2 (sigmoid 0.88: everything is written). It must be able to come back to 0 at least, by
# its bias alone, or it can never learn to leave anything out.
LEAST_TRAVEL = 2.0


class Plan(Protocol):
    """How long a run is."""

    @property
    def max_steps(self) -> int: ...

    @property
    def warmup_steps(self) -> int: ...


def choose_trainable(model: SenriForCausalLM, trainable: str, lora_rank: int) -> dict[str, nn.Parameter]:
    """Freeze all but what learns (adding LoRA to the attention's projections for ``memory+lora``); returns it by name.

    Raises:
        TrainingError: there is nothing to train.
    """
    if trainable == LORA:
        add_lora(model, lora_rank)
    for name, parameter in model.named_parameters():
        learns = trainable == ALL or ".memory." in name or ".lora_" in name
        parameter.requires_grad_(learns and not name.startswith("unigram_cache."))  # method unigram fits it
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise TrainingError("num_memory_layers is 0: there is no memory to train; set trainable to all")
    return chosen


def parameter_groups(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Parameters by what they need: gates and norms of the memory have far to go, matrices may decay, vectors not."""
    rates = {
        "gates": (settings.gate_learning_rate, 0.0),
        "matrices": (settings.learning_rate, settings.weight_decay),
        "vectors": (settings.learning_rate, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in parameters.items():
        members[group_of(name, parameter)].append(parameter)
    return [
        {"name": name, "params": members[name], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in rates.items()
        if members[name]
    ]


def group_of(name: str, parameter: nn.Parameter) -> str:
    """``gates`` (of the memory: write, read, forget and mix gates, norms) | ``matrices`` | ``vectors``."""
    added = name.partition(".memory.")[2]  # empty for the base, whose gate_proj is no gate
    if "gate" in added or "norm" in added:
        return "gates"
    return "matrices" if parameter.dim() > 1 else "vectors"


def make_optimizer(groups: list[dict[str, Any]], settings: Plan) -> tuple[AdamW, LambdaLR]:
    """AdamW; the rate rises for ``warmup_steps`` and falls along a cosine to zero at ``max_steps``."""
    optimizer = AdamW(groups)
    return optimizer, _schedule(optimizer, settings)


def gate_travel(settings: TrainingSettings) -> float:
    """How far a gate's logit can move by its bias alone: Adam moves a parameter by about the rate in a step."""
    scheduler = _schedule(AdamW([nn.Parameter(torch.zeros(1))], lr=1.0), settings)
    factors = sum(scheduler.lr_lambdas[0](step) for step in range(settings.max_steps))
    return settings.gate_learning_rate * factors


def check_gate_travel(settings: TrainingSettings) -> str:
    """One line on how far gates can move.

    Raises:
        TrainingError: less than they must be able to.
    """
    travel = gate_travel(settings)
    line = f"a gate's logit can move by about {travel:.2g} in {settings.max_steps} steps"
    if travel >= LEAST_TRAVEL:
        return line
    needed = 1.05 * settings.gate_learning_rate * LEAST_TRAVEL / max(travel, 1e-30)  # rounded, it is still enough
    raise TrainingError(
        f"{line}, less than {LEAST_TRAVEL:.1f}: it would stay where it starts; set gate_learning_rate to at least "
        f"{needed:.2g} (or raise max_steps)"
    )


def _schedule(optimizer: AdamW, settings: Plan) -> LambdaLR:
    return get_scheduler("cosine", optimizer, settings.warmup_steps, settings.max_steps)
