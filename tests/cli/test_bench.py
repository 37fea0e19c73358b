"""``senri bench`` as a user types it, on a tiny model; rows are measured in this process but for one."""

import json
import re
import sys
from pathlib import Path

import pytest

import senri.benchmark.run as run_module
from senri.benchmark import rows
from senri.benchmark.measure import measure
from senri.benchmark.process import LeftOut
from senri.cli.bench import make_settings
from senri.config import ConfigManager
from senri.identity import run_name

BENCHMARK = {
    "measurements": ["reading", "decoding", "memory"],
    "lengths": [64, 128],
    "repeats": 2,
    "batch_sizes": [1, 2],
    "batch_length": 64,
    "decoding_after": [70, 100],
    "decoding_tokens": 4,
    "training_length": 128,
    "peers": ["full_attention", "llama_cpp"],
    "peer_lengths": [160],
    "llama_cpp_python": None,
}


@pytest.fixture
def bench(senri, configure, senri_folder, monkeypatch):
    """``(**changes of the section benchmark)`` configures a tiny Senri; rows are measured in this process, by
    ``bench.measure``.
    """

    def in_this_process(spec, show):
        write.measured.append(spec["key"])
        small = {"buffer_bytes": 1 << 16, "rounds": 1}  # of the bounds
        return {**write.measure({**spec, **small}), "process_peak_bytes": 1e8, "wall_seconds": 1.0}

    monkeypatch.setattr(rows, "say_progress", lambda text: None)  # stderr is the command's own here
    whole = run_module.bench
    monkeypatch.setattr(run_module, "bench", lambda *args: whole(*args, in_this_process))

    def write(**changes):
        configure(senri_folder, experiment={"benchmark": {**BENCHMARK, **changes}})

    write.measure, write.measured = measure, []
    write()
    return write


def run_folder(result):
    return Path(re.search(r"results go to (\S+)", result.out).group(1))


@pytest.mark.slow
def test_a_run_with_all_its_files_and_once_more(senri, bench):
    result = senri("bench")
    assert (result.code, result.err) == (0, "")
    folder = run_folder(result)
    assert folder.parent == Path("runs/bench")
    names = {p.name for p in folder.iterdir()}
    assert {"run.json", "records.jsonl", "report.json", "report.md", "report.html", "reading.png"} <= names
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["key"] for r in records] == bench.measured
    assert {r["measurement"] for r in records} == {"bounds", "reading", "states", "decoding", "memory"}
    for word in ("Reading", "Decoding", "The memory path", "share of the float32 matrix rate", "report.html"):
        assert word in result.out, word
    again = senri("bench")
    assert again.code == 0
    assert "all rows were there already; to measure again, remove runs/bench/" in again.out
    assert len(bench.measured) == len(records), "nothing was measured twice"


def test_ctrl_c_and_on(senri, bench):
    bench(measurements=["reading"])

    def interrupted(spec):
        if len(bench.measured) == 3:
            raise KeyboardInterrupt
        return measure(spec)

    bench.measure = interrupted
    stopped = senri("bench")
    assert stopped.code == 130
    said = r"senri: interrupted; 2 rows are kept in runs/bench/\S+, go on with: senri bench\n"
    assert re.fullmatch(said, stopped.err)
    before = (run_folder(stopped) / "records.jsonl").read_text()
    result = senri("bench")
    assert result.code == 0
    assert (run_folder(result) / "records.jsonl").read_text().startswith(before)
    assert bench.measured == ["bounds/at first", "reading/64", "reading/128", "reading/128", "bounds/at the end"]


def test_other_settings_or_code_are_another_run(bench, monkeypatch):
    def name():
        return run_name(run_module.run_identity(make_settings(ConfigManager())))

    first = name()
    assert name() == first
    bench(lengths=[96])
    names = {first, name()}
    monkeypatch.setattr(run_module, "code_digest", lambda: "another")
    assert len({*names, name()}) == 3


def test_what_cannot_be_had_is_left_out_in_one_line(senri, bench):
    def without(spec):
        if spec["measurement"] == "peer":
            raise LeftOut("no such thing here")
        return measure(spec)

    bench(measurements=["peers"])
    bench.measure = without
    result = senri("bench")
    assert result.code == 0
    assert "llama_cpp is left out: benchmark.llama_cpp_python of experiment.yaml names no Python" in result.out
    assert "peer/full_attention/160 is left out: no such thing here" in result.out
    assert "no such thing here" in (run_folder(result) / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"measurements": ["raeding"]}, r"experiment\.yaml: benchmark\.measurements\[0\]: 'raeding' is not one of: r"),
        ({"lengths": [0]}, r"experiment\.yaml: benchmark\.lengths\[0\]: 0 is not an integer > 0"),
        ({"peers": ["gpt"]}, r"experiment\.yaml: benchmark\.peers\[0\]: 'gpt' is not one of: full_attention"),
    ],
)
def test_slips_in_the_configuration(senri, bench, changes, pattern):
    bench(**changes)
    result = senri("bench")
    assert result.code == 1
    assert re.match(rf"senri: the configuration in config is not valid:\n{pattern}", result.err), result.err


@pytest.mark.parametrize(
    ("python", "pattern"),
    [
        ("nowhere/python", r"benchmark\.llama_cpp_python of experiment\.yaml: nowhere/python cannot be run"),
        (sys.executable, r"benchmark\.llama_cpp_python of experiment\.yaml: \S+ has no llama_cpp: `make bench-llama`"),
    ],
)
def test_a_python_without_llama_cpp(senri, bench, one_line, python, pattern):
    bench(measurements=["peers"], llama_cpp_python=python)
    one_line(senri("bench"), pattern)
    assert not Path("runs").exists()


def test_a_failed_row_is_one_line_and_the_others_stay(senri, bench, one_line):
    def broken(spec):
        if spec["key"] == "reading/128":
            raise ValueError("reading/128: it broke")
        return measure(spec)

    bench(measurements=["reading"])
    bench.measure = broken
    result = senri("bench")
    one_line(result, "reading/128: it broke")
    assert '"reading/64"' in (run_folder(result) / "records.jsonl").read_text()
