"""Two runs side by side: the same samples answered by two models, and a verdict only where intervals separate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from senri.evaluation.recall import Cell, Record, group, share_series, tokens
from senri.evaluation.report import Curves, Report, Section, Table, Value
from senri.evaluation.run import RECORDS, load_identity, versions
from senri.evaluation.runner import MEMORY, read_records
from senri.evaluation.statistics import mean, separate
from senri.identity import differences

NAMES = ("A", "B")


def compare(a: Path, b: Path) -> Report:
    """The report of a comparison of two runs' folders.

    Raises:
        ValueError: one is no run, or they have no sample in common.
    """
    identities = [load_identity(folder) for folder in (a, b)]
    records = [_records(folder) for folder in (a, b)]
    common = records[0].keys() & records[1].keys()
    sections = [*_recall_sections(*records), *_perplexity_sections(*records)]
    if not sections:
        raise ValueError(f"{a} and {b} have no cell of a suite in common: nothing can be compared")
    facts: dict[str, Value] = {f"run {name}": str(folder) for name, folder in zip(NAMES, (a, b), strict=True)}
    for name, identity in zip(NAMES, identities, strict=True):
        facts |= {f"{name}: {key}": identity.get(key) for key in ("model", "adapter", "base_fingerprint")}
    text = f"{len(common):,} of A's {len(records[0]):,} and B's {len(records[1]):,} records have the same name."
    if differing := sorted(differences(identities[0], identities[1])):
        text += f"\nThe runs differ in: {', '.join(differing)}."
    compared = {s.title for s in sections}
    if left_out := {k.split("/")[0] for run in records for k in run} - compared:
        text += f"\nNot compared (see the runs' own reports): {', '.join(sorted(left_out))}."
    config = dict(zip(NAMES, identities, strict=True))
    return Report(
        f"A: {a.name}, B: {b.name}",
        {**facts, **versions()},
        (Section("What is compared", text), *sections),
        config,  # type: ignore[arg-type]
    )


def _records(folder: Path) -> dict[str, Record]:
    if not (folder / RECORDS).is_file():
        raise ValueError(f"{folder} holds no records: its evaluation was not begun")
    return dict(read_records(folder / RECORDS))


def _recall_sections(a: Mapping[str, Record], b: Mapping[str, Record]) -> list[Section]:
    recall = [[r for r in run.values() if "cell" in r and "expected" in r] for run in (a, b)]
    suites = dict.fromkeys(r["key"].split("/")[0] for r in recall[0])
    sections = []
    for suite in suites:
        mine = [[r for r in run if r["key"].split("/")[0] == suite] for run in recall]
        section = _recall_section(suite, *mine)
        if section.tables[0].rows:
            sections.append(section)
    return sections


def _recall_section(suite: str, a: Sequence[Record], b: Sequence[Record]) -> Section:
    rows, figures = [], []
    cells = [group(run, "task", "length", "distance") for run in (a, b)]
    tasks = list(dict.fromkeys(r["cell"]["task"] for r in a))
    for key in sorted(cells[0], key=lambda key: tasks.index(key[0])):
        if key in cells[1]:
            rows.append(_row(key, cells[0][key], cells[1][key]))
    columns = ("task", "length", "A samples", "A", "B samples", "B", "only A right", "only B right", "p", "verdict")
    for task in tasks:
        figures.append(_curves(suite, task, cells))
    note = "p: exact binomial test on the samples that only one of the two got right, the same prompts in both runs."
    return Section(suite, tables=(Table(suite, columns, tuple(rows), {"p": ".3f"}, note),), figures=tuple(figures))


def _row(key: tuple[Any, ...], a: Cell, b: Cell) -> tuple[Any, ...]:
    shares = [share for cell in (a, b) if (share := cell.share(MEMORY)) is not None]
    right = [{(r["key"], r["prompt_sha256"]): r["arms"][MEMORY]["score"] == 1.0 for r in c.records} for c in (a, b)]
    same = right[0].keys() & right[1].keys()
    only_a = sum(right[0][k] and not right[1][k] for k in same)
    only_b = sum(right[1][k] and not right[0][k] for k in same)
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else None
    sign = separate(shares[0], shares[1])
    shown = [f"{s.value:.0%} [{s.low:.0%}, {s.high:.0%}]" for s in shares]
    where = f"{key[1] or key[2]:,}"
    paired = (only_a, only_b, None if p is None else float(p)) if same else (None, None, None)
    return (key[0], where, a.n, shown[0], b.n, shown[1], *paired, ("nothing shown", "A better", "B better")[sign])


def _curves(suite: str, task: str, cells: Sequence[Mapping[tuple[Any, ...], Cell]]) -> Curves:
    series = []
    for name, run in zip(NAMES, cells, strict=True):
        points = [(k[1] or k[2], cell.share(MEMORY)) for k, cell in run.items() if k[0] == task]
        series.append(share_series(name, points))
    title = f"{task}: answers found with memory"
    return Curves(f"{suite}_{task}", title, "tokens", "answers found", tuple(series), log_x=True, y_range=(0.0, 1.0))


def _perplexity_sections(a: Mapping[str, Record], b: Mapping[str, Record]) -> list[Section]:
    keys = [k for k in a if k.startswith("perplexity/") and k in b and a[k]["edges"] == b[k]["edges"]]
    keys = [k for k in keys if a[k]["text_sha256"] == b[k]["text_sha256"]]
    if not keys:
        return []
    edges = a[keys[0]]["edges"]
    rows = []
    for bucket in range(len(edges) - 1):
        nll = [[run[k]["arms"][MEMORY][bucket][0] / run[k]["arms"][MEMORY][bucket][1] for k in keys] for run in (a, b)]
        difference = mean([x - y for x, y in zip(*nll, strict=True)])
        known = difference.n > 1
        verdict = "A better" if known and difference.high < 0 else "B better" if known and difference.low > 0 else None
        rows.append(
            (
                f"{tokens(edges[bucket])} to {tokens(edges[bucket + 1])}",
                *(math.exp(sum(values) / len(values)) for values in nll),
                difference.value,
                f"[{difference.low:+.4f}, {difference.high:+.4f}]" if known else None,
                verdict or "nothing shown",
            )
        )
    columns = ("tokens before", "A", "B", "A − B (nats)", "interval", "verdict")
    formats = {"A": ".2f", "B": ".2f", "A − B (nats)": "+.4f"}
    return [Section("perplexity", tables=(Table(f"{len(keys)} texts", columns, tuple(rows), formats),))]
