"""The ablations' table."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


def test_a_table_has_a_row_for_each_result():
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    counts = {"right": (90, 100), "overwritten": (8, 10), "ended": (7, 9), "untold": (50, 60), "unrelated": (1, 2)}
    counts["messages"] = (3, 4)
    written = {"plain tokens written": (1, 1000), "value tokens written": (3, 4)}
    lines = script.table([{"name": "layer 6", **counts, **written}]).splitlines()
    assert lines[-1].startswith("| layer 6 | 90 of 100 [83%, 94%] | 8 of 10 [")
    assert lines[-1].endswith("| 0.10% | 75% |")
    assert len({line.count("|") for line in lines}) == 1
