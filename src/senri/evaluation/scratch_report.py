"""What several models from scratch were measured at, side by side: tables, figures, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from senri.evaluation.completions import Scored, saved
from senri.evaluation.perplexity import difference, mean_nll, reading
from senri.evaluation.recall import tokens
from senri.evaluation.report import Curves, Section, Series, Table, Value
from senri.evaluation.reversal import figures_table, shown
from senri.evaluation.scratch import CARRIED, CROSSED, EMPTIED, ONE_CALL, PAIRED, READINGS, RIGHT
from senri.evaluation.statistics import mean

POINTS = 100  # of a curve of training losses


@dataclass(frozen=True)
class Result:
    """One trained model."""

    model: str
    seed: int
    training: dict[str, Any]  # tokens, seconds, losses [steps], tokens_per_step
    measured: dict[str, Any]  # of :func:`senri.evaluation.scratch.measure`

    @property
    def name(self) -> str:
        """Model and seed in words."""
        return f"{self.model}, seed {self.seed}"

    def nll(self, arm: str, buckets: Sequence[int]) -> np.ndarray:
        """Nats a token of each text."""
        return np.array([mean_nll(text, arm, buckets) for text in self.measured["texts"]])

    @property
    def readings(self) -> list[str]:
        """The ways in which its texts were read."""
        return [arm for arm in READINGS if arm in self.measured["texts"][0]["arms"]]


def sections(results: Sequence[Result], length: int) -> list[Section]:
    """All of a comparison.

    Args:
        results: one or more seeds of each model, measured on the same texts.
        length: tokens of a training sample.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result.model, []).append(result)
    return [
        _models(results, runs),
        _perplexity(runs, length),
        *_memory(runs, length),
        *(reversal_section(name, results) for name in results[0].measured["reversal"]),
    ]


