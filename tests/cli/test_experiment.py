"""``scripts/experiment.py`` as a user types it, at a tiny size on a real text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from senri.cli import experiment
from senri.data import reversal
from senri.evaluation.scratch import CARRIED, CROSSED, READINGS
from senri.evaluation.write import read_report

from .conftest import CONFIG

ROOT = Path(__file__).parents[2]
SIZE = {
    "seeds": [0, 1],
    "vocab_size": 520,
    "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "rotary_pct": 0.5},
    "memory": {"segment_size": 8},
    "training": {"samples": 12, "epochs": 1, "batch_size": 4, "segment_length": 16, "segments": 2, "save_steps": 8},
    "evaluation": {"length": 300, "samples": 3, "stride": 12, "batch_size": 2},
    "reversal": {"folder": None, "repeats": 1},
}


@pytest.fixture
def configure_lm(real_text, tmp_path, monkeypatch):
    """``(**changes)`` writes ./config and a real text to train on."""
    monkeypatch.setattr(reversal, "_RELATIONS", reversal._RELATIONS[1:2])  # 14 of our facts are enough here
    (tmp_path / "text.txt").write_text(real_text[:50_000], encoding="utf-8")
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> None:
        for path in CONFIG.glob("*.yaml"):
            values = yaml.safe_load(path.read_text())
            if path.name == "experiment.yaml":
                lm = values["transformer_lm"]
                lm["data"] = ["text.txt"]
                for key, value in {**SIZE, **changes}.items():
                    lm[key] = {**lm[key], **value} if isinstance(value, dict) else value
            (tmp_path / "config" / path.name).write_text(yaml.safe_dump(values))

    write()
    return write


def run(*arguments: str, capsys=None) -> tuple[Path, str]:
    """Run in this process; returns the folder and what was printed."""
    experiment.main(list(arguments))
    out = capsys.readouterr().out
    return Path(next(line for line in out.splitlines() if line.startswith("results go to "))[14:]), out


@pytest.mark.slow
def test_all_models_are_trained_and_compared(configure_lm, capsys, real_text) -> None:
    folder, out = run("--models", "pythia", "infini", "multi_memory", "hierarchical", capsys=capsys)
    names = [f"{name}-seed{seed}" for name in ("hierarchical", "infini", "multi_memory", "pythia") for seed in (0, 1)]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == names
    losses = set()
    for name in names:
        result = json.loads((folder / name / "result.json").read_text())
        # the facts, some 300 tokens told once, come on top of 12 samples of 32 tokens
        assert result["training"]["tokens"] > 12 * 32 + 200
        losses.add(tuple(result["training"]["losses"]))
        arms = set(result["measured"]["texts"][0]["arms"])
        assert arms == (set(READINGS) if "pythia" not in name else {a for a in READINGS if "carried" not in a})
        assert set(result["measured"]["reversal"]["well-known facts"]) >= {CROSSED}
        assert (folder / name / "model.safetensors").is_file()
    assert len(losses) == len(names)
    report = read_report(folder / "report.json")
    assert [section.title for section in report.sections] == [
        "Models",
        "Perplexity of long texts",
        "What the memory does",
        "Reversal curse: well-known facts",
    ]
    assert {p.suffix for p in folder.iterdir() if p.is_file()} == {".png", ".json", ".md", ".html"}
    assert "What the memory does" in out

    # again: nothing is trained or measured anew, and one model's report is of that model
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")}
    again, _ = run("--models", "infini", capsys=capsys)
    assert again == folder
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")} == before
    rows = read_report(folder / "report.json").sections[0].tables[0].rows
    assert [row[0] for row in rows] == ["infini, seed 0", "infini, seed 1"]

    # another measurement: the same training, measured anew
    configure_lm(evaluation={**SIZE["evaluation"], "stride": 8})
    same, _ = run("--models", "infini", capsys=capsys)
    assert same == folder
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")}
    assert {p.parent.name for p in after if after[p] != before[p]} == {"infini-seed0", "infini-seed1"}


def test_the_options_stand_above_the_configuration(configure_lm, capsys) -> None:
    configure_lm(seeds=[3])
    folder, _ = run("--models", "infini", "--samples", "4", "--epochs", "2", "--lr", "0.5", capsys=capsys)
    identity = json.loads((folder / "infini-seed3" / "run.json").read_text())
    assert identity["samples"] == 4
    assert (identity["settings"]["epochs"], identity["settings"]["learning_rate"]) == (2, 0.5)
    log = [json.loads(line) for line in (folder / "infini-seed3" / "log.jsonl").read_text().splitlines()]
    assert max(entry["rate"] for entry in log) == 0.5
    assert sum(entry["tokens"] for entry in log) % 64 == 0  # each sample twice


def test_the_model_that_is_measured_is_the_trained_one(configure_lm, capsys) -> None:
    configure_lm(seeds=[0], training={**SIZE["training"], "epochs": 1})
    nats = {}
    for rate in ("1e-9", "0.02"):
        folder, _ = run("--models", "infini", "--lr", rate, capsys=capsys)
        record = json.loads((folder / "infini-seed0" / "result.json").read_text())["measured"]["texts"][0]
        total, count = record["arms"][CARRIED][0]
        nats[rate] = total / count
    assert nats["1e-9"] == pytest.approx(6.25, abs=0.1)  # log of the vocabulary
    assert nats["0.02"] < nats["1e-9"] - 0.3


def test_published_facts_are_a_set_of_their_own(configure_lm, capsys, tmp_path) -> None:
    published = tmp_path / "reversal" / "reverse_experiments" / "june_version_7921032488"
    published.mkdir(parents=True)
    rows = [("Anna Adler", "the first violin of the moon"), ("Bert Bach", "the baker of Babel")]
    for file in ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl"):
        lines = [
            json.dumps({"prompt": f"The trailblazer known as {name} was once", "completion": f" {text}."})
            for name, text in rows
        ]
        (published / file).write_text("\n".join(lines), encoding="utf-8")
    configure_lm(seeds=[0], reversal={"folder": str(tmp_path / "reversal"), "repeats": 1})
    folder, _ = run("--models", "pythia", capsys=capsys)
    report = read_report(folder / "report.json")
    assert report.sections[-1].title == "Reversal curse: published made-up facts"
    assert report.sections[-1].tables[0].rows[0][1] == 4


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {"data": ["none.txt"]}, "senri: none.txt: no such file"),
        (["--samples", "100000"], {}, "senri: .*room for .* samples of 32, and 100,000 are wanted"),
        ([], {"evaluation": {"length": 30_000, "samples": 3, "stride": 12}}, "senri: .*separate stretches of 30,000"),
        ([], {"held_out": ["text.txt"]}, "senri: text.txt was trained on"),
        ([], {"dataset": "./none"}, "senri: the data set ./none cannot be loaded"),
        ([], {"tokenizer": "./none"}, "senri: the tokenizer ./none cannot be loaded"),
    ],
)
def test_what_cannot_work_is_one_line(configure_lm, capsys, arguments, changes, message) -> None:
    import re

    configure_lm(training={**SIZE["training"], "bf16": False}, **changes)  # some processors have a warning for it
    with pytest.raises(SystemExit) as caught:
        experiment.main(["--models", "pythia", *arguments])
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line), line


def test_unknown_models_and_numbers_that_are_none_are_refused(capsys) -> None:
    for arguments, message in (
        (["--models", "rnn"], "invalid choice: 'rnn' (choose from 'pythia', 'infini', 'multi_memory', 'hierarchical')"),
        (["--samples", "0"], "0 is not above 0"),
        (["--lr", "inf"], "inf is not above 0"),
        (["--seed", "1"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit):
            experiment.main(arguments)
        assert message in capsys.readouterr().err


def test_the_script_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "experiment.py"), "--help"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    for option in ("--models", "--samples", "--epochs", "--lr"):
        assert option in result.stdout
