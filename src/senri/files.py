"""Files that are whole or not there, and what a model's weights are known by."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class FileError(ValueError):
    """A file that cannot be written; the message is one line."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, then rename; on failure nothing is left behind and an older file stays.

    Raises:
        FileError: a full disk, no permission, no such folder.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C while writing leaves nothing behind either
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise FileError(
            f"cannot write {path}: {error.strerror or error} ({len(data) / 1e6:.1f} MB needed); choose another place"
        ) from None


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named weights, rounded to bfloat16 so that a model has one fingerprint in every precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:32]
