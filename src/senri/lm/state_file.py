"""The memories of a model as a file: safetensors, with a header that says which model they belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from senri.files import fingerprint, write_atomically
from senri.lm.model import TransformerLM
from senri.memory.state import named_tensors

FORMAT_VERSION = 1
_HEADER = "senri_lm"


class StateFileError(ValueError):
    """A file of memories that cannot be used; the message is one line."""


def save_memory(path: str | Path, model: TransformerLM) -> None:
    """Write the memories of the model's session to ``path``: whole or not at all.

    Raises:
        RuntimeError: no session is open.
        ValueError: the model has no memory, or the file cannot be written.
    """
    tensors = {name: t.cpu().contiguous() for name, t in named_tensors(model.get_memory_state()).items()}
    if not tensors:
        raise ValueError("the model has no memory layer: there is nothing to save")
    data = serialize(tensors, metadata={_HEADER: json.dumps({**_header(model), "checksum": _checksum(tensors)})})
    write_atomically(Path(path), data)


def load_memory(path: str | Path, model: TransformerLM) -> None:
    """Open a session on ``model`` that goes on from a file.

    Raises:
        StateFileError: no such file, no memories in it, damaged; or those of another model or other weights. The
            session is untouched then.
    """
    header, tensors = _load(Path(path))
    ours = json.loads(json.dumps(_header(model)))
    for field, value in ours.items():
        if header.get(field) != value:
            raise StateFileError(
                f"{path} does not fit this model: {field} is {header.get(field)!r} in the file, {value!r} here"
            )
    rows = next(len(tensor) for tensor in tensors.values())
    model.set_memory_state(_restore(model.init_state(rows), tensors))


def _header(model: TransformerLM) -> dict[str, Any]:
    """What a file must agree with; ``chunk_size`` is a matter of speed."""
    layers = [{k: v for k, v in layer.items() if k != "chunk_size"} for layer in model.numbers["layers"]]
    return {
        "format_version": FORMAT_VERSION,
        "vocab_size": model.vocab_size,
        "layers": layers,
        "fingerprint": fingerprint(model.named_parameters()),
    }


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise StateFileError(f"{path}: no such file; save_memory() makes one")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise StateFileError(f"{path} holds no memories of a TransformerLM, or is damaged ({error})") from None
    if header.get("checksum") != _checksum(tensors):
        raise StateFileError(f"{path} is damaged: its content does not match its checksum")
    return header, tensors


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _restore(empty: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """A state shaped like ``empty`` with the file's tensors."""
    if isinstance(empty, torch.Tensor):
        return tensors[prefix]
    if not isinstance(empty, tuple):
        return empty
    names = getattr(empty, "_fields", range(len(empty)))
    fields = [_restore(e, tensors, f"{prefix}.{n}" if prefix else str(n)) for n, e in zip(names, empty, strict=True)]
    return type(empty)(*fields) if hasattr(empty, "_fields") else tuple(fields)
