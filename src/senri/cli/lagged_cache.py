"""``scripts/lagged_cache.py``: Lagged Cache Training and sequential training of one model, side by side. How stands in
config/experiment.yaml under `lagged_cache`; texts, vocabulary and facts under `transformer_lm`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senri.cli.common import console, resumable, warn
from senri.cli.experiment import RESULT, Display, Material, pack, prepare
from senri.config import ConfigManager
from senri.config.schema import LaggedCacheConfig, Section, TransformerLMConfig

if TYPE_CHECKING:
    from senri.data.packing import PackedTexts
    from senri.evaluation.lagged_report import Run
    from senri.lm import TransformerLM
    from senri.training.lm import LMSettings, LMTrainer

PLAIN, SEQUENTIAL = "no feedback", "sequential"
SPEED, PASSES = "speed.json", "passes.json"


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    passes: int | None = None  # of a step; None: not LCT
    tolerance: float = 0.0
    feedback: bool = True


def arms(lct: LaggedCacheConfig) -> list[Arm]:
    """All that are compared."""
    until = Arm(f"LCT until {lct.until.tolerance:g}", lct.until.passes, lct.until.tolerance)
    return [Arm(PLAIN, feedback=False), *lagged_arms(lct), until, Arm(SEQUENTIAL)]


def lagged_arms(lct: LaggedCacheConfig) -> list[Arm]:
    """Those with a fixed number of passes."""
    return [Arm("LCT" if passes == 1 else f"LCT, K = {passes}", passes) for passes in dict.fromkeys(lct.passes)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; exit status 1 and one line on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(
        description="Train one model with feedback by Lagged Cache Training and sequentially, and compare. Everything "
        "stands in config/experiment.yaml under lagged_cache. Ctrl-C stops; the same command goes on."
    )
    parser.parse_args(arguments)
    with resumable():
        run(ConfigManager())


def run(config: ConfigManager) -> Path:
    """Make or go on with all runs, write the report; returns its folder."""
    from senri.cli.experiment import check_packages

    check_packages()
    started, lct = time.perf_counter(), config.experiment.lagged_cache
    lm = merged(config.experiment.transformer_lm, lct)
    material = prepare(config, lm)
    work = Work(lct, lm, material, Path(config.experiment.output_dir) / "lagged_cache" / _folder_name(lct, material))
    console.print(f"results go to {work.folder}")
    runs: list[Run] = []
    for seed in dict.fromkeys(lct.seeds):
        of_seed = [work.train(arm, seed, "steps") for arm in arms(lct)]
        budget = next(r for r in of_seed if r.arm == lagged_arms(lct)[0].name).seconds
        by_name = {r.arm: r for r in of_seed}
        for arm in [*lagged_arms(lct)[1:], Arm(SEQUENTIAL)]:
            known = by_name[arm.name]
            of_seed.append(work.train(arm, seed, "time", max(int(budget / known.seconds * known.steps), 1)))
        runs += of_seed
    sweep = [
        work.train(arm, lct.seeds[0], f"rate {rate:g}", rate=rate)
        for rate in lct.sweep.learning_rates
        for arm in (lagged_arms(lct)[0], Arm(SEQUENTIAL))
    ]
    work.write(runs, sweep, work.speed(), work.passes())
    console.print(f"{time.perf_counter() - started:,.0f} s")
    return work.folder


def merged(lm: TransformerLMConfig, lct: LaggedCacheConfig) -> TransformerLMConfig:
    """What `lagged_cache` takes from `transformer_lm`, with its own values put in; enough text for its samples."""
    reading = {"length": lct.validation.length, "samples": lct.validation.samples}
    values = {
        "model": lct.model,
        "training": lct.training,
        "evaluation": lm.evaluation.model_copy(update=reading),
    }
    return lm.model_copy(update=values)


def _folder_name(lct: LaggedCacheConfig, material: Material) -> str:
    from senri.identity import run_name

    # what only says which runs and measurements there are, or is kept with them, stays out
    apart: dict[str, Any] = dict.fromkeys(("seeds", "passes", "speed", "convergence"), True)
    how = lct.model_dump(exclude={**apart, "sweep": {"learning_rates"}})
    return run_name({**material.identity, "lagged_cache": how})


@dataclass(frozen=True)
class Work:
    """One experiment in one folder."""

    lct: LaggedCacheConfig
    lm: TransformerLMConfig
    material: Material
    folder: Path

    # training ------------------------------------------------------------------------------------------------

    def train(self, arm: Arm, seed: int, kind: str, steps: int | None = None, *, rate: float | None = None) -> Run:
        """One run, or what is known of it: trained, and measured as it will be used.

        Args:
            kind: ``steps`` | ``time`` | ``rate ...``: what it is compared by, a part of the folder's name.
            steps: fewer or more than the configured epochs have; the learning rate falls to zero there.
            rate: another learning rate, and the sweep's size.
        """
        from senri.evaluation.lagged import validation
        from senri.evaluation.lagged_report import Run
        from senri.evaluation.scratch import measure_reversal
        from senri.training.interrupt import TrainingStopped
        from senri.training.log import read_log
        from senri.training.settings import TrainingError

        folder = self._run_folder(arm, seed, kind)
        if (folder / RESULT).is_file():
            return Run(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
        settings = self.settings(seed, rate)
        data = self._data(seed, rate)
        model, display = self.model(arm, seed), Display(f"{arm.name}, {kind}, seed {seed}")
        trainer = self._trainer(arm, model, data, settings, folder, display, steps)
        display.steps = trainer.max_steps
        stopped = None
        try:
            trainer.train()
        except TrainingStopped as stop:
            warn(f"interrupted; all {stop.step} steps are kept in {folder}, go on with: {_command()}")
            sys.exit(130)
        except TrainingError as error:
            if rate is None or not str(error).startswith("step "):
                raise
            stopped = str(error)  # what a sweep looks for
        model.eval()
        log, segment = read_log(folder), settings.segment_length
        cache = getattr(trainer, "cache", None)
        result = Run(
            arm=arm.name,
            kind=kind,
            seed=seed,
            rate=settings.learning_rate,
            steps=len(log),
            tokens=sum(e["tokens"] for e in log),
            seconds=sum(e["seconds"] for e in log),
            losses=[e["loss"] for e in log],
            passes=[e["passes"] for e in log if "passes" in e],
            epochs=[e for e in log if "gap" in e],
            cache_bytes=0 if cache is None else cache.nbytes,
            cache_on_disk=bool(cache is not None and cache.on_disk),
            samples=len(data),
            stopped=stopped,
            validation=[]
            if stopped
            else validation(model, self.material.texts, segment, self.lct.validation.batch_size),
            reversal=measure_reversal(model, self.material.tokenizer, self.material.facts, display.line)
            if kind == "steps"
            else {},
        )
        _write(folder / RESULT, dataclasses.asdict(result))
        return result

    def _run_folder(self, arm: Arm, seed: int, kind: str) -> Path:
        words = "".join(c if c.isalnum() or c == "." else " " for c in f"{arm.name} {kind} seed{seed}").split()
        return self.folder / "-".join(words)

    def settings(self, seed: int, rate: float | None = None) -> LMSettings:
        """What the trainers take."""
        from senri.training.lm import LMSettings

        values = self.lct.training.model_dump(exclude={"samples"})
        if rate is not None:
            values |= {"learning_rate": rate, "epochs": self.lct.sweep.epochs}
        return LMSettings(**values, seed=seed)

    def model(self, arm: Arm, seed: int) -> TransformerLM:
        """Fresh; the layers of all arms begin equal."""
        import torch

        from senri.lm import create_model

        torch.manual_seed(seed)
        options = self.lm.options(self.lct.kind)
        scale = self.lct.feedback_scale if arm.feedback else None
        return create_model(self.lct.kind, vocab_size=len(self.material.tokenizer), feedback_scale=scale, **options)

    def _data(self, seed: int, rate: float | None) -> PackedTexts:
        from senri.data.packing import PackedTexts

        if rate is None:
            return pack(self.lm, self.material, seed)
        return PackedTexts(self.material.stream, self.settings(seed).length, self.lct.sweep.samples, (), seed)

    def _trainer(
        self,
        arm: Arm,
        model: TransformerLM,
        data: PackedTexts,
        settings: LMSettings,
        folder: Path,
        display: Display,
        steps: int | None = None,
    ) -> LMTrainer:
        from senri.lm import FeedbackLM
        from senri.training.lagged_cache import LCTSettings, LCTTrainer
        from senri.training.lm import LMTrainer, lm_identity

        facts = {**self.material.identity, "samples": len(data), "steps": steps}
        how: dict[str, Any] = {"show": display.step, "say": console.print}
        trainer: LMTrainer
        if arm.passes is None:
            trainer = LMTrainer(model, data, settings, folder, lm_identity(model, settings, facts), **how)
        else:
            assert isinstance(model, FeedbackLM)
            lct = self.lct
            lagged = LCTSettings(arm.passes, arm.tolerance, lct.gap_samples, lct.gap_warning, lct.cache_in_memory_gb)
            identity = lm_identity(model, settings, {**facts, "lagged": dataclasses.asdict(lagged)})
            trainer = LCTTrainer(model, data, settings, lagged, folder, identity, **how)
        if steps is not None:
            trainer.max_steps = steps
        return trainer

    # what needs no finished run ------------------------------------------------------------------------------

    def speed(self) -> list[dict[str, Any]]:
        """Seconds of an epoch of the same samples, by length and arm, all in this process: ``first`` and the second."""
        from senri.data.packing import PackedTexts
        from senri.training.log import read_log

        how = self.lct.speed
        if rows := _known(self.folder / SPEED, how):
            return rows
        for length in how.lengths:
            segment = min(self.lct.training.segment_length, length)
            settings = dataclasses.replace(
                self.settings(self.lct.seeds[0]), epochs=2, batch_size=how.batch_size, segment_length=segment,
                segments=length // segment,
            )  # fmt: skip
            data = PackedTexts(self.material.stream, settings.length, how.samples)
            for arm in [*lagged_arms(self.lct), Arm(SEQUENTIAL)]:
                display = Display(f"speed at {length}, {arm.name}")
                model = self.model(arm, self.lct.seeds[0])
                with tempfile.TemporaryDirectory() as scratch:
                    trainer = self._trainer(arm, model, data, settings, Path(scratch) / "run", display)
                    display.steps = trainer.max_steps
                    trainer.train()
                    log = read_log(Path(scratch) / "run")
                half = len(log) // 2
                first, second = (sum(e["seconds"] for e in part) for part in (log[:half], log[half:]))
                tokens = sum(e["tokens"] for e in log[half:])
                rows.append(
                    {"length": length, "arm": arm.name, "first": first, "second": second, "tokens": tokens,
                     "segment": segment, "batch_size": how.batch_size}
                )  # fmt: skip
        _write(self.folder / SPEED, {"how": how.model_dump(mode="json"), "rows": rows})
        return rows

    def passes(self) -> list[dict[str, Any]]:
        """Gaps by pass of the fresh model and of trained ones, in float64, by length."""
        import numpy as np
        import torch
        from safetensors.torch import load_file

        from senri.data.packing import PackedTexts
        from senri.evaluation.lagged import gaps_by_pass
        from senri.lm import FeedbackLM
        from senri.training.lm import WEIGHTS

        seed, how = self.lct.seeds[0], self.lct.convergence
        if rows := _known(self.folder / PASSES, how):
            return rows
        trained = [lagged_arms(self.lct)[0], Arm(SEQUENTIAL)]
        for name, arm in [("fresh", trained[0]), *((f"trained: {arm.name}", arm) for arm in trained)]:
            model = self.model(arm, seed)
            if name != "fresh":
                model.load_state_dict(load_file(self._run_folder(arm, seed, "steps") / WEIGHTS))
            model = model.double().eval()
            assert isinstance(model, FeedbackLM)
            for length in how.lengths:
                data = PackedTexts(self.material.stream, length, how.samples)
                ids = np.stack([data[i][:-1] for i in range(how.samples)]).astype(np.int64)
                segment = min(self.lct.training.segment_length, length)
                gaps = gaps_by_pass(model, torch.from_numpy(ids), segment, how.tolerance)
                rows.append({"model": name, "length": length, "gaps": gaps, "tolerance": how.tolerance})
                console.print(f"{name}, {length:,} tokens: {len(gaps)} passes")
        _write(self.folder / PASSES, {"how": how.model_dump(mode="json"), "rows": rows})
        return rows

    def write(
        self, runs: list[Run], sweep: list[Run], speed: list[dict[str, Any]], passes: list[dict[str, Any]]
    ) -> None:
        """The report, on disk and on the terminal."""
        from senri.cli.eval import show
        from senri.evaluation.lagged_report import sections
        from senri.evaluation.report import Report
        from senri.evaluation.run import versions
        from senri.evaluation.write import write_report

        texts = hashlib.sha256(b"".join(text.ids.tobytes() for text in self.material.texts)).hexdigest()
        facts = {
            "command": _command(),
            "texts trained on": len(self.material.stream.names),
            "texts read": ", ".join(sorted({text.source for text in self.material.texts})),
            "digest of what was read": texts[:16],
            "vocabulary": len(self.material.tokenizer),
            **versions(),
        }
        parts = tuple(sections(runs, sweep, speed, passes))
        config: dict[str, object] = {
            "lagged_cache": self.lct.model_dump(mode="json"),
            "transformer_lm": self.lm.model_dump(mode="json"),
        }
        report = Report("Lagged Cache Training", facts, parts, config)
        write_report(report, self.folder)
        show(report, self.folder)


def _known(path: Path, how: Section) -> list[dict[str, Any]]:
    """The rows of a file, none if they were measured otherwise."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known["rows"] if known.get("how") == how.model_dump(mode="json") else []


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _write(path: Path, content: Any) -> None:
    from senri.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, allow_nan=False) + "\n").encode())
