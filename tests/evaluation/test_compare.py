"""Two runs compared: planted ones, whose difference is known beforehand."""

import json
import math
import re

import numpy as np
import pytest

from senri.data.haystack import Stretch
from senri.data.samples import Context, Question
from senri.evaluation.compare import compare
from senri.evaluation.perplexity import PerplexitySuite
from senri.evaluation.readers import SenriReader
from senri.evaluation.run import open_run
from senri.evaluation.runner import MEMORY, MEMORY_OFF, RecallTask, run_task
from senri.evaluation.statistics import share
from senri.evaluation.suites import Bench, Sources
from senri.evaluation.write import write_report

LINE = r"^[^\n]+$"


def answered(i, right, length=1024, task="single", suite="niah", sample="same", **cell):
    """One record: sample ``i`` of a cell, right or wrong."""
    return {
        "key": f"{suite}/{task}/{i}/{length}/0",
        "prompt_sha256": f"{sample}/{task}/{i}/{length}",
        "task": f"{suite}/{task}",
        "cell": {"task": task, "length": length, "depth": 0.5, **cell},
        "expected": ["x"],
        "arms": {
            MEMORY: {"answer": "", "score": float(right), "exact": bool(right)},
            MEMORY_OFF: {"answer": "", "score": 1.0, "exact": True},
        },
    }


def scored(i, nats, source="book", edges=(0, 256, 300)):
    counts = [255, 44]
    memory = [[value * n, n] for value, n in zip(nats, counts, strict=True)]
    arms = {MEMORY: memory, MEMORY_OFF: [[9.0 * n, n] for n in counts]}
    return {
        "key": f"perplexity/{i}",
        "source": source,
        "text_sha256": f"{source} {i}",
        "edges": list(edges),
        "arms": arms,
    }


@pytest.fixture
def planted(tmp_path):
    """``(name, records, **identity)`` -> folder of a run."""

    def planted(name, records, **identity):
        same = {"model": f"/models/{name}", "adapter": None, "base_fingerprint": "f", "seed": 0}
        log = open_run(tmp_path / name, same | identity)
        for record in records:
            log.add(record)
        log.close()
        return tmp_path / name

    return planted


def rows(report, title):
    (section,) = [s for s in report.sections if s.title == title]
    (table,) = section.tables
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


# recall -------------------------------------------------------------------------------------------------------


def test_a_verdict_where_the_intervals_separate_and_nowhere_else(planted, tmp_path):
    # (length, right answers of A, of B), of 20 each
    cells = [(1024, 18, 4), (2048, 3, 17), (4096, 12, 7), (8192, 0, 0), (16384, 20, 20), (512, 16, 9), (256, 17, 9)]
    a = planted("a", [answered(i, i < right, n) for n, right, _ in cells for i in range(20)])
    b = planted("b", [answered(i, i < right, n) for n, _, right in cells for i in range(20)])
    report = compare(a, b)
    found = {row["length"]: row for row in rows(report, "niah")}
    assert list(found) == ["256", "512", "1,024", "2,048", "4,096", "8,192", "16,384"]
    for n, right_a, right_b in cells:
        one, other = share(right_a, 20), share(right_b, 20)
        verdict = "A better" if one.low > other.high else "B better" if other.low > one.high else "nothing shown"
        row = found[f"{n:,}"]
        assert row["verdict"] == verdict
        assert row["A"] == f"{right_a / 20:.0%} [{one.low:.0%}, {one.high:.0%}]"
        assert row["B"] == f"{right_b / 20:.0%} [{other.low:.0%}, {other.high:.0%}]"
        assert (row["A samples"], row["B samples"]) == (20, 20)
    assert (found["1,024"]["verdict"], found["2,048"]["verdict"]) == ("A better", "B better")
    # a paired p below 0.05 is no verdict while the intervals overlap
    assert found["512"]["p"] == 2 / 2**7 < 0.05
    assert found["512"]["verdict"] == found["4,096"]["verdict"] == "nothing shown"
    swapped = {row["length"]: row["verdict"] for row in rows(compare(b, a), "niah")}
    turned = {"A better": "B better", "B better": "A better", "nothing shown": "nothing shown"}
    assert swapped == {n: turned[row["verdict"]] for n, row in found.items()}
    write_report(report, tmp_path / "report")


