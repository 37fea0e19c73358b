"""A report on disk: report.json to read back, report.md and report.html to look at, a PNG for each figure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from senri.evaluation.html import to_html
from senri.evaluation.markdown import to_markdown
from senri.evaluation.plots import render
from senri.evaluation.report import Report
from senri.files import write_atomically

_FIGURE_NAME = re.compile(r"[A-Za-z0-9_-]+")


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write all of a report's files into ``folder``, made if need be; returns their paths, report.json last.

    Everything is drawn before anything is written, and each file is whole or not there.

    Raises:
        ValueError: the report holds what JSON cannot (NaN, an unknown type), a figure's name is taken or no
            file name, a table or figure contradicts itself, matplotlib is missing, or a file cannot be written.
    """
    data = to_json(report)
    pngs = _pngs(report)
    names = {name: f"{name}.png" for name in pngs}
    contents = {names[name]: png for name, png in pngs.items()}
    contents["report.md"] = to_markdown(report, names).encode()
    contents["report.html"] = to_html(report, pngs).encode()
    contents["report.json"] = data.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def read_report(path: Path) -> Report:
    """The report in a report.json, equal to the one written (tuples within ``config`` come back as lists).

    Raises:
        ValueError: no such file, or not a report; one line that names the file.
    """
    try:
        return TypeAdapter(Report).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is not a report: {place}: {' '.join(first['msg'].split())}") from None


def to_json(report: Report) -> str:
    """Strict JSON in the order of the fields, facts and configuration in their own.

    Raises:
        ValueError: a value that JSON cannot hold; one line that says where.
    """
    fields = asdict(report)
    for problem in _problems(fields, "report"):
        raise ValueError(problem)
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _problems(value: object, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{place} has the key {key!r}, which is no text"
            yield from _problems(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _problems(item, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}: None stands for a number that is missing"
    elif not isinstance(value, str | int | float | None):
        yield f"{place} is a {type(value).__name__}, which JSON does not know"


def _pngs(report: Report) -> dict[str, bytes]:
    pngs: dict[str, bytes] = {}
    for section in report.sections:
        for figure in section.figures:
            if not _FIGURE_NAME.fullmatch(figure.name):
                raise ValueError(f"figure {figure.name!r}: a name is made of letters, digits, '_' and '-'")
            if figure.name in pngs:
                raise ValueError(f"figure {figure.name!r}: two figures have this name")
            pngs[figure.name] = render(figure)
    return pngs
