"""One evaluation: its folder, its identity, its suites one after the other, its report."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from senri import __version__
from senri.evaluation.report import Report, Section, Value
from senri.evaluation.runner import Log
from senri.evaluation.suites import Bench, Suite
from senri.evaluation.write import write_report
from senri.files import write_atomically
from senri.identity import Identity, differences

IDENTITY, RECORDS, STARTS = "run.json", "records.jsonl", "starts.jsonl"


def open_run(folder: Path, identity: Identity) -> Log:
    """The log of a run in ``folder``, new or to be continued.

    Raises:
        ValueError: the folder holds another run, naming what differs; or something else.
    """
    known = folder / IDENTITY
    if known.is_file():
        differing = sorted(differences(load_identity(folder), json.loads(json.dumps(identity))))
        if differing:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(differing)}): name another folder with -o"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no evaluation: name another folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): name another folder with -o") from None
    write_atomically(known, json.dumps(identity, indent=1).encode())
    with open(folder / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(versions()) + "\n")
    return Log(folder / RECORDS)


def load_identity(folder: Path) -> Identity:
    """What a run was made with.

    Raises:
        ValueError: no evaluation's folder, or a damaged one.
    """
    try:
        identity = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no folder of an evaluation: it has no {IDENTITY}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / IDENTITY} cannot be read ({error}): name another folder") from None
    if not isinstance(identity, dict):
        raise ValueError(f"{folder / IDENTITY} is not what an evaluation writes: remove the folder")
    return identity


def evaluate(
    suites: Sequence[Suite], bench: Bench, folder: Path, identity: Identity, facts: dict[str, Value] | None = None
) -> Report:
    """Run the suites, writing the report anew after each: an interrupted evaluation shows what it has.

    Args:
        folder: as given to :func:`open_run`.
        facts: shown in the report beside the identity and the versions.
    """
    report = None
    for number in range(1, len(suites) + 1):
        suites[number - 1].run(bench)
        report = build_report(suites[:number], bench.log, bench.reader.window, identity, facts)
        write_report(report, folder)
    if report is None:
        raise ValueError("there is no suite to run: name some in evaluation.suites of experiment.yaml")
    return report


def build_report(
    suites: Sequence[Suite], log: Log, window: int | None, identity: Identity, facts: dict[str, Value] | None = None
) -> Report:
    """The report of what the log holds."""
    sections: list[Section] = []
    for suite in suites:
        records = [r for key, r in log.records.items() if key.startswith(f"{suite.name}/")]
        if records:
            sections.append(suite.section(records, window))
    shown = {name: value for name, value in identity.items() if value is None or isinstance(value, str | int | float)}
    lines = (log.path.parent / STARTS).read_text(encoding="utf-8").splitlines()
    starts = list(dict.fromkeys(lines))
    if len(starts) > 1:
        changed = sorted({n for a in map(json.loads, starts) for n, v in a.items() if v != json.loads(starts[-1])[n]})
        flag = f"MIXED: the run was continued under another {', '.join(changed)}: {len(starts)} different starts"
        sections.insert(0, Section("How it was run", flags=(flag,), text="See starts.jsonl."))
    return Report(
        f"Evaluation of {identity['model']}",
        {**shown, **seconds(log), **(facts or {}), **json.loads(starts[-1])},
        tuple(sections),
        json.loads(json.dumps(identity)),
    )


def seconds(log: Log) -> dict[str, Value]:
    """Time that each task's readings and answers took, in seconds (full attention and question-only aside)."""
    spent: dict[str, Value] = {}
    for record in log.records.values():
        if "read_seconds" in record:
            name = f"seconds, {record['task']}"
            spent[name] = round(float(spent.get(name) or 0) + record["read_seconds"] + record["answer_seconds"], 1)
    return spent


def versions() -> dict[str, Value]:
    """Versions of everything that could change a result, and the machine."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    return {
        "senri": __version__,
        "git revision": git_revision(),
        **packages,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}, {torch.get_num_threads()} threads",
    }


def git_revision() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
