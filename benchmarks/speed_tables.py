"""Puts the tables of a run of ``senri bench`` into docs/speed.md.

``python benchmarks/speed_tables.py RUN`` (a folder in runs/bench), from the root of the checkout.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from senri.evaluation.markdown import to_markdown
from senri.evaluation.report import Report
from senri.evaluation.write import read_report

PAGE = Path("docs/speed.md")
PLACE = re.compile(r"(?<=<!-- run -->\n).*?(?=<!-- /run -->)", re.DOTALL)
FACTS = ("git revision", "torch", "transformers", "processor", "threads")


def tables(report: Report) -> str:
    """Flags, texts and tables of the report as Markdown, below a heading of the page; no figures."""
    facts = "; ".join(f"{name} {report.facts[name]}" for name in FACTS)
    sections = tuple(
        type(section)(section.title, section.text, section.flags, section.tables) for section in report.sections
    )
    drawn = to_markdown(Report(report.title, {}, sections), {}).split("\n\n", 1)[1]
    return f"{facts}.\n\n" + re.sub(r"^(#+) ", r"#\1 ", drawn, flags=re.MULTILINE)


def main() -> None:
    """The page with the run's tables instead of those before."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    page = PAGE.read_text(encoding="utf-8")
    found = tables(read_report(Path(sys.argv[1]) / "report.json"))
    assert PLACE.search(page), f"{PAGE} has lost its marks"
    PAGE.write_text(PLACE.sub(lambda _: found, page), encoding="utf-8")


if __name__ == "__main__":
    main()
