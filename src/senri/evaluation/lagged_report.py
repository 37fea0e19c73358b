"""Lagged Cache Training against sequential training: tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from senri.evaluation.perplexity import difference
from senri.evaluation.report import Curves, Section, Series, Table, Value
from senri.evaluation.scratch_report import Result, reversal_section

SEQUENTIAL = "sequential"
SHOWN_PASSES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Run:
    """One trained model."""

    arm: str  # the way it was trained
    kind: str  # what it is compared by: steps | time | rate ...
    seed: int
    rate: float
    steps: int
    tokens: int
    seconds: float  # of the steps alone
    losses: list[float]  # of each step
    passes: list[int]  # of each step; empty: not LCT
    epochs: list[dict[str, Any]]  # the trainer's figures at the end of each epoch; empty: not LCT
    cache_bytes: int
    cache_on_disk: bool
    samples: int
    stopped: str | None  # why it ended early
    validation: list[float]  # nats a token of each text, read sequentially
    reversal: dict[str, Any]

    @property
    def name(self) -> str:
        """The way of training and the seed in words."""
        return f"{self.arm}, seed {self.seed}"


def sections(
    runs: Sequence[Run], sweep: Sequence[Run], speed: Sequence[dict[str, Any]], passes: Sequence[dict[str, Any]]
) -> list[Section]:
    """All of an experiment.

    Args:
        runs: of equal steps and of equal time, one or more seeds each.
        sweep: of several learning rates.
        speed, passes: rows of cli/lagged_cache.py's measurements.
    """
    by_steps = [run for run in runs if run.kind == "steps"]
    facts = sorted({name for run in by_steps for name in run.reversal})
    results = [Result(run.arm, run.seed, {}, {"reversal": run.reversal}) for run in by_steps]
    return [
        _convergence(passes),
        _speed(speed),
        _quality(by_steps, [run for run in runs if run.kind == "time"]),
        _gaps(by_steps),
        _sweep(sweep),
        *(reversal_section(name, results) for name in facts),
    ]


def _convergence(passes: Sequence[dict[str, Any]]) -> Section:
    rows: list[tuple[Value, ...]] = []
    for row in passes:
        gaps, tolerance = row["gaps"], row["tolerance"]
        reached = len(gaps) if gaps[-1] <= tolerance else None
        after = [gaps[n - 1] if n <= len(gaps) else None for n in SHOWN_PASSES]
        rows.append((row["model"], row["length"], reached, row["length"], *after))
    columns = ("model", "tokens", "passes needed", "at most", *(f"gap after {n}" for n in SHOWN_PASSES))
    formats = {"tokens": ",d", "passes needed": ",d", "at most": ",d", **dict.fromkeys(columns[4:], ".1e")}
    note = "A dash: no longer needed; under passes needed: not reached within as many passes as tokens."
    longest = max(row["length"] for row in passes)
    series = tuple(
        Series(row["model"], tuple(float(n + 1) for n in range(len(row["gaps"]))),
               tuple(math.log10(max(gap, 1e-18)) for gap in row["gaps"]))
        for row in passes if row["length"] == longest
    )  # fmt: skip
    figure = Curves(
        "gap_by_pass", f"Gap to the sequential states by pass, {longest:,} tokens", "passes", "log10 of the gap", series
    )
    text = (
        f"Passes without a change of weights until each position is within {passes[0]['tolerance']:g} of the "
        "sequential state, relative, in float64. They begin with the learned start at every position."
    )
    table = Table("", columns, tuple(rows), formats, note)
    return Section("Passes until the sequential result", text, tables=(table,), figures=(figure,))


def _speed(speed: Sequence[dict[str, Any]]) -> Section:
    rows: list[tuple[Value, ...]] = []
    lengths = list(dict.fromkeys(row["length"] for row in speed))
    found: dict[str, list[tuple[float, float]]] = {}
    for length in lengths:
        of_length = {row["arm"]: row for row in speed if row["length"] == length}
        slow = of_length[SEQUENTIAL]
        for arm, row in of_length.items():
            factor = slow["second"] / row["second"]
            rows.append(
                (length, arm, row["second"], row["tokens"] / row["second"], factor, slow["first"] / row["first"])
            )
            if arm != SEQUENTIAL:
                found.setdefault(arm, []).append((float(length), factor))
    columns = ("tokens", "training", "seconds an epoch", "tokens/s", "times as fast", "in the first epoch")
    formats = {"tokens": ",d", "seconds an epoch": ".3f", "tokens/s": ",.0f", "times as fast": ".1f",
               "in the first epoch": ".1f"}  # fmt: skip
    curves = Curves(
        "speed_up", "An epoch of LCT against one of sequential training", "tokens of a sample", "times as fast",
        tuple(Series(arm, tuple(x for x, _ in xy), tuple(y for _, y in xy)) for arm, xy in found.items()), log_x=True,
    )  # fmt: skip
    text = (
        "The same model and samples in one process, batches of {}; softmax attention sees at most {} tokens in all of "
        "them. The second epoch counts; in the first, LCT also makes the first states."
    ).format(speed[0]["batch_size"], max(row["segment"] for row in speed))
    return Section("Speed", text, (), (Table("", columns, tuple(rows), formats),), (curves,))


def _quality(by_steps: Sequence[Run], by_time: Sequence[Run]) -> Section:
    tables = [_losses("At an equal number of steps", by_steps, by_steps)]
    if by_time:
        first = next(run.arm for run in by_steps if run.epochs)
        budget = [run for run in by_steps if run.arm == first]
        tables.append(_losses(f"In the time that {first} takes", [*budget, *by_time], [*budget, *by_time]))
    curves = Curves(
        "training_loss", "Training loss at an equal number of steps, the mean over seeds", "steps", "nats a token",
        tuple(_smooth(arm, [r for r in by_steps if r.arm == arm]) for arm in dict.fromkeys(r.arm for r in by_steps)),
    )  # fmt: skip
    cache = _cache(by_steps)
    text = (
        "Loss of texts that were not trained on, read token by token as the model is used (LCT only trains otherwise). "
        "Differences are paired by text, of the mean over seeds; intervals (95 %) are over texts."
    )
    return Section("Quality", text, (), (*tables, cache), (curves,))


def _losses(title: str, runs: Sequence[Run], all_runs: Sequence[Run]) -> Table:
    sequential = [run for run in all_runs if run.arm == SEQUENTIAL]
    rows: list[tuple[Value, ...]] = []
    for arm in dict.fromkeys(run.arm for run in runs):
        members = [run for run in runs if run.arm == arm]
        texts = np.mean([run.validation for run in members], axis=0)
        against: list[Value] = [None, None]
        if arm != SEQUENTIAL and sequential:
            against = list(difference((texts - np.mean([r.validation for r in sequential], axis=0)).tolist()))
        each = ", ".join(f"{np.mean(run.validation):.4f}" for run in members)
        steps = ", ".join(f"{run.steps:,}" for run in dict((r.steps, r) for r in members).values())
        passes = float(np.mean([p for run in members for p in run.passes])) if members[0].passes else None
        seconds = float(np.mean([run.seconds for run in members]))
        rows.append((arm, steps, passes, seconds, float(texts.mean()), each, *against))
    columns = (
        "training", "steps", "passes a step", "seconds", "validation loss", "each seed", "against sequential",
        "verdict",
    )  # fmt: skip
    return Table(title, columns, tuple(rows), {"passes a step": ".1f", "seconds": ",.1f", "validation loss": ".4f"})


def _smooth(arm: str, members: Sequence[Run]) -> Series:
    losses = np.mean([run.losses for run in members], axis=0)
    parts = np.array_split(np.arange(len(losses)), min(100, len(losses)))
    return Series(arm, tuple(float(p[-1] + 1) for p in parts), tuple(float(losses[p].mean()) for p in parts))


def _cache(by_steps: Sequence[Run]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for run in {run.arm: run for run in by_steps if run.cache_bytes}.values():
        tokens = run.tokens / len(run.epochs)  # of an epoch
        where = "on disk" if run.cache_on_disk else "in memory"
        rows.append((run.arm, run.samples, int(tokens), run.cache_bytes, run.cache_bytes / tokens, where))
    columns = ("training", "samples", "tokens", "bytes", "bytes a token", "kept")
    formats = {"samples": ",d", "tokens": ",d", "bytes": ",d", "bytes a token": ",.1f"}
    return Table("What the states of an epoch cost", columns, tuple(rows), formats)


def _gaps(by_steps: Sequence[Run]) -> Section:
    lagged = [run for run in by_steps if run.epochs]
    names = list(dict.fromkeys(run.arm for run in lagged))
    series, rows = [], list[tuple[Value, ...]]()
    for arm in names:
        members = [run for run in lagged if run.arm == arm]
        gaps = np.mean([[e["gap"] for e in run.epochs] for run in members], axis=0)
        series.append(Series(arm, tuple(float(n + 1) for n in range(len(gaps))), tuple(map(float, gaps))))
        for run in members:
            last = run.epochs[-1]
            excess = last["sequential_loss"] - last["lagged_loss"]
            largest = max(e["contraction"] for e in run.epochs)
            rows.append((run.name, last["gap"], last["contraction"], largest, excess, _broken(run)))
    columns = (
        "training", "gap at the end", "contraction at the end", "largest contraction", "sequential − lagged loss",
        "epochs warned of",
    )  # fmt: skip
    formats = dict.fromkeys(columns[1:4], ".3f") | {columns[4]: "+.4f"}
    figure = Curves("gap_by_epoch", "Gap between the states kept and the true ones, the mean over seeds", "epochs",
                    "gap (relative)", tuple(series))  # fmt: skip
    text = (
        "At the end of each epoch the states that the next one would be fed are compared with the sequential ones of "
        "the weights as they are then. The contraction is what one more pass leaves of the gap."
    )
    return Section("Lagged and true states", text, (), (Table("", columns, tuple(rows), formats),), (figure,))


def _broken(run: Run) -> int:
    return sum(bool(epoch["broken"]) for epoch in run.epochs)


def _sweep(sweep: Sequence[Run]) -> Section:
    rows: list[tuple[Value, ...]] = []
    for run in sweep:
        loss = float(np.mean(run.validation)) if run.validation else None
        gap = contraction = excess = warned = None
        if run.epochs:
            gap = max(epoch["gap"] for epoch in run.epochs[1:] or run.epochs)
            contraction = max(epoch["contraction"] for epoch in run.epochs)
            excess = max(epoch["sequential_loss"] - epoch["lagged_loss"] for epoch in run.epochs)
            warned = _broken(run)
        rows.append((run.rate, run.arm, loss, gap, contraction, excess, warned, run.stopped))
    columns = (
        "learning rate", "training", "validation loss", "largest gap", "largest contraction",
        "largest sequential − lagged loss", "epochs warned of", "stopped",
    )  # fmt: skip
    formats = {columns[0]: "g", columns[2]: ".4f", columns[3]: ".3f", columns[4]: ".3f", columns[5]: "+.4f"}
    series = tuple(
        Series(
            f"{run.rate:g}", tuple(float(n + 1) for n in range(len(run.epochs))), tuple(e["gap"] for e in run.epochs)
        )
        for run in sweep
        if run.epochs
    )
    figure = Curves("gap_by_learning_rate", "Gap by epoch at each learning rate", "epochs", "gap (relative)", series)
    text = (
        "The same run at higher and higher learning rates, sequential training beside it: what fails in both is the "
        "rate's fault, what fails in LCT alone that of the lag. The largest gap leaves the first epoch out, whose "
        "states are of weights that knew nothing."
    )
    return Section("Learning rates", text, (), (Table("", columns, tuple(rows), formats),), (figure,))
