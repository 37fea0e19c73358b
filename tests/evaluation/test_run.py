"""A run's folder: named by what decides its results, never mixed with another's, readable at every moment."""

import copy
import json
import re
import subprocess
from types import SimpleNamespace

import pytest

from senri.evaluation import run
from senri.evaluation.report import Section, Table
from senri.evaluation.run import (
    IDENTITY,
    RECORDS,
    STARTS,
    build_report,
    evaluate,
    git_revision,
    load_identity,
    open_run,
    versions,
)
from senri.evaluation.suites import Bench
from senri.evaluation.write import read_report
from senri.identity import run_name

MODEL = {
    "model": "/models/SmolLM2-135M",
    "seed": 3,
    "adapter": None,
    "suites": {"niah": {"lengths": [1024, 4096], "samples": 20}, "capacity": {"pairs": [10]}},
}


def changed(path, value):
    """The identity with another value somewhere."""
    out = copy.deepcopy(MODEL)
    place = out
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = value
    return out


OTHERS = {
    "seed": 4,
    "adapter": "adapter.safetensors",
    "model": "/models/SmolLM2-360M",
    "suites.niah.lengths": [1024, 4097],
    "suites.niah.samples": 21,
    "suites.capacity": {"pairs": [10], "questions": 5},
    "suites.reversal": {},
}


@pytest.fixture
def opened(tmp_path):
    """``(identity, folder)`` -> the log, closed at the end."""
    logs = []

    def opened(identity=MODEL, folder=tmp_path / "run"):
        logs.append(open_run(folder, identity))
        return logs[-1]

    yield opened
    for log in logs:
        log.close()


# names --------------------------------------------------------------------------------------------------------


def test_a_name_is_the_same_for_the_same_run_and_no_other():
    name = run_name(MODEL)
    assert re.fullmatch(r"SmolLM2-135M-[0-9a-f]{8}", name)
    assert run_name(json.loads(json.dumps(dict(reversed(MODEL.items()))))) == name
    names = {run_name(changed(path, value)) for path, value in OTHERS.items()}
    assert len(names | {name}) == len(OTHERS) + 1
    assert {n[-8:] for n in names}.isdisjoint({name[-8:]})  # not by the model's name alone
    assert run_name({"model": "hub/name"}) != run_name({"model": "other/name"})


# folders ------------------------------------------------------------------------------------------------------


