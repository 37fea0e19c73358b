"""What a report is made of: sections of text, flags, tables and figures, whatever the suite.

Suites fill these; ``markdown.py``, ``plots.py`` and ``html.py`` only draw them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Value = str | bool | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of values; floats are drawn by ``formats`` (a format specification by column name), None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    formats: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One curve; ``low`` and ``high`` bound each point's interval, empty where there is none."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False  # a reference line rather than a measurement


@dataclass(frozen=True)
class Curves:
    """Curves over one axis."""

    name: str  # of the file: letters, digits, "_" and "-"
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeatMap:
    """A value for every pair of labels, ``values[row][column]`` in [0, 1], None where nothing was measured.

    One panel for each of ``panels`` (one name an arm), drawn side by side with one colour scale.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    panels: tuple[tuple[str, tuple[tuple[float | None, ...], ...]], ...]  # (name, values)
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One suite in the report. ``flags`` are warnings that a reader must not miss."""

    title: str
    text: str = ""
    flags: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Curves | HeatMap, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that one run, or a comparison of two, shows. ``facts``: versions, fingerprints, seeds, settings."""

    title: str
    facts: dict[str, Value]
    sections: tuple[Section, ...]
    config: dict[str, object] = field(default_factory=dict)  # the whole configuration, as it was
