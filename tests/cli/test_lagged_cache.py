"""``scripts/lagged_cache.py`` at a tiny size on a real text."""

import json

import pytest
import yaml

from senri.cli import lagged_cache
from senri.config import ConfigError, ConfigManager
from senri.data import reversal
from senri.evaluation.write import read_report

from .conftest import CONFIG

MODEL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "rotary_pct": 0.5}
SIZE = {
    "seeds": [0],
    "model": MODEL,
    "training": {"samples": 4, "epochs": 2, "batch_size": 32, "segment_length": 16, "segments": 1},
    "passes": [1, 2],
    "until": {"tolerance": 0.01, "passes": 3},
    "validation": {"length": 40, "samples": 2, "batch_size": 2},
    "convergence": {"lengths": [8, 20], "samples": 1},
    "speed": {"lengths": [8, 32], "samples": 1, "batch_size": 1},
    "sweep": {"learning_rates": [1e-3], "samples": 2, "epochs": 2},
}


@pytest.fixture
def configure(real_text, tmp_path, monkeypatch):
    """``(**changes)`` writes ./config and a real text to train on."""
    few = {name: pairs[:3] for name, pairs in reversal.fact_sets(None).items()}  # asking a model token by token is slow
    monkeypatch.setattr(reversal, "fact_sets", lambda folder: few)
    (tmp_path / "text.txt").write_text(real_text[:30_000], encoding="utf-8")
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> None:
        for path in CONFIG.glob("*.yaml"):
            values = yaml.safe_load(path.read_text())
            if path.name == "experiment.yaml":
                values["transformer_lm"] |= {"data": ["text.txt"], "vocab_size": 520}
                values["transformer_lm"]["reversal"] = {"folder": None, "repeats": 1}
                for key, value in {**SIZE, **changes}.items():
                    known = values["lagged_cache"]
                    known[key] = {**known[key], **value} if isinstance(value, dict) else value
            (tmp_path / "config" / path.name).write_text(yaml.safe_dump(values))

    write()
    return write


@pytest.mark.slow
def test_all_ways_of_training_are_compared_and_nothing_is_done_twice(configure, capsys, monkeypatch) -> None:
    folder = lagged_cache.run(ConfigManager())
    report = read_report(folder / "report.json")
    titles = [section.title for section in report.sections]
    assert titles[:5] == [
        "Passes until the sequential result", "Speed", "Quality", "Lagged and true states", "Learning rates",
    ]  # fmt: skip
    assert titles[5].startswith("Reversal curse")
    steps, time, cache = report.sections[2].tables
    assert [row[0] for row in steps.rows] == ["no feedback", "LCT", "LCT, K = 2", "LCT until 0.01", "sequential"]
    assert {row[1] for row in steps.rows} == {steps.rows[0][1]}
    assert [row[0] for row in time.rows] == ["LCT", "LCT, K = 2", "sequential"]
    result = json.loads((folder / "LCT-steps-seed0" / "result.json").read_text())
    assert cache.rows[0][1:4] == (result["samples"], result["samples"] * 16, result["samples"] * (16 * 16 * 4 + 4))
    assert [(row[0], row[1]) for row in report.sections[1].tables[0].rows][::3] == [(8, "LCT"), (32, "LCT")]
    for model, length, needed, most, *_ in report.sections[0].tables[0].rows:
        assert needed is not None, model
        assert needed <= most == length
    for name in ("gap_by_pass", "speed_up", "training_loss", "gap_by_epoch", "gap_by_learning_rate"):
        assert (folder / f"{name}.png").is_file()
    # all of it is read back
    monkeypatch.setattr(lagged_cache.Work, "_trainer", None)
    assert lagged_cache.run(ConfigManager()) == folder
    assert read_report(folder / "report.json").sections == report.sections


def test_what_cannot_be_is_said_before_a_text_is_read(configure, capsys) -> None:
    for key, change, message in (
        ("model", {**MODEL, "num_heads": 3}, "lagged_cache.model.num_heads: 3 does not divide hidden_size (16)"),
        (
            "speed",
            {"lengths": [24]},
            "lagged_cache.speed.lengths: 24 is above segment_length (16) and no multiple of it",
        ),
        ("passes", [], "lagged_cache.passes: [] is not a non-empty list of integers > 0"),
    ):
        configure(**{key: change})
        with pytest.raises(ConfigError) as error:
            ConfigManager()
        assert [line.startswith(f"experiment.yaml: {message}") for line in error.value.errors] == [True]
    configure(training={"samples": 100_000})
    with pytest.raises(SystemExit):
        lagged_cache.main([])
    assert "give more text, or ask for fewer or shorter ones" in " ".join(capsys.readouterr().err.split())