def test_a_new_folder_and_an_empty_one_are_taken(opened, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        opened(folder=folder).add({"key": "x/0"})
        assert load_identity(folder) == MODEL
        assert (folder / RECORDS).is_file()


def test_the_same_run_goes_on(opened):
    opened().add({"key": "x/0", "value": 1})
    log = opened(json.loads(json.dumps(MODEL)))
    assert log.records == {"x/0": {"key": "x/0", "value": 1}}
    assert opened({**MODEL, "suites": {name: dict(s) for name, s in MODEL["suites"].items()}}).records == log.records


def test_tuples_in_an_identity_are_lists_on_disk(opened):
    opened({"model": "m", "lengths": (1, 2)})
    assert opened({"model": "m", "lengths": (1, 2)}).records == {}


@pytest.mark.parametrize("path", OTHERS)
def test_another_run_is_refused_naming_what_differs(opened, tmp_path, path):
    opened().add({"key": "x/0"})
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    other = changed(path, OTHERS[path])
    said = {"suites.capacity": "suites.capacity.questions"}.get(path, path)
    with pytest.raises(ValueError, match=rf"run holds a run with other settings \({re.escape(said)}\): [^\n]*-o$"):
        opened(other)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_all_that_differs_is_named_in_order(opened):
    opened()
    both = changed("suites.niah.samples", 1) | {"seed": 9}
    del both["model"]
    with pytest.raises(ValueError, match=r"\(model, seed, suites\.niah\.samples\)"):
        opened({**both, "model": None})


def test_what_is_no_run_is_left_alone(opened, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=rf"{name} exists and is no evaluation: name another folder with -o$"):
            opened(folder=tmp_path / name)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_damaged_identity_is_one_line(opened, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / IDENTITY).write_bytes(content)
    for attempt in (lambda: opened(), lambda: load_identity(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            attempt()


def test_no_run_has_no_identity(tmp_path):
    with pytest.raises(ValueError, match=rf"is no folder of an evaluation: it has no {IDENTITY}$"):
        load_identity(tmp_path)


# evaluations --------------------------------------------------------------------------------------------------


class Fake:
    """Adds ``count`` records; ``fail`` after so many."""

    def __init__(self, name, count=2, fail=None, seen=None):
        self.name, self.count, self.fail, self.seen = name, count, fail, seen

    def run(self, bench):
        if self.seen is not None:
            self.seen()
        for i in range(self.count):
            if i == self.fail:
                raise KeyboardInterrupt
            if f"{self.name}/{i}" not in bench.log.records:
                bench.log.add({"key": f"{self.name}/{i}", "value": i})

    def section(self, records, window):
        rows = tuple((r["key"], r["value"]) for r in records)
        return Section(f"{self.name} within {window}", tables=(Table("rows", ("key", "value"), rows),))


@pytest.fixture
def bench(opened):
    def bench():
        return Bench(SimpleNamespace(window=7), None, None, opened())

    return bench


def titles(folder):
    return [section.title for section in read_report(folder / "report.json").sections]


def test_the_report_grows_suite_by_suite(bench, tmp_path):
    folder, seen = tmp_path / "run", []
    look = lambda: seen.append(titles(folder) if (folder / "report.json").exists() else None)  # noqa: E731
    suites = [Fake("a", seen=look), Fake("ab", 3, seen=look), Fake("c", seen=look)]
    report = evaluate(suites, bench(), folder, MODEL, {"device": "cpu"})
    assert seen == [None, ["a within 7"], ["a within 7", "ab within 7"]]
    assert read_report(folder / "report.json") == report
    assert titles(folder) == ["a within 7", "ab within 7", "c within 7"]
    assert [len(s.tables[0].rows) for s in report.sections] == [2, 3, 2]  # "ab/0" is no record of "a"
    assert {p.name for p in folder.iterdir()} == {IDENTITY, RECORDS, STARTS, "report.json", "report.md", "report.html"}


def test_a_run_cut_short_keeps_what_it_has_and_goes_on(bench, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate([Fake("a"), Fake("b", 4, fail=3)], bench(), folder, MODEL)
    assert titles(folder) == ["a within 7"]
    kept = (folder / RECORDS).read_bytes()
    assert kept.count(b"\n") == 5
    again = bench()
    assert len(again.log.records) == 5
    report = evaluate([Fake("a"), Fake("b", 4)], again, folder, MODEL)
    assert [len(s.tables[0].rows) for s in report.sections] == [2, 4]
    assert (folder / RECORDS).read_bytes().startswith(kept)
    assert (folder / RECORDS).read_bytes().count(b"\n") == 6


def test_no_suite_is_one_line(bench, tmp_path):
    with pytest.raises(ValueError, match=r"^there is no suite to run: [^\n]*evaluation\.suites"):
        evaluate([], bench(), tmp_path / "run", MODEL)


def test_the_report_says_what_it_was_made_with(opened):
    log = opened()
    log.add({"key": "a/0", "value": 1})
    report = build_report([Fake("a"), Fake("empty")], log, None, MODEL, {"device": "cpu"})
    assert report.title == "Evaluation of /models/SmolLM2-135M"
    assert [s.title for s in report.sections] == ["a within None"]
    assert report.config == MODEL
    assert report.facts.items() >= ({"seed": 3, "adapter": None, "device": "cpu"} | versions()).items()
    assert "suites" not in report.facts


# versions -----------------------------------------------------------------------------------------------------


def test_the_versions_name_all_that_could_change_a_result():
    import torch
    import transformers

    import senri

    found = versions()
    wanted = ["senri", "git revision", "torch", "transformers", "numpy", "scipy", "python", "machine"]
    assert list(found) == wanted
    assert (found["senri"], found["transformers"]) == (senri.__version__, transformers.__version__)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"].startswith("3.")
    assert all(found[name] for name in wanted if name != "git revision")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder in which the package seems to lie, and git there."""
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*command):
        who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *command], cwd=package, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return package, git


def test_the_revision_of_a_checkout(elsewhere):
    package, git = elsewhere
    assert git_revision() is None
    assert versions()["git revision"] is None
    git("init", "-q")
    assert git_revision() is None  # no commit yet
    (package / "run.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_revision() == git("rev-parse", "HEAD")[:12]
    (package / "untracked").write_text("1")
    assert git_revision() == git("rev-parse", "HEAD")[:12]
    (package / "run.py").write_text("2")
    assert git_revision() == git("rev-parse", "HEAD")[:12] + "+changes"
    git("add", ".")
    assert git_revision().endswith("+changes")
    git("commit", "-qm", "second")
    assert git_revision() == git("rev-parse", "HEAD")[:12]


def test_no_git_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_a_run_continued_under_other_versions_says_so(bench, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    evaluate([Fake("a")], bench(), folder, MODEL)
    assert not any(s.flags for s in read_report(folder / "report.json").sections)
    monkeypatch.setattr(run, "git_revision", lambda: "another")
    report = evaluate([Fake("a")], bench(), folder, MODEL)
    assert report.sections[0].flags == ("MIXED: the run was continued under another git revision: 2 different starts",)
    assert report.facts["git revision"] == "another"
