"""A report as one HTML page that needs nothing beside itself: styles and figures are inside."""

from __future__ import annotations

import base64
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from senri.evaluation.markdown import alt_text, cell_text, cells, config_text, numeric
from senri.evaluation.plots import DPI
from senri.evaluation.report import Report


def to_html(report: Report, pngs: dict[str, bytes]) -> str:
    """The whole page; ``pngs`` holds each figure's picture by its name.

    Raises:
        ValueError: a row of a table is not as long as its header.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("senri.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        flagged=[(i, section) for i, section in enumerate(report.sections, 1) if section.flags],
        config=config_text(report) if report.config else "",
        pictures={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pngs.items()},
        # in CSS pixels, 96 an inch: letters have one size in every figure. A PNG's width is in bytes 16 to 19.
        widths={name: int.from_bytes(png[16:20], "big") * 96 // DPI for name, png in pngs.items()},
        alt_text=alt_text,
        cell_text=cell_text,
        cells=cells,
        numeric=numeric,
    )
