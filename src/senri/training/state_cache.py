"""The hidden states of every training sample, kept from one epoch to the next: in memory, or in a mapped file.

They are kept by the sample's number in the data, so that neither the order of an epoch nor the process that asks
matters. Shapes: ``N`` samples of ``T`` tokens, ``D`` width of the model.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from senri.training.settings import TrainingError

FILE = "states.safetensors"  # in a checkpoint, of a cache in memory
MAPPED = "states.bin"  # in the run's folder
_BLOCK = 1 << 24  # bytes


class StateCache:
    """States by sample and epoch.

    A run that was killed begins again at its last checkpoint, and must find what the cache held then. A cache in
    memory is part of the checkpoint. A mapped file is not copied; it holds the last *two* epochs' states of each sample
    instead, and an epoch only reads what the one before it wrote. So what is done again reads the same states, if a
    checkpoint ends each epoch.

    Args:
        samples, length, width: N, T, D.
        dtype: of the states.
        folder: of the mapped file, which several processes may share; None: in memory.

    Raises:
        TrainingError: the disk has no room for the file; or there is one of another size.
    """

    def __init__(self, samples: int, length: int, width: int, dtype: torch.dtype, folder: Path | None = None) -> None:
        self._file: np.memmap | None = None
        slots = 1 if folder is None else 2
        shape = (slots, samples, length, width)
        size = slots * samples * length * width * dtype.itemsize
        self.nbytes = size + slots * samples * 4
        if folder is None:
            self.states, self.written = torch.zeros(shape, dtype=dtype), torch.zeros(shape[:2], dtype=torch.int32)
        else:
            self._file = _mapped(folder / MAPPED, self.nbytes)
            self.states = torch.from_numpy(self._file[:size]).view(dtype).view(shape)
            self.written = torch.from_numpy(self._file[size:]).view(torch.int32).view(shape[:2])
        # written: epoch + 1, 0: never

    @property
    def on_disk(self) -> bool:
        """Whether it is a mapped file."""
        return self._file is not None

    def get(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor]:
        """What the epoch before ``epoch`` left of these samples ``[B, T, D]``, and whether it is there ``[B]``."""
        rows, slot = torch.tensor(indices), (epoch - 1) % len(self.states)
        there = self.written[slot, rows] == epoch
        return self.states[slot, rows], there & (epoch > 0)

    def put(self, indices: Sequence[int], epoch: int, states: Tensor) -> None:
        """Keep the states of these samples ``[B, T, D]`` as this epoch's, cut from the graph."""
        rows, slot = torch.tensor(indices), epoch % len(self.states)
        self.states[slot, rows] = states.detach().to("cpu", self.states.dtype)
        self.written[slot, rows] = epoch + 1  # last: what is marked is whole

    def save(self, folder: Path) -> None:
        """Make sure that a checkpoint in ``folder`` will find all of this."""
        if self._file is not None:
            self._file.flush()
        else:
            save_file({"states": self.states, "written": self.written}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go back to the checkpoint in ``folder``.

        Raises:
            TrainingError: its file is damaged or missing.
        """
        if self._file is not None:
            return
        try:
            saved = load_file(folder / FILE)
            self.states.copy_(saved["states"])
            self.written.copy_(saved["written"])
        except Exception as error:  # a damaged file fails in any way
            reason = " ".join(str(error).split())[:150]
            raise TrainingError(
                f"{folder / FILE} is damaged ({reason}): remove {folder} to go on from the one before"
            ) from None


def _mapped(path: Path, size: int) -> np.memmap:
    """The file as bytes that can be written; made, all zeros, if it is not there."""
    if not path.exists():
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = file.name
                # written out, for a write to a mapped file on a full disk would kill the process
                for start in range(0, size, _BLOCK):
                    file.write(bytes(min(_BLOCK, size - start)))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(temporary, path)
        except OSError as error:
            raise TrainingError(
                f"no room in {path.parent} for the states of all samples, {size / 1e9:.2f} GB ({error.strerror}): name "
                "another output_dir, or train on fewer samples"
            ) from None
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
    found = path.stat().st_size
    if found != size:
        raise TrainingError(
            f"{path} has {found:,} bytes, this run's states take {size:,}: remove it, or name another output_dir"
        )
    return np.memmap(path, np.uint8, "r+")
