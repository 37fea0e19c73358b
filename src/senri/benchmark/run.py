"""One benchmark: its folder, its rows one after the other, its report."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from senri.benchmark.plan import Settings, Spec, plan
from senri.benchmark.process import LeftOut, run_row
from senri.benchmark.report import build_report
from senri.evaluation.report import Report
from senri.evaluation.run import open_run, versions
from senri.evaluation.runner import Log
from senri.evaluation.write import write_report
from senri.identity import Identity

Row = dict[str, Any]


def run_identity(settings: Settings) -> Identity:
    """All that decides a run's figures: the settings, the code, the packages and the machine."""
    wanted = {name: value for name, value in vars(settings).items() if name != "model"}
    return {
        "model": settings.model["name"],
        "load": {name: value for name, value in settings.model.items() if name != "name"},
        "benchmark": wanted,
        "code": code_digest(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def code_digest() -> str:
    """SHA-256 of this package's own source files, so that rows of another state of the code are never taken over."""
    digest, home = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(home.rglob("*.py")):
        digest.update(str(path.relative_to(home)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check(settings: Settings) -> list[str]:
    """What is left out and why, a line each.

    Raises:
        ValueError: llama_cpp_python is no Python with llama_cpp.
    """
    python = settings.llama_cpp_python
    if "peers" not in settings.measurements or "llama_cpp" not in settings.peers:
        return []
    if python is None:
        return ["llama_cpp is left out: benchmark.llama_cpp_python of experiment.yaml names no Python that has it"]
    place = f"benchmark.llama_cpp_python of experiment.yaml: {python}"
    try:
        found = subprocess.run([python, "-I", "-c", "import llama_cpp"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{place} cannot be run ({error.strerror}): name a Python, or null") from None
    if found.returncode:
        raise ValueError(f"{place} has no llama_cpp: `make bench-llama` makes one that has, or set it to null")
    return []


def start(settings: Settings, folder: Path) -> Log:
    """The log of the run in ``folder``, new or to be continued.

    Raises:
        ValueError: the folder is something else's.
    """
    return open_run(folder, run_identity(settings))


def bench(
    settings: Settings,
    folder: Path,
    log: Log,
    show: Callable[[str], None],
    measure: Callable[[Spec, Callable[[str], None]], Row] = run_row,
) -> Report:
    """Measure the rows that the log does not hold yet, writing the report anew after each.

    Args:
        show: called with lines on how far it is.

    Raises:
        ValueError: a measurement failed.
    """
    left_out, identity = check(settings), run_identity(settings)
    for line in left_out:
        show(line)
    sitting, specs = time.strftime("%Y-%m-%d %H:%M:%S"), plan(settings, folder)
    if settings.llama_cpp_python is None:
        specs = [spec for spec in specs if spec.get("peer") != "llama_cpp"]
    for number, spec in enumerate(specs, start=1):
        if spec["key"] in log.records:
            continue
        head = f"{number} of {len(specs)}: {spec['key']}"
        show(f"{head} ...")
        try:
            row = measure(spec, lambda text, head=head: show(f"{head}: {text}"))  # type: ignore[misc]
        except LeftOut as reason:
            left_out.append(f"{spec['key']} is left out: {reason}")
            show(left_out[-1])
        else:
            log.add({**row, "sitting": sitting})
        write_report(build_report(list(log.records.values()), identity, versions(), left_out), folder)
    made = build_report(list(log.records.values()), identity, versions(), left_out)
    write_report(made, folder)
    return made
