"""From answers to a section of the report: shares with intervals, controls side by side, verdicts, warnings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from senri.evaluation.report import Curves, HeatMap, Section, Series, Table
from senri.evaluation.runner import ARMS, MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY
from senri.evaluation.statistics import Share, separate, share

Record = Mapping[str, Any]
CONTROLS = (MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY)


@dataclass(frozen=True)
class Cell:
    """All answers of one cell. An answer is correct when everything asked for was said (score 1)."""

    records: tuple[Record, ...]

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.records)

    def share(self, arm: str) -> Share | None:
        """Share of correct answers of an arm, None where it was not run."""
        found = [r["arms"][arm]["score"] == 1.0 for r in self.records if arm in r["arms"]]
        return share(sum(found), len(found)) if found else None

    def score(self, arm: str) -> float | None:
        """Mean score (RULER's figure: parts of an answer count), None where the arm was not run."""
        scores = [r["arms"][arm]["score"] for r in self.records if arm in r["arms"]]
        return sum(scores) / len(scores) if scores else None

    @property
    def texts(self) -> int:
        """Different readings that the samples come from: answers from one text are not independent."""
        return len({r["key"].rsplit("/", 1)[0] for r in self.records})

    @property
    def exact(self) -> Share | None:
        """Share of answers that are the expected one and nothing else, None where that is not known."""
        known = [r["arms"][MEMORY]["exact"] for r in self.records if r["arms"][MEMORY]["exact"] is not None]
        return share(sum(known), len(known)) if known else None

    @property
    def in_window(self) -> float | None:
        """Share of the samples whose evidence is all in the window, None for tasks without evidence."""
        known = [r["in_window"] for r in self.records if r["in_window"] is not None]
        return sum(known) / len(known) if known else None

    @property
    def partial(self) -> bool:
        """Whether some answers were right in part."""
        return any(arm["score"] not in (0.0, 1.0) for r in self.records for arm in r["arms"].values())

    @property
    def verdict(self) -> str:
        """What the intervals allow to say of the memory, and nothing more."""
        memory = self.share(MEMORY)
        controls = {arm: self.share(arm) for arm in CONTROLS}
        assert memory is not None
        signs = {arm: separate(memory, c) for arm, c in controls.items() if c is not None}
        if worse := [arm for arm, sign in signs.items() if sign < 0]:
            return f"worse than {worse[0]}"
        if all(sign > 0 for sign in signs.values()):
            return "recalls"
        return "fact in window" if self.in_window == 1.0 else "nothing shown"


def group(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], Cell]:
    """Cells by the values of ``names`` (fields of a record's cell), numbers in rising order, None first."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record["cell"].get(name) for name in names)].append(record)
    keys = sorted(groups, key=lambda key: tuple((v is not None, v) for v in key if not isinstance(v, str)))
    return {key: Cell(tuple(groups[key])) for key in keys}


def recall_section(title: str, records: Sequence[Record], window: int | None, text: str = "") -> Section:
    """The section of a suite of tasks with lengths and, some of them, depths.

    Args:
        window: the model's W, for the line ``W / length`` that a model without memory reaches.
    """
    tables: list[Table] = []
    figures: list[Curves | HeatMap] = []
    flags: list[str] = []
    for task in dict.fromkeys(r["cell"]["task"] for r in records):
        mine = [r for r in records if r["cell"]["task"] == task]
        by_length = group(mine, "length")
        tables.append(_table(task, {f"{key[0]:,}": cell for key, cell in by_length.items()}, "length", window))
        by_cell = group(mine, "length", "depth")
        if any(depth is not None for _, depth in by_cell):
            figures.append(_heat_map(task, by_cell, window))
        figures.append(_curves(task, by_length, window))
        flags += [flag for (n,), cell in by_length.items() for flag in warnings(f"{task} at {n:,}", cell)]
    return Section(title, text, tuple(flags), tuple(tables), tuple(figures))


def distance_section(title: str, records: Sequence[Record], window: int | None, text: str = "") -> Section:
    """The section of recall against the number of tokens read since the fact."""
    cells = {key[0]: cell for key, cell in group(records, "distance").items()}
    table = _table("recall_by_writes", {f"{n:,}": cell for n, cell in cells.items()}, "tokens since the fact", None)
    series = [_series(arm, cells) for arm in ARMS]
    figure = Curves(
        "recall_by_writes",
        "Recall against tokens read since the fact" + (f" (window {window:,})" if window else ""),
        "tokens since the fact",
        "answers found",
        tuple(s for s in series if s.x),
        log_x=True,
        y_range=(0.0, 1.0),
    )
    flags = [flag for n, cell in cells.items() for flag in warnings(f"{n:,} tokens since the fact", cell)]
    return Section(title, text, tuple(flags), (table,), (figure,))


def warnings(place: str, cell: Cell) -> list[str]:
    """What makes a cell's figures doubtful: answers given away by the window or the question, or guessed."""
    found = []
    if leaks := sum(r["leak"] for r in cell.records):
        found.append(
            f"LEAK: {place}: in {leaks} of {cell.n} samples the answer stands in the window or the question, though "
            "the fact was put elsewhere"
        )
    off, guess = cell.share(MEMORY_OFF), cell.share(QUESTION_ONLY)
    in_window = cell.in_window
    if (
        off is not None
        and in_window is not None
        and off.low > in_window
        and (guess is None or separate(off, guess) > 0)
    ):
        found.append(
            f"LEAK: {place}: without memory {off.value:.0%} are answered, but only {in_window:.0%} of the facts "
            "are in the window"
        )
    if guess is not None and separate(guess, share(0, guess.n)) > 0:
        found.append(f"GUESSABLE: {place}: {guess.value:.0%} are answered from the question alone")
    return found