def _models(results: Sequence[Result], runs: dict[str, list[Result]]) -> Section:
    columns = (
        "model", "parameters", "memory, bytes", "state at a segment's end, bytes", "trained on, tokens",
        "training, tokens/s", "reading, tokens/s", "loss at the end",
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for r in results:
        m, t = r.measured, r.training
        speed, last = t["tokens"] / t["seconds"], np.mean(t["losses"][-max(len(t["losses"]) // 20, 1) :])
        state = (m["parameters"], m["memory_bytes"], m["segment_bytes"])
        rows.append((r.name, *state, t["tokens"], speed, m["reading_tokens_per_second"], float(last)))
    counts = dict.fromkeys(columns[1:7], ",.0f")
    note = "State of one row. The loss is that of the last twentieth of the steps, in nats a token."
    table = Table("", columns, tuple(rows), {**counts, columns[7]: ".3f"}, note)
    curves = Curves(
        "training_loss",
        "Training loss, the mean over seeds",
        "tokens trained on",
        "nats a token",
        tuple(_losses(name, members) for name, members in runs.items()),
    )
    return Section("Models", tables=(table,), figures=(curves,))


def _losses(name: str, members: Sequence[Result]) -> Series:
    """Means over stretches of steps, so that a curve has few points."""
    losses = np.mean([r.training["losses"] for r in members], axis=0)
    parts = np.array_split(np.arange(len(losses)), min(POINTS, len(losses)))
    x = [(part[-1] + 1) * members[0].training["tokens_per_step"] for part in parts]
    return Series(name, tuple(map(float, x)), tuple(float(losses[part].mean()) for part in parts))


def _perplexity(runs: dict[str, list[Result]], length: int) -> Section:
    first = next(iter(runs.values()))[0]
    edges, texts = first.measured["edges"], len(first.measured["texts"])
    every = range(len(edges) - 1)
    rows: list[tuple[Value, ...]] = []
    by_position: list[tuple[Value, ...]] = []
    flags = []
    for name, members in runs.items():
        for arm in members[0].readings:
            of_texts = _over_seeds(members, arm, every)
            found = mean(of_texts)
            seeds = ", ".join(f"{math.exp(r.nll(arm, every).mean()):.2f}" for r in members)
            interval = None if found.n == 1 else f"[{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"
            value = math.exp(found.value)
            rows.append((name, arm, value, interval, seeds, reading(value)))
            by_position.append((name, arm, *(math.exp(_over_seeds(members, arm, [b]).mean()) for b in every)))
            if value < 30:
                flags.append(f"LEAK?: {name}, {arm}: perplexity {value:.2f}: was the text trained on?")
    buckets = tuple(f"{tokens(low)} to {tokens(high)}" for low, high in pairwise(edges))
    columns = ("model", "reading", "perplexity", "interval", "each seed", "says")
    tables = [
        Table("Whole texts", columns, tuple(rows), {"perplexity": ".2f"}, "Intervals (95 %) are over texts."),
        Table("By tokens before", ("model", "reading", *buckets), tuple(by_position), dict.fromkeys(buckets, ".2f")),
    ]
    if "pythia" in runs and len(runs) > 1:
        tables.append(_against_pythia(runs, every))
    figures = (
        _by_position("perplexity_segments", "Perplexity by position, read in segments", runs, edges, None),
        _by_position("perplexity_one_call", "Perplexity by position, read in one call", runs, edges, ONE_CALL),
    )
    text = (
        f"{texts} stretches of {edges[-1]:,} tokens of texts that were not trained on; samples of training have "
        f"{length:,}. Read in segments, softmax attention sees what it was trained on, and the memories hold all that "
        "came before, or are emptied at each segment. The sliding window gives each token more to look back on. In one "
        "call softmax attention sees all of the text, further than it was trained on."
    )
    return Section("Perplexity of long texts", text, tuple(flags), tuple(tables), figures)


def _against_pythia(runs: dict[str, list[Result]], every: Sequence[int]) -> Table:
    """The memory models against the model without, by text; each read with its memory."""
    rows: list[tuple[Value, ...]] = []
    for name, members in runs.items():
        for arm, without in (*PAIRED, (ONE_CALL, ONE_CALL)):
            if name != "pythia" and arm in members[0].readings:
                pairs = zip(members, runs["pythia"], strict=True)
                differences = [a.nll(arm, every) - b.nll(without, every) for a, b in pairs]
                rows.append((name, arm, *_verdict(differences)))
    note = "Nats a token, paired by text, below 0: better than pythia read in the same way (which has no memory)."
    columns = ("model", "reading", "model − pythia", "each seed", "verdict")
    return Table("Against pythia", columns, tuple(rows), note=note)


def _verdict(differences: Sequence[np.ndarray]) -> tuple[Value, ...]:
    """The mean over seeds with its interval over texts, each seed's mean, and what they show together.

    Args:
        differences: of each seed, in nats a token ``[texts]``.
    """
    interval, verdict = difference(np.mean(differences, axis=0).tolist())
    means = [float(d.mean()) for d in differences]
    if len({value < 0 for value in means}) > 1:
        verdict = "nothing shown: the seeds disagree"
    return interval, ", ".join(f"{value:+.4f}" for value in means), verdict


def _over_seeds(members: Sequence[Result], arm: str, buckets: Sequence[int]) -> np.ndarray:
    """Nats a token of each text, the mean over seeds."""
    return np.mean([r.nll(arm, buckets) for r in members], axis=0)


def _by_position(name: str, title: str, runs: dict[str, list[Result]], edges: Sequence[int], arm: str | None) -> Curves:
    """Perplexity of each bucket; ``arm`` None: segments with the memory, where there is one."""
    series = []
    for model, members in runs.items():
        chosen = arm or (CARRIED if CARRIED in members[0].readings else EMPTIED)
        y = [math.exp(_over_seeds(members, chosen, [b]).mean()) for b in range(len(edges) - 1)]
        series.append(Series(model, tuple(map(float, edges[1:])), tuple(y)))
    return Curves(name, title, "tokens before, up to", "perplexity", tuple(series), log_x=True)


def _memory(runs: dict[str, list[Result]], length: int) -> list[Section]:
    """Memory carried against memory emptied; nothing where no model has one."""
    with_memory = {name: members for name, members in runs.items() if CARRIED in members[0].readings}
    if not with_memory:
        return []
    edges = next(iter(with_memory.values()))[0].measured["edges"]
    every = range(len(edges) - 1)
    beyond = [b for b in every if edges[b] >= length]
    rows: list[tuple[Value, ...]] = []
    for name, members in with_memory.items():
        for carried, emptied in PAIRED:
            for where, buckets in (("all", every), (f"beyond {length:,} tokens", beyond)):
                if len(buckets):
                    differences = [r.nll(carried, buckets) - r.nll(emptied, buckets) for r in members]
                    rows.append((name, carried.partition(",")[0], where, *_verdict(differences)))
    columns = ("model", "reading", "tokens", "carried − emptied (nats)", "each seed", "verdict")
    figure = Curves(
        "memory_difference",
        "Memory carried − memory emptied, read in segments",
        "tokens before, up to",
        "nats a token (below 0: better)",
        tuple(_paired(name, members, edges) for name, members in with_memory.items()),
        log_x=True,
    )
    text = (
        "The same weights on the same texts, paired by text; intervals (95 %) are over texts, of the mean over seeds. "
        "Only the memory differs: carried from window to window, or emptied at the start of each."
    )
    return [Section("What the memory does", text, tables=(Table("", columns, tuple(rows)),), figures=(figure,))]


def _paired(name: str, members: Sequence[Result], edges: Sequence[int]) -> Series:
    found = [
        mean(_over_seeds(members, CARRIED, [b]) - _over_seeds(members, EMPTIED, [b])) for b in range(len(edges) - 1)
    ]
    bounded = found[0].n > 1
    return Series(
        name,
        tuple(map(float, edges[1:])),
        tuple(m.value for m in found),
        tuple(m.low for m in found) if bounded else (),
        tuple(m.high for m in found) if bounded else (),
    )


def reversal_section(facts: str, results: Sequence[Result]) -> Section:
    """One set of facts, of all results."""

    def scored(result: Result, arm: str) -> list[Scored]:
        return [Scored(**values) for values in result.measured["reversal"][facts][arm]]

    figures = figures_table("Perplexity of completions", "model", {r.name: scored(r, RIGHT) for r in results})
    rows: list[tuple[Value, ...]] = []
    for r in results:
        forward, backward = saved(scored(r, RIGHT), scored(r, CROSSED))
        rows.append((r.name, shown(forward, "+.3f"), shown(backward, "+.3f")))
    table = Table(
        "What its own prompt saves against another fact's, in nats a token",
        ("model", "forward (as trained)", "backward (reversed)"),
        tuple(rows),
        note="Above 0: the fact is known in that direction, and not only its words. An interval that holds 0 shows "
        "nothing.",
    )
    text = (
        "Facts that were trained on in their forward direction only, every second one with its sides exchanged, so "
        "that names and descriptions are completions in both directions. Each is asked for in both, at the start of a "
        "text."
    )
    return Section(f"Reversal curse: {facts}", text, tables=(figures, table))
