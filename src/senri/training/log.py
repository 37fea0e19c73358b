"""The log of a run: one JSON object a line, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from senri.training.bptt import Sums

LOG, BOARD = "log.jsonl", "tensorboard"
Entry = dict[str, Any]


def summarise(sums: Sums) -> Entry:
    """Means of a step from its sums."""
    tasks = sorted(name.partition("/")[2] for name in sums if name.startswith("weight/"))
    losses = {task: _mean(sums, f"nll/{task}", f"weight/{task}") for task in tasks}
    total = sum(sums[f"weight/{task}"] for task in tasks)
    return {
        "loss": sum(sums[f"nll/{task}"] for task in tasks) / total if total else None,
        "losses": losses,
        "write_loss": sums.get("write_loss"),
        "distillation": sums.get("distillation"),
        "write_plain": _mean(sums, "write/plain", "tokens/plain"),
        "write_asked": _mean(sums, "write/asked", "tokens/asked"),
        "read_gate": _mean(sums, "read", "tokens/read"),
    }


def _mean(sums: Sums, value: str, count: str) -> float | None:
    return sums[value] / sums[count] if sums[count] else None


class TrainingLog:
    """Appends to ``log.jsonl`` in ``folder``.

    Args:
        step: steps that are done: what was logged beyond them (by a run that was killed later) is forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / LOG
        kept = [json.dumps(entry) + "\n" for entry in read_log(folder) if entry["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def write(self, entry: Entry) -> None:
        """Add what was seen in ``entry["step"]``."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers(entry):
                self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: Path) -> list[Entry]:
    """All entries of a run's log, none if there is none; a line that was cut off is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _numbers(entry: Entry, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in entry.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((prefix + name, value))
    return found
