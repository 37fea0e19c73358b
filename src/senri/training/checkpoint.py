"""A run's folder: its identity, and checkpoints that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from senri.files import write_atomically
from senri.hf.base import new_folder
from senri.identity import Identity, differences
from senri.training.settings import TrainingError

IDENTITY, WEIGHTS, STATE = "run.json", "weights.safetensors", "state.pt"
KEPT = 2  # the last one, and one more should it be damaged


def open_folder(folder: Path, identity: Identity) -> None:
    """Make a run's folder, or make sure that it is this run's.

    Raises:
        TrainingError: the folder holds another run, naming what differs; or something else; or cannot be made.
    """
    check_folder(folder, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be made ({error.strerror}): name another folder with -o") from None
    write_atomically(folder / IDENTITY, json.dumps(identity, indent=1).encode())


def check_folder(folder: Path, identity: Identity) -> None:
    """The checks of :func:`open_folder`; writes nothing."""
    known = folder / IDENTITY
    if known.is_file():
        try:
            old = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{known} cannot be read ({error}): name another folder with -o") from None
        differing = sorted(differences(old, json.loads(json.dumps(identity))))
        if differing:
            raise TrainingError(
                f"{folder} holds a training with other settings ({', '.join(differing)}): name another folder with -o"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(f"{folder} exists and is no training: name another folder with -o")


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def save(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: Any,
    scheduler: Any,
    *,
    main: bool,
    more: Callable[[Path], None] = lambda scratch: None,
) -> None:
    """Save where the run stands after ``step`` steps, and drop all but the last checkpoints.

    Every process calls it (each has its own random numbers); the ``main`` one writes, ``more`` into the same folder.

    Raises:
        TrainingError: it cannot be written; the checkpoints before it stay.
    """
    random = gather_object([_random_state()])
    if not main:
        return
    target = folder / f"checkpoint-{step:08d}"
    if not target.exists():
        try:
            with new_folder(target) as scratch:
                save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, scratch / WEIGHTS)
                state = {
                    "step": step,
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "random": random,
                }
                torch.save(state, scratch / STATE)
                more(scratch)
                for file in scratch.iterdir():
                    _sync(file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{target} cannot be written ({reason}); the checkpoints before it are kept") from None
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path, parameters: dict[str, nn.Parameter], optimizer: Any, scheduler: Any, *, process: int) -> int:
    """Go back to the last checkpoint; returns the steps done by then.

    Raises:
        TrainingError: it is damaged.
    """
    source = checkpoints(folder)[-1]
    try:
        weights = load_file(source / WEIGHTS)
        state = torch.load(source / STATE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    except Exception as error:  # a damaged file fails in any way
        reason = " ".join(str(error).split())[:150]
        raise TrainingError(f"{source} is damaged ({reason}): remove it to go on from the one before") from None
    random = state["random"][process]
    torch.set_rng_state(random["cpu"])
    if random["cuda"]:
        torch.cuda.set_rng_state_all(random["cuda"])
    return state["step"]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
