"""Files that are whole or not there, and what weights are known by."""

import os
from pathlib import Path

import pytest
import torch

from senri.files import FileError, fingerprint, write_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, error) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot write .*none/file: No such file or directory"):
        write_atomically(tmp_path / "none" / "file", b"data")


def test_weights_have_one_fingerprint_in_every_precision() -> None:
    layer = torch.nn.Linear(4, 3).bfloat16()
    mine = fingerprint(layer.named_parameters())
    assert fingerprint(layer.float().named_parameters()) == mine
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert fingerprint(layer.named_parameters()) != mine