def test_pairs_are_counted_by_hand(planted):
    # only A: samples 0-5 (6 of them), only B: 6 and 7, both: 8-11, neither: 12-14
    a = planted("a", [answered(i, i < 6 or 8 <= i < 12) for i in range(15)])
    b = planted("b", [answered(i, 6 <= i < 12) for i in reversed(range(15))])
    (row,) = rows(compare(a, b), "niah")
    assert (row["only A right"], row["only B right"]) == (6, 2)
    assert row["p"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)  # at most 2 of 8 heads, both sides
    equal = rows(compare(a, a), "niah")[0]
    assert (equal["only A right"], equal["only B right"], equal["p"]) == (0, 0, None)


def test_half_an_answer_is_not_right(planted):
    a = planted("a", [answered(i, 0.5) for i in range(20)])
    b = planted("b", [answered(i, 0) for i in range(20)])
    (row,) = rows(compare(a, b), "niah")
    assert row["A"].startswith("0%")
    assert (row["only A right"], row["verdict"]) == (0, "nothing shown")


def test_other_samples_of_the_same_name_are_not_paired(planted):
    a = planted("a", [answered(i, True) for i in range(20)])
    b = planted("b", [answered(i, False, sample="other") for i in range(20)])
    (row,) = rows(compare(a, b), "niah")
    assert [row[name] for name in ("only A right", "only B right", "p")] == [None] * 3
    assert row["verdict"] == "A better"  # the shares stand on their own
    # some of them are the same
    b = planted("c", [answered(i, False, sample="same" if i < 3 else "other") for i in range(20)])
    (row,) = rows(compare(a, b), "niah")
    assert [row[name] for name in ("only A right", "only B right", "p")] == [3, 0, pytest.approx(0.25)]


def test_only_common_tasks_and_cells_are_rows(planted):
    a = planted("a", [answered(0, True), answered(0, True, 2048), answered(0, True, task="multikey")])
    b = planted("b", [answered(0, True), answered(0, True, 4096), answered(0, True, task="multivalue")])
    report = compare(a, b)
    assert [(row["task"], row["length"]) for row in rows(report, "niah")] == [("single", "1,024")]
    text = report.sections[0].text
    assert text == "1 of A's 3 and B's 3 records have the same name.\nThe runs differ in: model."


def test_settings_in_which_the_runs_differ_are_named(planted):
    settings = {"seed": 1, "evaluation": {"niah": {"samples": 5, "lengths": [1]}, "suites": ["niah"]}, "model": "m"}
    other = {"seed": 2, "evaluation": {"niah": {"samples": 6, "lengths": [1]}, "suites": ["niah"]}, "extra": True}
    a = planted("a", [answered(0, True)], **settings)
    b = planted("b", [answered(0, True), answered(1, True)], **other)
    begin = "1 of A's 1 and B's 2 records have the same name."
    assert compare(a, b).sections[0].text == (
        f"{begin}\nThe runs differ in: evaluation.niah.samples, extra, model, seed."
    )
    assert compare(a, a).sections[0].text == "1 of A's 1 and B's 1 records have the same name."


def test_suites_that_are_not_compared_are_named(planted):
    common = [answered(0, True), {"key": "capacity/1/0", "pairs": 1, "expected": [3], "arms": {MEMORY: 1}}]
    a = planted("a", [*common, answered(0, True, suite="ruler"), scored(0, [3.0, 3.0])], model="m")
    b = planted("b", [*common, answered(0, True, 2048, suite="ruler"), {"key": "reversal/0"}], model="m")
    for one, other, sizes in ((a, b, (4, 4)), (b, a, (4, 4))):
        report = compare(one, other)
        assert [s.title for s in report.sections] == ["What is compared", "niah"]
        assert report.sections[0].text == (
            f"2 of A's {sizes[0]} and B's {sizes[1]} records have the same name.\n"
            "Not compared (see the runs' own reports): capacity, perplexity, reversal, ruler."
        )
    text = compare(a, a).sections[0].text
    assert text.endswith("\nNot compared (see the runs' own reports): capacity.")
    assert "differ" not in text


