"""A row in a process of its own: what it says, its peak, its errors."""

import json
import mmap
import os
import signal
import subprocess
import sys
import threading

import pytest

from senri.benchmark import process
from senri.benchmark.measure import main
from senri.benchmark.process import LeftOut, Peak, run_row


def test_a_row(spec):
    row = run_row(spec("load"))
    assert row["key"] == row["measurement"] == "load"
    assert row["import"] > 0.1, "nothing heavy was imported before the row was known"
    assert row["process_peak_bytes"] > 50e6
    assert row["wall_seconds"] > row["import"]


def test_the_command_line_of_a_row(spec, monkeypatch, capsys):
    """What a row's process says where it can say nothing."""

    def say(row):
        monkeypatch.setattr(sys, "argv", ["measure", json.dumps(row)])
        main()
        return json.loads(capsys.readouterr().out)

    peer = spec("peer", peer="nobody", tokens=10, decode=1, repeats=1, options={})
    assert say(peer) == {"left_out": "No module named 'senri.benchmark.peers.nobody'"}
    nowhere = {"name": "./nowhere", "dtype": "auto", "adapter": "none", "overrides": {}}
    with pytest.raises(SystemExit, match=r"\Acannot load a model from './nowhere': [^\n]*\Z"):
        say(spec("load", model=nowhere))


def test_peak_sees_what_came_and_went():
    with Peak() as small:
        pass
    with Peak() as peak, mmap.mmap(-1, 100_000_000) as block:  # not from what the allocator holds already
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert 90e6 < peak.bytes - small.bytes < 200e6


def fake(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def pretend(monkeypatch):
    """``(code)``: a row's process runs this instead."""

    def make(code):
        start = subprocess.Popen
        monkeypatch.setattr(process.subprocess, "Popen", lambda _, **options: start(fake(code), **options))

    return make


def test_progress_and_the_last_line(pretend, monkeypatch):
    monkeypatch.setattr(process, "SHOWN", 0.0)
    pretend(
        "import sys, time\nprint('progress: half', file=sys.stderr, flush=True)\ntime.sleep(0.3)\n"
        "print('noise')\nprint('{\"key\": \"k\"}')"
    )
    shown = []
    row = run_row({"key": "k"}, shown.append)
    assert row["key"] == "k"
    assert shown == ["half"], "once"


def test_what_is_left_out(pretend):
    pretend("""print('{"left_out": "no such thing"}')""")
    with pytest.raises(LeftOut, match="no such thing"):
        run_row({"key": "k"})


def test_failures_are_one_line(pretend):
    pretend("import sys\nprint('progress: half', file=sys.stderr)\nsys.exit('it broke')")
    with pytest.raises(ValueError, match=r"\Ak: it broke\Z"):
        run_row({"key": "k"})


def test_a_process_that_dies_without_a_word(pretend):
    pretend("import os\nos._exit(7)")
    with pytest.raises(ValueError, match="k: it ended with status 7"):
        run_row({"key": "k"})


def test_ctrl_c_ends_the_process(pretend, monkeypatch):
    pretend("import time\ntime.sleep(60)")
    started = []
    end = process._end
    monkeypatch.setattr(process, "_end", lambda p: (started.append(p), end(p)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_row({"key": "k"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].poll() is not None