def _table(task: str, cells: Mapping[str, Cell], axis: str, window: int | None) -> Table:
    arms = [arm for arm in ARMS if any(cell.share(arm) for cell in cells.values())]
    partial = any(cell.partial for cell in cells.values())
    scores = [f"{arm}, mean score" for arm in arms] if partial else []
    columns = [axis, "samples", "texts", "facts in window", *arms, "memory, exact", *scores, "verdict"]
    rows = []
    for label, cell in cells.items():
        shares = [_shown(cell.share(arm)) for arm in arms]
        means = [cell.score(arm) for arm in arms] if partial else []
        rows.append((label, cell.n, cell.texts, cell.in_window, *shares, _shown(cell.exact), *means, cell.verdict))
    formats = {"facts in window": ".0%", **dict.fromkeys(scores, ".1%")}
    note = (
        f"Exact attention alone (W = {window:,}) reaches the facts in the window: W / length of facts spread evenly."
        if window
        else ""
    )
    return Table(task, tuple(columns), tuple(rows), formats, note)


def _shown(value: Share | None) -> str | None:
    return None if value is None else f"{value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"


def _heat_map(task: str, cells: Mapping[tuple[Any, ...], Cell], window: int | None) -> HeatMap:
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells if depth is not None})
    arms = [arm for arm in ARMS if any(cell.share(arm) for cell in cells.values())]

    def value(arm: str, length: int, depth: float) -> float | None:
        found = cells[length, depth].share(arm) if (length, depth) in cells else None
        return None if found is None else found.value

    panels = tuple((arm, tuple(tuple(value(arm, n, d) for n in lengths) for d in depths)) for arm in arms)
    samples = sorted({cell.n for cell in cells.values()})
    return HeatMap(
        f"{task}_grid",
        f"{task}: answers found",
        "length (tokens)",
        "depth of the fact",
        tuple(tokens(n) for n in lengths),
        tuple(f"{depth:.0%}" for depth in depths),
        panels,
        f"{'–'.join(map(str, sorted({samples[0], samples[-1]})))} samples a cell"
        + (f"; window {window:,} tokens" if window else ""),
    )


def _curves(task: str, cells: Mapping[tuple[Any, ...], Cell], window: int | None) -> Curves:
    by_length = {key[0]: cell for key, cell in cells.items()}
    series = [s for s in (_series(arm, by_length) for arm in ARMS) if s.x]
    if window is not None:
        xs = tuple(float(n) for n in by_length)
        series.append(Series("W / length", xs, tuple(min(1.0, window / x) for x in xs), dashed=True))
        known = {n: c.in_window for n, c in by_length.items() if c.in_window is not None}
        if known:
            series.append(Series("facts in window", tuple(map(float, known)), tuple(known.values()), dashed=True))
    return Curves(
        f"{task}_by_length",
        f"{task}: answers found, all depths",
        "length (tokens)",
        "answers found",
        tuple(series),
        log_x=True,
        y_range=(0.0, 1.0),
    )


def _series(arm: str, cells: Mapping[int, Cell]) -> Series:
    return share_series(arm, [(x, cell.share(arm)) for x, cell in cells.items()])


def share_series(name: str, points: Iterable[tuple[float, Share | None]]) -> Series:
    """A curve of shares with their intervals; points without a share are left out."""
    known = [(float(x), s) for x, s in points if s is not None]
    return Series(
        name,
        tuple(x for x, _ in known),
        tuple(s.value for _, s in known),
        tuple(s.low for _, s in known),
        tuple(s.high for _, s in known),
    )


def tokens(n: int) -> str:
    """4096 -> 4K, 1048576 -> 1M."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
