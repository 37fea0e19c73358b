"""One row in a process of its own, so that its peak of memory, its caches and its threads are its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from senri.benchmark.plan import Spec

SHOWN = 10.0  # seconds between two words on how far a row is
PROGRESS = "progress: "


class LeftOut(ValueError):
    """A row that cannot be had on this machine; the message says why."""


class Peak:
    """Largest resident memory of this process between enter and exit, as the kernel keeps it: no thread that looks,
    which would take a core from what is measured. Elsewhere than on Linux: what is resident at the end.
    """

    highest = 0  # of what was forgotten at each beginning

    def __enter__(self) -> Peak:
        self.bytes, Peak.highest = 0, process_peak()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _high_water()


def process_peak() -> int:
    """Largest resident memory of this process since its start, in bytes; elsewhere than on Linux: what is resident."""
    return max(Peak.highest, _high_water())


def _high_water() -> int:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])  # type: ignore[index]
    return psutil.Process().memory_info().rss


def run_row(spec: Spec, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure one row. To what it says comes ``wall_seconds``.

    Args:
        show: called now and then with how far it is.

    Raises:
        LeftOut: the row cannot be had here.
        ValueError: the measurement failed, with its last word.
    """
    command = [sys.executable, "-m", "senri.benchmark.measure", json.dumps(spec)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=_environment())
            try:
                _watch(process, err, show)
            finally:
                _end(process)
        printed = out.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in _lines(err) if not line.startswith(PROGRESS)]
    if process.returncode or not printed:
        reason = said[-1] if said else f"it ended with status {process.returncode}"
        raise ValueError(f"{spec['key']}: {reason.removeprefix('senri: ')}")
    row = json.loads(printed[-1])
    if "left_out" in row:
        raise LeftOut(row["left_out"])
    return {**row, "wall_seconds": time.perf_counter() - started}


def _environment() -> dict[str, str]:
    """This package, wherever the command stands."""
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _watch(process: subprocess.Popen[bytes], err: Path, show: Callable[[str], None]) -> None:
    """Until it has ended."""
    said = ""
    while True:
        try:
            process.wait(SHOWN)
            return
        except subprocess.TimeoutExpired:
            done = [line.removeprefix(PROGRESS) for line in _lines(err) if line.startswith(PROGRESS)]
            if done and done[-1] != said:
                said = done[-1]
                show(said)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def say_progress(text: str) -> None:
    """From within a row: how far it is."""
    print(PROGRESS + text, file=sys.stderr, flush=True)
