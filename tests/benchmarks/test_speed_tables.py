"""The script that puts a run's tables into the page on speed."""

import importlib.util
from pathlib import Path

import pytest

from senri.evaluation.report import Curves, Report, Section, Series, Table
from senri.evaluation.write import write_report

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "benchmarks" / "speed_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_take_the_place_of_those_before(script, tmp_path, monkeypatch):
    figure = Curves("reading", "Speed", "tokens", "tokens/s", (Series("Senri", (1.0, 2.0), (3.0, 4.0)),))
    table = Table("", ("tokens", "tokens/s"), ((1024, 1500.5),), {"tokens/s": ",.1f"})
    section = Section("Reading", flags=("DRIFT: much",), tables=(table,), figures=(figure,))
    facts = dict.fromkeys(script.FACTS, "x")
    write_report(Report("Speed of tiny", facts, (section,)), tmp_path / "run")
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs" / "speed.md").read_text())
    before, rest = page.read_text().split("<!-- run -->")
    after = rest.split("<!-- /run -->")[1]
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["speed_tables.py", str(tmp_path / "run")])
    for _ in range(2):
        script.main()
        text = page.read_text()
        assert text.startswith(before)
        assert text.endswith(after)
        assert text.count("| 1024 | 1,500.5 |") == 1
        assert "### Reading" in text
        assert "DRIFT: much" in text
        assert "reading.png" not in text, "pictures stay with the run"
