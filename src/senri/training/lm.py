"""Training a TransformerLM from scratch on packed texts.

A sample is a few segments of one text: softmax attention sees a segment, the memories go on through the sample, and
gradients with them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from senri.data.packing import PackedTexts
from senri.files import write_atomically
from senri.identity import Identity
from senri.lm import TransformerLM
from senri.training import checkpoint
from senri.training.interrupt import TrainingStopped, catch_interrupt
from senri.training.log import Entry, TrainingLog
from senri.training.optim import make_optimizer
from senri.training.settings import TrainingError

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class LMSettings:
    """Names and meanings as in config/experiment.yaml, ``transformer_lm.training``."""

    epochs: int
    batch_size: int
    segment_length: int
    segments: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    warmup_ratio: float
    bf16: bool
    save_steps: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.segments * self.segment_length


class _Plan(NamedTuple):
    max_steps: int
    warmup_steps: int


class LMTrainer:
    """One run in one folder; makes it or goes on with it, bit for bit.

    Args:
        model: fresh, on the CPU; it is trained in place, on a GPU where there is one.
        data: samples of ``settings.length`` tokens.
        folder: for checkpoints, log and weights.
        identity: all that decides the result; the folder takes no other run.
        show: called with each entry of the log; ``say`` with a line now and then.

    Raises:
        ValueError: samples of another length.
    """

    def __init__(
        self,
        model: TransformerLM,
        data: PackedTexts,
        settings: LMSettings,
        folder: Path,
        identity: Identity,
        *,
        show: Callable[[Entry], None] = lambda entry: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if data.length != settings.length:
            raise ValueError(f"the samples have {data.length} tokens, the settings say {settings.length}")
        self.model, self.data, self.settings = model, data, settings
        self.folder, self.identity, self.show, self.say = folder, identity, show, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps_per_epoch = -(-len(data) // settings.batch_size)
        self.max_steps = self.steps_per_epoch * settings.epochs
        self.step = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def train(self) -> Path:
        """Train to the end, leaving the model in ``eval()``; returns the path of the weights.

        Raises:
            TrainingError: a loss or gradient that is not finite, a disk that is full, a damaged checkpoint, a folder
                with another run.
            TrainingStopped: Ctrl-C.
        """
        self._start()
        log = TrainingLog(self.folder, self.step)
        try:
            with catch_interrupt(self.say) as interrupt:
                while self.step < self.max_steps:
                    entry = self._one_step()
                    log.write(entry)
                    self.show(entry)
                    if self._save_is_due() or interrupt.asked:
                        self._save()
                    if interrupt.asked and self.step < self.max_steps:
                        raise TrainingStopped(self.step)
        finally:
            log.close()
        self.model.eval()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(self.folder / WEIGHTS, save(weights))
        return self.folder / WEIGHTS

    def loss(self, ids: Tensor, indices: Sequence[int]) -> Tensor:
        """Mean nats a token of samples ``ids`` ``[B, length + 1]``, whose numbers in the data are ``indices``."""
        size, state = self.settings.segment_length, self.model.init_state(len(ids))
        nats = ids.new_zeros((), dtype=torch.float32)
        for start in range(0, self.settings.length, size):
            out = self.model(ids[:, start : start + size], state)
            state = out.state.next_segment()
            targets = ids[:, start + 1 : start + size + 1]
            nats = nats + F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return nats / targets.numel() / self.settings.segments

    def _start(self) -> None:
        checkpoint.open_folder(self.folder, self.identity)
        torch.manual_seed(self.settings.seed)
        self.model.to(self.device).train()
        self.parameters = dict(self.model.named_parameters())
        plan = _Plan(self.max_steps, round(self.max_steps * self.settings.warmup_ratio))
        self.optimizer, self.scheduler = make_optimizer(parameter_groups(self.parameters, self.settings), plan)
        if checkpoint.checkpoints(self.folder):
            self.step = checkpoint.load(self.folder, self.parameters, self.optimizer, self.scheduler, process=0)
            self.say(f"going on after step {self.step:,} of {self.max_steps:,}")

    def _save_is_due(self) -> bool:
        return self.step % self.settings.save_steps == 0 or self.step == self.max_steps

    def _save(self) -> None:
        checkpoint.save(self.folder, self.step, self.parameters, self.optimizer, self.scheduler, main=True)

    def _one_step(self) -> Entry:
        started = time.perf_counter()
        indices = self._indices()
        ids = torch.stack([torch.from_numpy(self.data[i]).long() for i in indices]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            loss = self.loss(ids, indices)
        self._check(loss, "loss", indices)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        self._check(norm, "gradient", indices)
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.max_grad_norm, norm)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens, seconds = len(ids) * self.settings.length, time.perf_counter() - started
        return {
            "step": self.step,
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "rate": rate,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _indices(self) -> list[int]:
        """The samples of the step at hand."""
        epoch, number = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self.data.order(epoch)
        first = number * self.settings.batch_size
        return self._order[1][first : first + self.settings.batch_size]

    def _check(self, value: Tensor, what: str, indices: Sequence[int]) -> None:
        if not value.isfinite():
            raise TrainingError(
                f"step {self.step + 1}: the {what} is {value.item():g} at sample {indices[0]} "
                f"({self.data.source(indices[0])}) and those beside it: lower the learning rate, or look at these texts"
            )


def parameter_groups(parameters: dict[str, nn.Parameter], settings: LMSettings) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and gates do not."""
    decays = {name: p.dim() > 1 and "gate" not in name for name, p in parameters.items()}
    groups = ((True, "matrices", settings.weight_decay), (False, "vectors", 0.0))
    return [
        {
            "name": group,
            "params": [p for name, p in parameters.items() if decays[name] == kind],
            "lr": settings.learning_rate,
            "weight_decay": decay,
        }
        for kind, group, decay in groups
    ]


def lm_identity(model: TransformerLM, settings: LMSettings, facts: dict[str, Any]) -> Identity:
    """All that decides a run's result: ``facts`` about the data, the model, the settings, and what it runs on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {**facts, "numbers": model.numbers, "settings": dataclasses.asdict(settings), "device": device}
