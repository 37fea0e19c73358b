"""One batch: read piece by piece with carried state, and propagated back through as many pieces as asked for.

Shapes: ``B`` samples, ``T`` tokens, ``W`` window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.hf.modeling_senri import SenriForCausalLM
from senri.training.batch import Batch
from senri.training.objective import GateRecorder, token_losses, write_gate_loss
from senri.training.settings import TrainingError, TrainingSettings

Sums = dict[str, float]  # of one step, by name


def add_up(parts: Iterable[Sums]) -> Sums:
    """The sums of several batches or processes as one; 0 for a name that none has."""
    total: Sums = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return total


@dataclass(frozen=True)
class Totals:
    """What a whole optimiser step is divided by, over all its batches and processes."""

    weight: float  # of scored tokens
    labels: float  # tokens with a label for the write gate
    taught: float  # weight of the scored tokens that the teacher can see

    @classmethod
    def of(cls, batches: Sequence[Batch], teacher: Any) -> Totals:
        """Of the batches of one process."""
        return cls(
            sum(float(b.weight.double().sum()) for b in batches),
            sum(float((b.write >= 0).sum()) for b in batches),
            sum(float((b.weight.double() * fits(b, teacher)[:, None]).sum()) for b in batches),
        )


def fits(batch: Batch, teacher: Any) -> Tensor:
    """``[B]`` bool: samples that the teacher can read whole."""
    longest = 0 if teacher is None else teacher.config.max_position_embeddings
    return batch.valid.sum(1) <= longest


def backward(
    model: SenriForCausalLM, batch: Batch, totals: Totals, settings: TrainingSettings, teacher: Any = None
) -> Sums:
    """Add the gradient of the batch's share of the step's loss to the parameters; returns what is logged.

    Raises:
        TrainingError: the loss is not finite, naming the sample.
    """
    with GateRecorder(model) as recorder:
        return _Pass(model, batch, totals, settings, teacher, recorder).run()


class _Pass:
    def __init__(
        self,
        model: SenriForCausalLM,
        batch: Batch,
        totals: Totals,
        settings: TrainingSettings,
        teacher: Any,
        recorder: GateRecorder,
    ) -> None:
        self.model, self.batch, self.totals, self.settings = model, batch, totals, settings
        self.teacher, self.recorder = teacher, recorder
        self.window = model.config.sliding_window_size
        self.supervised = settings.write_loss_weight > 0 and totals.labels > 0 and recorder.has_write_gate
        # labels [B, W + T] as the memory sees them: the tokens that a piece [s, e) writes are those of [s - W, e - W)
        self.labels = F.pad(batch.write, (self.window, self.window), value=-1)
        self.loss = batch.weight.new_zeros(len(batch.samples))  # of the part not yet propagated back, [B]
        self.sums: Sums = defaultdict(float)

    def run(self) -> Sums:
        settings, batch = self.settings, self.batch
        steps = batch.ids.shape[1]
        cache = self.model.model.new_cache()
        taught = self._teach()
        for number, start in enumerate(range(0, steps, settings.piece_length), 1):
            end = min(start + settings.piece_length, steps)
            mask = batch.mask
            # one autocast for the piece, another for its loss: the first caches rounded weights made without gradient
            with self._autocast(), self.recorder.piece():
                hidden = self.model.model(
                    batch.ids[:, start:end],
                    attention_mask=None if mask is None else mask[:, start:end],
                    past_key_values=cache,
                ).last_hidden_state
            self._score(hidden, start, taught)
            self._note_reads(start, end)
            self._gates(self.labels[:, start:end])
            if end == steps and self.supervised:
                with self._autocast(), self.recorder.piece():
                    self.model.model.flush(cache)  # so that the last window's tokens are judged too
                self._gates(self.labels[:, steps : steps + self.window])
            if end == steps or (settings.bptt_pieces and number % settings.bptt_pieces == 0):
                self._backward()
                cache = cache.detach()
        return self.sums

    def _autocast(self) -> Any:
        return torch.autocast(self.batch.ids.device.type, torch.bfloat16, enabled=self.settings.bf16)

    @torch.no_grad()
    def _teach(self) -> Tensor | None:
        """The teacher's last hidden states ``[B, T, hidden]``, zeros for samples that it cannot read."""
        rows = fits(self.batch, self.teacher)
        if not self.settings.distillation_weight or not rows.any():
            return None
        longest = int(self.batch.valid[rows].sum(1).max())
        with self._autocast():
            hidden = self.teacher.model(
                self.batch.ids[rows, :longest], attention_mask=self.batch.valid[rows, :longest].long(), use_cache=False
            ).last_hidden_state
        out = hidden.new_zeros(*self.batch.ids.shape, hidden.shape[-1])
        out[rows, :longest] = hidden
        return out

    def _score(self, hidden: Tensor, start: int, taught: Tensor | None) -> None:
        """Add the losses of the tokens that ``hidden`` ``[B, T', hidden]`` predicts: those one column further on."""
        batch, steps = self.batch, hidden.shape[1]
        weight = F.pad(batch.weight, (0, 1))[:, start + 1 : start + 1 + steps]
        scored = weight > 0
        if not scored.any():
            return
        target = F.pad(batch.ids, (0, 1))[:, start + 1 : start + 1 + steps][scored]
        theirs = None if taught is None else taught[:, start : start + steps][scored]
        with self._autocast():
            nll, kl = token_losses(self.model, hidden[scored], target, self.teacher, theirs)

        def rows(values: Tensor, of: Tensor) -> Tensor:
            spread = values.new_zeros(scored.shape)
            spread[scored] = values
            return (spread * of).sum(1)

        loss = rows(nll, weight)
        self.loss = self.loss + loss / self.totals.weight
        for row, sample in enumerate(batch.samples):
            self.sums[f"nll/{sample.task}"] += float(loss[row].detach())
            self.sums[f"weight/{sample.task}"] += float(weight[row].sum())
        if taught is not None:
            distance = rows(kl, weight * fits(batch, self.teacher)[:, None])
            self.loss = self.loss + self.settings.distillation_weight * distance / self.totals.taught
            self.sums["distillation"] += float(distance.detach().sum()) / self.totals.taught

    def _gates(self, labels: Tensor) -> None:
        """Add what the write gates said of tokens with ``labels`` ``[B, T']``."""
        gates = self.recorder.write_gates()
        if gates is None:
            return
        for name, found in (("plain", labels == 0), ("asked", labels == 1)):
            self.sums[f"write/{name}"] += float(gates[found].sum())
            self.sums[f"tokens/{name}"] += int(found.sum())
        if self.supervised:
            loss = write_gate_loss(self.recorder.write_logits(), labels)
            self.loss = self.loss + self.settings.write_loss_weight * loss / self.totals.labels
            self.sums["write_loss"] += float(loss.detach().sum()) / self.totals.labels

    def _note_reads(self, start: int, end: int) -> None:
        gates = self.recorder.read_gates()
        if gates is not None:
            valid = self.batch.valid[:, start:end]
            self.sums["read"] += float(gates[valid].sum())
            self.sums["tokens/read"] += int(valid.sum())

    def _backward(self) -> None:
        loss = self.loss.detach()
        finite = loss.isfinite()
        if not finite.all():
            row = int((~finite).int().argmax())
            raise TrainingError(
                f"the loss is {float(loss[row]):g} at {self.batch.name(row)}: lower the learning rates, or look "
                "at that text"
            )
        if self.loss.requires_grad:
            self.loss.sum().backward()
        self.loss = torch.zeros_like(self.loss)