@pytest.mark.parametrize("tail", [b"", b'{"key": "niah/single/2/1024/0", "prom', b'{"key": "niah/single/2/1024/0"}'])
def test_logs_are_read_and_left_as_they_are(planted, tail):
    folders = [planted(name, [answered(i, True) for i in range(2)]) for name in "ab"]
    for folder in folders:
        with open(folder / "records.jsonl", "ab") as file:
            file.write(tail)  # another process may be writing it
    files = lambda: {  # noqa: E731
        p: (p.read_bytes(), p.stat().st_mtime_ns) for folder in folders for p in sorted(folder.rglob("*"))
    }
    before = files()
    for folder in folders:
        assert before[folder / "records.jsonl"][0].endswith(tail or b"\n")
        (folder / "records.jsonl").chmod(0o444)
    report = compare(*folders)
    assert files() == before
    assert report.sections[0].text.startswith("2 of A's 2 and B's 2 records have the same name.")
    assert [row["A samples"] for row in rows(report, "niah")] == [2]


def test_every_suite_has_its_section_and_distances_are_cells(planted, tmp_path):
    suites = [answered(i, True, suite="ruler", task="vt") for i in range(2)]
    far = [
        answered(100 * d + i, i < 2, None, suite="recall_by_writes", task="facts", distance=d)
        for d in (100, 400)
        for i in range(3)
    ]
    report = compare(planted("a", [*suites, *far]), planted("b", [*far, *suites, answered(0, True)]))
    assert [s.title for s in report.sections] == ["What is compared", "ruler", "recall_by_writes"]
    assert [row["length"] for row in rows(report, "recall_by_writes")] == ["100", "400"]
    (figure,) = report.sections[2].figures
    assert [(s.name, s.x, s.y) for s in figure.series] == [(name, (100.0, 400.0), (2 / 3, 2 / 3)) for name in "AB"]
    write_report(report, tmp_path / "report")


def test_records_that_run_task_makes_are_compared(tmp_path):
    """The planted reader knows the answers to the samples whose number it was given."""

    class Tokens:
        def decode(self, ids):
            return " ".join(str(int(i)) for i in ids)

    class Reader:
        window, longest = 4, None

        def __init__(self, known):
            self.known = known

        def read(self, ids, at, *, memory=True):
            return int(ids[0]) if memory else None

        def memory_of(self, state):
            return None

        def with_memory_of(self, state, other):
            return None

        def blank(self):
            return None

        def answer(self, states, questions):
            return ["yes" if state in self.known else "no" for state in states]

    def make(sample):
        asked = [Question(30, (7, 8), ("yes",), 4, {"task": "x", "length": 36, "depth": None})]
        return [Context(np.full(30, sample, dtype=np.int32), tuple(asked), "noise")]

    folders = []
    for name, known in (("a", range(25)), ("b", range(20, 27))):
        log = open_run(tmp_path / name, {"model": name})
        run_task(RecallTask("niah/x", 30, make), Reader(known), None, log, tokenizer=Tokens())
        log.close()
        folders.append(tmp_path / name)
    (row,) = rows(compare(*folders), "niah")
    assert (row["A samples"], row["only A right"], row["only B right"], row["verdict"]) == (30, 20, 2, "A better")
    assert row["p"] == pytest.approx(2 * (1 + 22 + 231) / 2**22)


# perplexity ---------------------------------------------------------------------------------------------------


def test_perplexity_is_compared_text_by_text(planted, tmp_path):
    # texts as different as 20 and 400; A better by 0.1 in the first bucket, worse by 0.2 in the second
    levels, noise = [3.0, 4.5, 6.0], [0.01, 0.0, -0.01]
    a = [scored(i, [x - 0.1 + e, x + 0.2 + e]) for i, (x, e) in enumerate(zip(levels, noise, strict=True))]
    b = [scored(i, [x, x]) for i, x in enumerate(levels)]
    report = compare(planted("a", a), planted("b", b[::-1]))
    first, second = rows(report, "perplexity")
    assert (first["verdict"], second["verdict"]) == ("A better", "B better")
    assert (first["tokens before"], second["tokens before"]) == ("0 to 256", "256 to 300")
    assert first["A − B (nats)"] == pytest.approx(-0.1)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert first["interval"] == f"[{-0.1 - half:+.4f}, {-0.1 + half:+.4f}]"
    assert first["A"] == pytest.approx(math.exp(4.4))
    assert first["B"] == pytest.approx(math.exp(4.5))
    write_report(report, tmp_path / "report")
    wide = [scored(i, [x - 0.1 + 20 * e, x]) for i, (x, e) in enumerate(zip(levels, noise, strict=True))]
    assert [r["verdict"] for r in rows(compare(planted("c", wide), tmp_path / "b"), "perplexity")] == [
        "nothing shown",
        "nothing shown",
    ]


