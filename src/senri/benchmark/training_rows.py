"""Training steps: through the whole model, and on cached features."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from senri.benchmark.plan import FEATURE_STEPS, FEATURE_STREAMS, Spec
from senri.benchmark.process import LeftOut, Peak, say_progress
from senri.benchmark.rows import about, open_model
from senri.benchmark.work import training_work
from senri.data.corpus import load_documents
from senri.data.mix import TrainingMix
from senri.data.pages import RecallPages
from senri.hf.base import load_model
from senri.training.feature_trainer import BATCH
from senri.training.features import collect
from senri.training.fit import Reading, check_model, fit_write_gates
from senri.training.log import Entry
from senri.training.settings import FeatureSettings, TrainingError, TrainingSettings
from senri.training.trainer import Trainer, run_identity

WARM_UP = 1  # steps


class _Enough(Exception):
    """Ends a training before it saves what nobody wants."""


def training(spec: Spec) -> dict[str, Any]:
    """Steps of ``senri train``, method bptt: one plain text of ``max_length`` tokens in pieces, all of them scored, no
    gradient cut, by the trainer itself. ``step_seconds`` of each: sample, forward, backward, optimiser.
    """
    model, tokenizer = _float32(spec)
    count = WARM_UP + spec["repeats"]
    steps = max(spec["training"]["max_steps"], count + 1)
    settings = TrainingSettings(**{**spec["training"], "curriculum": (), "max_steps": steps, "save_steps": steps + 1})
    length, window = settings.max_length, model.config.sliding_window_size
    mix = TrainingMix(
        load_documents(()), tokenizer, length=length, window=window, ratios={"book": 1.0}, seed=settings.seed
    )
    entries: list[Entry] = []

    def note(entry: Entry) -> None:
        entries.append(entry)
        say_progress(f"step {entry['step']} of {count}")
        if len(entries) == count:
            raise _Enough

    with tempfile.TemporaryDirectory() as scratch, Peak() as peak:
        try:
            trainer = Trainer(model, settings, mix, Path(scratch) / "run", run_identity(settings, {}), show=note)
            trainer.train()
        except _Enough:
            pass
        except TrainingError as error:
            raise LeftOut(str(error)) from None
    work, counted = training_work(model.config, length, length - 1, settings.trainable)
    return {
        **about(model),
        "dtype": "bfloat16" if settings.bf16 else "float32",  # of the products
        "trainable": settings.trainable,
        "parameters": sum(p.numel() for p in trainer.parameters.values()),
        "tokens": length,
        "piece_length": settings.piece_length,
        "step_seconds": [entry["tokens"] / entry["tokens_per_second"] for entry in entries[WARM_UP:]],
        "work": work._asdict(),
        "counted": counted,
        "peak_bytes": peak.bytes,
    }


def features(spec: Spec) -> dict[str, Any]:
    """The three stages of method features, on few streams: ``collect_seconds`` and tokens of reading pages and
    questions, mean seconds of a step of the write gate and of a step of what reads.
    """
    values = spec["features"]
    settings = FeatureSettings(
        **{
            **{name: value for name, value in values.items() if name not in ("chat", "seed")},
            "streams": FEATURE_STREAMS,
            "gate_steps": FEATURE_STEPS,
            "steps": FEATURE_STEPS,
        }
    )
    model, tokenizer = open_model(spec)
    try:
        check_model(model)
    except TrainingError as error:
        raise LeftOut(str(error)) from None
    pages = RecallPages(
        load_documents(()),
        tokenizer,
        size=settings.page_size,
        pages=settings.pages,
        questions=settings.questions,
        chat=values["chat"],
        seed=values["seed"],
    )
    done = 0

    def note(tokens: int, total: int) -> None:
        nonlocal done
        done = tokens
        say_progress(f"{tokens:,} of {total:,} tokens of pages and questions")

    row = about(model)
    with Peak() as peak:
        started = time.perf_counter()
        made = collect(model, pages, range(settings.streams), batch=BATCH, show=note)
        collected = time.perf_counter()
        model.float()
        fit_write_gates(model, made, settings, values["seed"])
        fitted = time.perf_counter()
        model.train()
        second = Reading(model, made, settings, values["seed"])
        ready = time.perf_counter()
        second.train(lambda entry: None)
        trained = time.perf_counter()
    return {
        **row,
        "tokens": done,
        "collect_seconds": collected - started,
        "gate_step_seconds": (fitted - collected) / settings.gate_steps,
        "step_seconds": (trained - ready) / settings.steps,
        "peak_bytes": peak.bytes,
    }


def _float32(spec: Spec) -> tuple[Any, Any]:
    """As ``senri train`` loads it: weights that learn are float32."""
    from senri.benchmark.rows import quiet

    quiet()
    model = spec["model"]
    torch.manual_seed(0)
    return load_model(model["name"], "float32", model["adapter"], **model["overrides"])
