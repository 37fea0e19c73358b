"""``senri eval`` as a user types it, on a tiny model with the real vocabulary."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CONFIG, MEMORY

EVALUATION = {
    "suites": ["niah", "recall_by_writes", "perplexity", "capacity", "reversal"],
    "data": [],
    "full_attention": True,
    "niah": {
        "tasks": ["single", "shared"],
        "lengths": [160, 320],
        "depths": [0.0, 1.0],
        "samples": 2,
        "shared_questions": 1,
    },
    "recall_by_writes": {"distances": [64, 200], "facts": 1, "samples": 1},
    "perplexity": {"length": 300, "samples": 2},
    "capacity": {"pairs": [4], "questions": 4, "samples": 1},
    "reversal": {"folder": None, "facts": 2},
    "ruler": {"tasks": ["niah_single_1", "vt"], "lengths": [1024], "samples": 1, "qa_file": None},
    "babilong": {"folder": None, "tasks": ["qa1"], "lengths": [1024], "samples": 1},
}


@pytest.fixture
def evaluation(senri, configure, base_folder, real_text, tmp_path):
    """``(**changes of the section evaluation)`` configures a converted tiny Llama and two small texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(real_text[:60_000], encoding="utf-8")
    (texts / "two.txt").write_text(real_text[200_000:260_000], encoding="utf-8")

    def write(training=("texts",), **changes):
        configure(
            base_folder,
            model={"senri": MEMORY},
            training={"data": list(training)},
            experiment={"evaluation": {**EVALUATION, **changes}},
        )

    write()
    return write


def run_folder(result):
    return Path(re.search(r"results go to (\S+)", result.out).group(1))


@pytest.mark.slow
def test_an_evaluation_with_all_its_files_and_once_more(senri, evaluation):
    result = senri("eval")
    assert (result.code, result.err) == (0, "")
    folder = run_folder(result)
    assert folder.parent == Path("runs/eval")
    names = {p.name for p in folder.iterdir()}
    assert {"run.json", "records.jsonl", "report.json", "report.md", "report.html", "single_grid.png"} <= names
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    suites = {r["key"].split("/")[0] for r in records}
    assert suites == set(EVALUATION["suites"])
    single = [r for r in records if r["key"].startswith("niah/single/")]
    assert len(single) == 2 * 2 * 2
    assert set(single[0]["arms"]) == {"memory", "memory off", "other memory", "question only", "full attention"}
    for word in ("single", "recall_by_writes", "perplexity", "capacity", "report.html"):
        assert word.lower() in result.out.lower(), word
    assert "git revision" in (folder / "report.md").read_text()
    again = senri("eval")
    assert again.code == 0
    assert (folder / "records.jsonl").read_text().count("\n") == len(records), "nothing was answered twice"


@pytest.mark.slow
def test_ctrl_c_and_on(senri, evaluation, interrupt):
    evaluation(suites=["niah"])
    interrupt("forward", 30)
    stopped = senri("eval")
    assert stopped.code == 130
    assert "go on with: senri eval" in stopped.err
    folder = run_folder(stopped)
    before = (folder / "records.jsonl").read_text()
    result = senri("eval")
    assert result.code == 0
    assert (folder / "records.jsonl").read_text().startswith(before)


def test_the_synthetic_tasks_of_ruler(senri, evaluation):
    evaluation(suites=["ruler"])
    result = senri("eval", "-o", "ruler")
    assert (result.code, result.err) == (0, "")
    report = Path("ruler/report.md").read_text()
    assert "niah_single_1" in report
    assert "vt" in report


def test_other_settings_do_not_mix(senri, evaluation, one_line):
    evaluation(suites=["capacity"])
    assert senri("eval", "-o", "run").code == 0
    evaluation(suites=["capacity"], capacity={"pairs": [5], "questions": 4, "samples": 1})
    one_line(senri("eval", "-o", "run"), r"run holds a run with other settings \(evaluation\.capacity\.pairs\)")


@pytest.mark.slow
def test_two_runs_compared(senri, evaluation, configure):
    evaluation(suites=["niah", "perplexity"])
    assert senri("eval", "-o", "a").code == 0
    evaluation(suites=["niah", "perplexity"], full_attention=False)
    assert senri("eval", "-o", "b").code == 0
    result = senri("eval", "--compare", "a", "b", "-o", "both")
    assert (result.code, result.err) == (0, "")
    assert "nothing shown" in result.out
    assert Path("both/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--compare", "a", "b"), "a is no folder of an evaluation"),
        (("-o", "texts"), "texts exists and is no evaluation"),
    ],
)
def test_folders_that_cannot_be(senri, evaluation, one_line, arguments, pattern):
    evaluation(suites=["capacity"])
    one_line(senri("eval", *arguments), pattern)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"suites": ["babilong"]}, "the suite babilong needs bAbI's files"),
        ({"suites": ["niah"], "data": ["nowhere"]}, "nowhere: no such file"),
        ({"suites": ["niah"], "data": ["texts"]}, r"\S+\.txt was trained on"),
        (
            {"suites": ["perplexity"], "perplexity": {"length": 200_000, "samples": 1}},
            "the haystack has 0 separate stretches of 200,000 tokens",
        ),
        (
            {"suites": ["niah"], "niah": {**EVALUATION["niah"], "lengths": [40]}},
            "a context of .* does not hold its facts",
        ),
    ],
)
def test_what_cannot_be_evaluated(senri, evaluation, one_line, changes, pattern):
    evaluation(**changes)
    result = senri("eval")
    one_line(result, pattern)


def test_a_senri_model_of_its_own_has_no_full_attention(senri, configure, senri_folder, evaluation):
    configure(senri_folder, training={"data": ["texts"]}, experiment={"evaluation": {**EVALUATION, "suites": ["niah"]}})
    result = senri("eval", "-o", "own")
    assert result.code == 0
    record = json.loads(Path("own/records.jsonl").read_text().splitlines()[0])
    assert "full attention" not in record["arms"]


def test_a_setting_given_twice_counts_once(senri, evaluation):
    niah = {**EVALUATION["niah"], "tasks": ["single", "single"], "lengths": [160, 160], "depths": [0.0, 0.0]}
    evaluation(suites=["niah", "niah"], niah=niah)
    result = senri("eval", "-o", "twice")
    assert (result.code, result.err) == (0, "")
    keys = [json.loads(line)["key"] for line in Path("twice/records.jsonl").read_text().splitlines()]
    assert keys == ["niah/single/0/0/0", "niah/single/1/0/0"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["eval", "--quick"]])
def test_the_script_for_fresh_machines_says_how_it_is_used(arguments):
    script = CONFIG.parent / "scripts" / "colab.py"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python scripts/colab.py test | train | eval" in done.stderr


def test_a_missing_package_is_named_before_anything_is_loaded(senri, configure, base_folder, one_line, monkeypatch):
    from senri.cli import eval as command

    configure(base_folder)
    whole = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "wonderwords" else whole(name))
    monkeypatch.setattr(command, "run", lambda *arguments: pytest.fail("it was begun"))
    one_line(senri("eval"), r"senri eval needs wonderwords: pip install 'senri\[eval\]'")
    command.check_packages("bench")
