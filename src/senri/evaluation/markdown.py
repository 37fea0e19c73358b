"""A report as GitHub Markdown; also how a value and a table look in words, for every format."""

from __future__ import annotations

import re

import yaml

from senri.evaluation.report import Curves, HeatMap, Report, Section, Table, Value

_SPECIAL = re.compile(r"[\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w)")  # a "_" inside a word is no markup
_BLOCK = re.compile(r"^( *)(#)", re.MULTILINE)


def to_markdown(report: Report, figures: dict[str, str]) -> str:
    """The whole report; ``figures`` gives the file of each figure, relative to the report, by its name.

    Raises:
        ValueError: a row of a table is not as long as its header.
    """
    blocks = [f"# {_line(report.title)}", _flags(report)]
    for section in report.sections:
        blocks += _section(section, figures)
    if report.facts:
        facts = Table("", ("fact", "value"), tuple((name, cell_text(value)) for name, value in report.facts.items()))
        blocks += ["## Facts", _table(facts)]
    if report.config:
        blocks += ["## Configuration", _fenced(config_text(report))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def cell_text(value: Value, spec: str = "") -> str:
    """One value in words; ``spec`` is a format specification for numbers, "" for a sensible one."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if spec:
        return format(value, spec)
    if isinstance(value, int):
        return str(value)
    return format(value, ",.0f" if 1e3 <= abs(value) < 1e15 else ".4g")


def cells(table: Table) -> list[list[str]]:
    """The rows of a table in words.

    Raises:
        ValueError: a row is not as long as the header, or a format does not fit its column.
    """
    return [_row(table, row) for row in table.rows]


def numeric(table: Table) -> list[bool]:
    """For each column: whether it holds numbers alone, and so is aligned to the right."""
    columns = [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.columns))]
    return [bool(c) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in c) for c in columns]


def config_text(report: Report) -> str:
    """The configuration as YAML, in its own order."""
    return yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True, width=100)


def alt_text(figure: Curves | HeatMap) -> str:
    """What a figure shows, for those who cannot see it: its axes, its curves or panels, its note."""
    names = [series.name for series in figure.series] if isinstance(figure, Curves) else [n for n, _ in figure.panels]
    kind = "Curves" if isinstance(figure, Curves) else "Heat map"
    return f"{figure.title}. {kind} of {figure.y_label} over {figure.x_label}: {', '.join(names)}."


def _row(table: Table, row: tuple[Value, ...]) -> list[str]:
    if len(row) != len(table.columns):
        raise ValueError(f"table {table.title!r}: a row of {len(row)} values under {len(table.columns)} columns")
    try:
        return [cell_text(v, table.formats.get(name, "")) for name, v in zip(table.columns, row, strict=True)]
    except ValueError as error:
        raise ValueError(f"table {table.title!r}: {error}") from None


def _flags(report: Report) -> str:
    flags = [(section.title, flag) for section in report.sections for flag in section.flags]
    if not flags:
        return "No flags."
    lines = [f"> - **{_line(title)}**: {_line(flag)}" for title, flag in flags]
    return "\n".join(["> [!WARNING]", "> **Flags**", ">", *lines])


def _section(section: Section, figures: dict[str, str]) -> list[str]:
    blocks = [f"## {_line(section.title)}", _paragraphs(section.text)]
    blocks.append("\n".join(f"- ⚠ **Flag**: {_line(flag)}" for flag in section.flags))
    for table in section.tables:
        blocks += [f"### {_line(table.title)}" if table.title else "", _table(table), _note(table.note)]
    for figure in section.figures:
        blocks.append(f"![{_line(alt_text(figure))}]({figures[figure.name]})")
        blocks.append(_note(figure.note) if isinstance(figure, HeatMap) else "")
    return blocks


def _table(table: Table) -> str:
    rows = cells(table)
    rule = ["---:" if number else "---" for number in numeric(table)]
    header = [_line(name) for name in table.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *([_line(c) for c in row] for row in rows)])


def _note(note: str) -> str:
    return f"*{_line(note)}*" if note.strip() else ""


def _line(text: str) -> str:
    """Plain text as one line of Markdown that shows exactly it: no line break, no markup."""
    return _SPECIAL.sub(_escaped, " ".join(text.split()))


def _paragraphs(text: str) -> str:
    """Plain text of several lines; lists stay lists, but no line becomes a heading."""
    return _BLOCK.sub(r"\1\\\2", _SPECIAL.sub(_escaped, text.strip()))


def _escaped(match: re.Match[str]) -> str:
    # Entities rather than backslashes for "<", ">", "&": those are HTML's characters.
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(match[0], f"\\{match[0]}")


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"