def test_one_common_text_shows_a_difference_and_no_verdict(planted, tmp_path):
    report = compare(planted("a", [scored(0, [3.0, 3.0])]), planted("b", [scored(0, [4.0, 4.0]), scored(1, [1, 1])]))
    assert [(r["A − B (nats)"], r["interval"], r["verdict"]) for r in rows(report, "perplexity")] == [
        (-1.0, None, "nothing shown")
    ] * 2
    write_report(report, tmp_path / "report")  # no NaN in it


@pytest.mark.parametrize("other", [{"source": "another book"}, {"edges": (0, 256, 299)}])
def test_other_texts_are_not_compared(planted, other):
    a = planted("a", [scored(0, [3.0, 3.0]), answered(0, True)])
    b = planted("b", [scored(0, [4.0, 4.0], **other), answered(0, True)])
    assert [s.title for s in compare(a, b).sections] == ["What is compared", "niah"]


def test_other_stretches_of_the_same_book_are_not_compared(make_senri, tmp_path):
    class Book:
        def disjoint(self, length, count, rng):
            texts = [np.array(rng.choices(range(3, 97), k=length), dtype=np.int32) for _ in range(count)]
            return [Stretch(ids, np.array([0, length]), "King James Bible (last part)") for ids in texts]

    folders = []
    for seed in (0, 1):
        log = open_run(tmp_path / str(seed), {"model": "m", "seed": seed})
        bench = Bench(SenriReader(make_senri(), None), None, None, log)
        PerplexitySuite(Sources(Book(), None, seed), 40, 2).run(bench)
        log.close()
        folders.append(tmp_path / str(seed))
    assert len((folders[0] / "records.jsonl").read_bytes().splitlines()) == 2
    with pytest.raises(ValueError, match="nothing can be compared"):
        compare(*folders)
    assert [s.title for s in compare(folders[0], folders[0]).sections] == ["What is compared", "perplexity"]


# what cannot be compared --------------------------------------------------------------------------------------


def test_runs_without_a_common_suite_are_one_line(planted):
    a = planted("a", [answered(0, True), {"key": "capacity/1/0", "pairs": 1}])
    b = planted("b", [scored(0, [3.0, 3.0]), {"key": "capacity/1/0", "pairs": 1}])
    for one, other in ((a, b), (b, a), (a, planted("c", []))):
        with pytest.raises(ValueError, match=LINE) as error:
            compare(one, other)
        assert "nothing can be compared" in str(error.value)


@pytest.mark.parametrize("other", [{"length": 2048}, {"task": "multikey"}])
def test_runs_without_a_common_cell_are_one_line(planted, other):
    a = planted("a", [answered(0, True)])
    b = planted("b", [answered(0, True, **other)])
    with pytest.raises(ValueError, match=r"nothing can be compared"):
        compare(a, b)


def test_what_is_no_run_is_one_line(planted, tmp_path):
    run = planted("a", [answered(0, True)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text(json.dumps({"model": "m"}))
    for name, said in (
        ("missing", "is no folder of an evaluation"),
        ("empty", "is no folder of an evaluation"),
        ("begun", "holds no records"),
    ):
        for one, other in ((run, tmp_path / name), (tmp_path / name, run)):
            with pytest.raises(ValueError, match=LINE) as error:
                compare(one, other)
            assert re.search(rf"{name} {said}", str(error.value))
    assert not list((tmp_path / "empty").iterdir())
    assert [p.name for p in (tmp_path / "begun").iterdir()] == ["run.json"]


def test_both_runs_are_named(planted):
    a, b = planted("a", [answered(0, True)]), planted("b", [answered(0, True)])
    report = compare(a, b)
    assert report.title == "A: a, B: b"
    wanted = {"run A": str(a), "run B": str(b), "A: model": "/models/a", "B: model": "/models/b"}
    assert report.facts.items() >= (wanted | {"A: base_fingerprint": "f", "B: adapter": None}).items()
    assert report.config["A"]["model"] == "/models/a"
