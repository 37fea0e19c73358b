"""The loop: steps, checkpoints, probes, and what is left at the end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor

from senri.data.training_sample import Mix, TrainingSample
from senri.hf.adapter import save_adapter
from senri.hf.base import new_folder
from senri.hf.calibrate import calibrate
from senri.hf.modeling_senri import SenriForCausalLM
from senri.identity import Identity
from senri.training import checkpoint
from senri.training.batch import Batch, collate
from senri.training.bptt import Totals, add_up, backward
from senri.training.interrupt import Interrupt, TrainingStopped, catch_interrupt
from senri.training.log import Entry, TrainingLog, summarise
from senri.training.optim import check_gate_travel, choose_trainable, group_of, make_optimizer, parameter_groups
from senri.training.probe import probe
from senri.training.settings import ALL, NOTES, TrainingError, TrainingSettings

ADAPTER, FULL = "adapter.safetensors", "model"


class Trainer:
    """One run in one folder; makes it or goes on with it. Several processes (``accelerate``) share each step.

    Args:
        model: a converted model, in float32; it is trained in place.
        mix: the samples; step ``n`` takes the next ``batch_size * gradient_accumulation_steps * processes`` of them.
        folder: for checkpoints, log and result.
        identity: from :func:`run_identity`; the folder takes no other run.
        probed: fixed held-out samples to look at every ``probe_steps``.
        calibration: tokens to calibrate the memory with as step zero; None leaves it as it is.
        teacher: the full-attention base, for distillation.
        notes: kept in the adapter.
        show: called with each entry of the log; ``say`` with a line now and then.

    Raises:
        TrainingError: settings that cannot work, or a folder with another run.
    """

    def __init__(
        self,
        model: SenriForCausalLM,
        settings: TrainingSettings,
        mix: Mix,
        folder: Path,
        identity: Identity,
        *,
        probed: Sequence[TrainingSample] = (),
        calibration: list[int] | None = None,
        teacher: Any = None,
        notes: dict[str, Any] | None = None,
        show: Callable[[Entry], None] = lambda entry: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_settings(settings, model, teacher)
        self.processes = processes()
        self.device = self.processes.device
        self.model, self.settings, self.mix, self.folder = model, settings, mix, folder
        self.identity, self.probed, self.calibration, self.teacher = identity, probed, calibration, teacher
        self.notes, self.show = notes or {}, show
        self.say = say if self.main else lambda line: None
        self.step = 0
        self._interrupt = Interrupt()
        self._mixes: dict[int, Mix] = {}

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.processes.is_main_process

    def train(self) -> Path:
        """Train to the end; returns the adapter's path (``trainable: all``: the folder of the full weights).

        Raises:
            TrainingError: a loss that is not finite, a disk that is full, a damaged checkpoint.
            TrainingStopped: Ctrl-C.
        """
        self._start()
        log = TrainingLog(self.folder, self.step) if self.main else None
        try:
            with catch_interrupt(self.say) as self._interrupt:
                while self.step < self.settings.max_steps:
                    entry, stop = self._one_step()
                    self._after(entry, log)
                    if stop and self.step < self.settings.max_steps:
                        self._save()
                        raise TrainingStopped(self.step)
        finally:
            if log is not None:
                log.close()
        return self._finish()

    # beginning and end ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Calibrate or go back to the last checkpoint; set up what learns."""
        settings = self.settings
        with self.processes.main_process_first():
            if self.main:
                checkpoint.open_folder(self.folder, self.identity)
        torch.manual_seed(settings.seed)
        self.model.to(self.device)
        resumed = bool(checkpoint.checkpoints(self.folder))
        if self.calibration is not None and not resumed and self.main:
            report = calibrate(self.model, self.calibration, num_tokens=len(self.calibration))
            gain = f"loss on repeated text {report.loss_without:.3f} -> {report.loss_with:.3f} nats a token"
            silent = "the layer read-out stays silent until it is trained"
            self.say(f"calibrated on {report.tokens:,} tokens: {gain if report.read_gate else silent}")
        self.parameters = choose_trainable(self.model, settings.trainable, settings.lora_rank)
        if any(group_of(name, p) == "gates" for name, p in self.parameters.items()):
            self.say(check_gate_travel(settings))
        for name, parameter in self.model.named_parameters():
            if settings.bf16 and name not in self.parameters:  # what learns keeps float32, rounded where it is used
                parameter.data = parameter.data.bfloat16()
        self.model.model.gradient_checkpointing = settings.gradient_checkpointing
        self.model.train()
        if self.teacher is not None:
            self.teacher.to(self.device, torch.bfloat16 if settings.bf16 else None).eval().requires_grad_(False)
        self.optimizer, self.scheduler = make_optimizer(parameter_groups(self.parameters, settings), settings)
        if resumed:
            rank = self.processes.process_index
            self.step = checkpoint.load(self.folder, self.parameters, self.optimizer, self.scheduler, process=rank)
            self.say(f"going on after step {self.step}")
        elif self.processes.num_processes > 1:
            with torch.no_grad():
                for parameter in self.parameters.values():
                    parameter.copy_(broadcast(parameter.data))
        count = sum(p.numel() for p in self.parameters.values())
        self.say(f"{count / 1e6:.2f}M parameters learn ({settings.trainable})")

    def _finish(self) -> Path:
        """Save the result."""
        self._save()
        path = self.folder / (FULL if self.settings.trainable == ALL else ADAPTER)
        if self.main:
            final = probe(self.model, self.probed, self.settings.piece_length, bf16=self.settings.bf16)
            notes = {
                **self.notes,
                "seed": self.settings.seed,
                "steps": self.step,
                "settings": dataclasses.asdict(self.settings),
                "processes": self.processes.num_processes,
                "probe": final,
            }
            self.model.eval()
            if self.settings.trainable == ALL:
                if not path.exists():
                    with new_folder(path) as scratch:
                        self.model.save_pretrained(scratch)
                        (scratch / NOTES).write_text(json.dumps(notes), encoding="utf-8")
            else:
                save_adapter(self.model, path, **notes)
        self.processes.wait_for_everyone()
        return path

    def _save(self) -> None:
        checkpoint.save(self.folder, self.step, self.parameters, self.optimizer, self.scheduler, main=self.main)
        self.processes.wait_for_everyone()

    # steps ----------------------------------------------------------------------------------------------------

    def _one_step(self) -> tuple[Entry, bool]:
        """One optimiser step; returns its log, and whether any process was asked to stop."""
        started = time.perf_counter()
        settings, length = self.settings, self.settings.length_at(self.step)
        batches = self._batches(length)
        mine = Totals.of(batches, self.teacher)
        totals = Totals(*self._sum(torch.tensor(dataclasses.astuple(mine), dtype=torch.float64)).tolist())
        try:
            if not totals.weight:
                raise TrainingError(f"no token of {batches[0].name(0)} and the samples beside it is scored")
            sums = add_up(backward(self.model, batch, totals, settings, self.teacher) for batch in batches)
        except TrainingError as error:
            raise TrainingError(f"step {self.step + 1}: {error}") from None
        norm = self._reduce_gradients()
        if not norm.isfinite():
            first = batches[0].name(0)
            raise TrainingError(
                f"step {self.step + 1}: the gradient is {float(norm):g} at {first} and the samples beside it: lower "
                "the learning rates, or look at these texts"
            )
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), settings.max_grad_norm, norm)
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        sums["tokens"] = sum(int(batch.valid.sum()) for batch in batches)
        sums["stop"] = int(self._interrupt.asked)
        sums = add_up(gather_object([dict(sums)]))
        seconds = time.perf_counter() - started
        entry = {
            "step": self.step,
            **summarise(sums),
            "rates": rates,
            "grad_norm": float(norm),
            "max_length": length,
            "tokens": int(sums["tokens"]),
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
        }
        return entry, sums["stop"] > 0

    def _batches(self, length: int) -> list[Batch]:
        """This process's share of the step's samples, batch by batch."""
        settings, processes = self.settings, self.processes
        if length not in self._mixes:
            self._mixes = {length: self.mix.at_length(length)}
        mix = self._mixes[length]
        whole = settings.batch_size * processes.num_processes
        batches = []
        for number in range(settings.gradient_accumulation_steps):
            position = (self.step * settings.gradient_accumulation_steps + number) * whole
            first = position + processes.process_index * settings.batch_size
            indices = range(first, first + settings.batch_size)
            batches.append(collate([mix[i] for i in indices], indices, self.device))
        return batches

    def _reduce_gradients(self) -> Tensor:
        """Add up the processes' gradients; returns their norm."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.processes.num_processes > 1:
            # by hand rather than by DDP, which wants one forward and one backward pass a step
            flat = self._sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return torch.nn.utils.get_total_norm(gradients)

    def _sum(self, tensor: Tensor) -> Tensor:
        return reduce(tensor.to(self.device), "sum")

    def _after(self, entry: Entry, log: TrainingLog | None) -> None:
        """Log, probe and save as is due."""
        settings = self.settings
        if log is not None:
            if self.probed and self.step % settings.probe_steps == 0:
                entry["probe"] = probe(self.model, self.probed, settings.piece_length, bf16=settings.bf16)
            log.write(entry)
            self.show(entry)
        if self.step % settings.save_steps == 0:
            self._save()


def run_identity(settings: TrainingSettings, facts: dict[str, Any]) -> Identity:
    """All that decides a run's result: ``facts`` about model and data, the settings, and what it runs on."""
    run = {"processes": processes().num_processes, "device": processes().device.type}
    return {**facts, "settings": dataclasses.asdict(settings), **run}


def processes() -> PartialState:
    """This process among those that train together."""
    return PartialState(cpu=not torch.cuda.is_available())


def check_settings(settings: TrainingSettings, model: SenriForCausalLM, teacher: Any) -> None:
    """Raises TrainingError where settings contradict each other or the model."""
    window = model.config.sliding_window_size
    taken = sum(stage.steps for stage in settings.curriculum)
    if taken >= settings.max_steps:
        raise TrainingError(
            f"the curriculum takes {taken} steps: max_steps ({settings.max_steps}) must be more, for max_length"
        )
    for stage in settings.stages:
        if stage.max_length <= window and model.config.num_memory_layers:
            raise TrainingError(
                f"samples of {stage.max_length} tokens fit into the window of {window}: the memory is never needed; "
                "raise max_length (of the curriculum's stages too)"
            )
    if settings.distillation_weight and teacher is None:
        raise TrainingError("there is no full-attention base to learn from: set distillation_weight to 0")
