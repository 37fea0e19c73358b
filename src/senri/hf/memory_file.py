"""A saved memory: one safetensors file with a header that says what it belongs to, written atomically."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from senri.files import write_atomically
from senri.hf.cache import ModelState, SenriCache
from senri.hf.configuration_senri import SenriConfig
from senri.hf.decoder import build_store
from senri.memory.rules import RULES
from senri.memory.state import MemoryState, Slots, named_tensors

FORMAT_VERSION = 4
# Fields of the header that must equal the model's, and what they are called in a message.
_MUST_MATCH = (
    "format_version",
    "base",
    "rope_parameters",
    "rms_norm_eps",
    "sliding_window_size",
    "num_sink_tokens",
    "memory_layers",
    "update_rule",
    "feature_map",
    "store",
    "routing_basis",
    "num_memory_banks",
    "segments_per_bank",
    "num_memories",
    "memory_sharing",
    "unigram_cache",
    "alibi_scale",
    "segment_size",
    "memory_readout",
    "memory_heads",
    "memory_num_slots",
    "memory_conv_size",
    "memory_context_size",
    "model_fingerprint",
)


class MemoryFileError(ValueError):
    """A memory file that cannot be used; the message is one line."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, merges and pre-tokenization."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def expected_header(config: SenriConfig) -> dict[str, Any]:
    """The header fields that follow from a model's configuration; None where it makes no difference."""
    store = build_store(config)
    segmented = RULES[config.update_rule].segmented or config.use_alibi or (store is not None and store.segmented)
    return {
        "format_version": FORMAT_VERSION,
        "base": f"{config.num_hidden_layers} layers of {config.hidden_size}",
        "rope_parameters": config.rope_parameters,
        "rms_norm_eps": config.rms_norm_eps,
        "sliding_window_size": config.sliding_window_size,
        "num_sink_tokens": config.num_sink_tokens,
        "memory_layers": config.memory_layers,
        "update_rule": config.update_rule,
        "feature_map": config.feature_map or RULES[config.update_rule].feature_map,
        "segment_size": config.segment_size if segmented else None,
        "store": config.store,
        "memory_readout": config.memory_readout,
        "memory_heads": [config.memory_num_heads, config.memory_num_key_value_heads, config.memory_head_dim],
        "memory_num_slots": config.memory_num_slots if config.update_rule == "slot" else None,
        "memory_conv_size": config.memory_conv_size,
        "memory_context_size": config.memory_context_size,
        "routing_basis": config.routing_basis if config.store == "routed" else None,
        "num_memory_banks": config.num_memory_banks if config.store == "banks" else None,
        "segments_per_bank": config.segments_per_bank if config.store == "banks" else None,
        "num_memories": config.num_memories if config.store in ("multi", "hierarchical") else None,
        "memory_sharing": config.memory_sharing or None,
        "unigram_cache": config.unigram_cache or None,
        "alibi_scale": config.alibi_scale if config.use_alibi else None,
    }


def save(path: str | Path, cache: SenriCache, header: dict[str, Any]) -> None:
    """Write ``cache`` to ``path``: whole or not at all.

    Raises:
        MemoryFileError: nothing to save.
        FileError: the file cannot be written (a full disk, no permission).
    """
    if cache.state is None:
        raise MemoryFileError("there is no memory to save yet: read something first")
    tensors = {name: t.detach().cpu().contiguous() for name, t in named_tensors(_trim(cache.state)).items()}
    header = {
        **header,
        "dtype": str(cache.state.layers[0].keys.dtype).removeprefix("torch."),
        "batch_size": cache.batch_size,
        "tokens_read": cache.tokens_read,
        "columns": cache.columns,
        "has_padding": cache.has_padding,
    }
    header["checksum"] = _checksum(tensors, header)
    data = serialize(tensors, metadata={"senri": json.dumps(header)})
    write_atomically(Path(path), data)


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a memory file.

    Raises:
        MemoryFileError: missing, not a Senri memory, truncated, or not matching its checksum.
    """
    return load_tensors(path)[0]


def load(path: str | Path, cache: SenriCache, empty: ModelState, expected: dict[str, Any]) -> dict[str, Any]:
    """Fill ``cache`` from a file; ``empty`` gives shapes, dtype and device. Returns the header.

    Raises:
        MemoryFileError: as :func:`read_header`; or the file belongs to another model, naming the field that differs.
            The cache is untouched then.
    """
    header, tensors = load_tensors(path)
    for field in _MUST_MATCH:
        if field in expected and header.get(field) != expected[field]:
            raise MemoryFileError(
                f"{path} does not fit this model: {field} is {header.get(field)!r} in the file, "
                f"{expected[field]!r} here"
            )
    ours, theirs = expected.get("tokenizer_fingerprint"), header.get("tokenizer_fingerprint")
    if ours and theirs and ours != theirs:
        raise MemoryFileError(
            f"{path} was read with another tokenizer: tokenizer_fingerprint is {theirs!r} in the file, {ours!r} here"
        )
    cache.state = restore(empty, tensors)
    cache.columns, cache.has_padding = header["columns"], header["has_padding"]
    return header


def load_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a memory file as they stand in it.

    Raises:
        MemoryFileError: missing, not a Senri memory, or truncated.
    """
    if not Path(path).is_file():
        raise MemoryFileError(f"{path}: no such file; make one with: senri read TEXT -o {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "senri" not in metadata:
                raise MemoryFileError(f"{path} is a safetensors file but no Senri memory")
            header = json.loads(metadata["senri"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise MemoryFileError(f"{path} is no Senri memory, or truncated or corrupt ({error})") from None
    if header.get("format_version") != FORMAT_VERSION:
        raise MemoryFileError(
            f"{path}: format_version is {header.get('format_version')!r} in the file, {FORMAT_VERSION} here: read the "
            "text again"
        )
    # the second: a number may be written in two ways, as 1e-06 and 1E-06
    if header.get("checksum") != _checksum(tensors, header) or json.dumps(header) != metadata["senri"]:
        raise MemoryFileError(f"{path} is corrupt: its content does not match its checksum; read the text again")
    return header, tensors


def memories_in(tensors: dict[str, Tensor]) -> dict[int, MemoryState]:
    """The associative memory of each layer that writes one, among the tensors of :func:`load_tensors`."""
    found = {}
    for name in tensors:
        if name.endswith(".memory.memory.M"):
            fields = _fields(tensors, name.removesuffix("M"), MemoryState)
            slots = _fields(tensors, name.removesuffix("M") + "slots.", Slots)
            found[int(name.split(".")[1])] = MemoryState(**{**fields, "slots": Slots(**slots) if slots else None})
    return dict(sorted(found.items()))


def _fields(tensors: dict[str, Tensor], prefix: str, of: type[MemoryState] | type[Slots]) -> dict[str, Any]:
    found = {name: tensors.get(prefix + name) for name in of._fields}
    return found if any(tensor is not None for tensor in found.values()) else {}


def _checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    rest = {name: value for name, value in header.items() if name != "checksum"}
    # through JSON once more: a tuple that was saved comes back as a list
    digest = hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        # not flatten(): it keeps the odd stride that a single element may have, and view() refuses that
        flat = tensor.as_strided((tensor.numel(),), (1,))
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trim(state: ModelState) -> ModelState:
    """Drop the empty slots: those before the window's first token, and sinks before any token of a text.

    So after flush() nothing of the window is left.
    """
    filled = state.valid.any(0)
    slots = filled.numel()
    first = int(filled.int().argmax()) if filled.any() else slots
    sinks = slice(None if state.since_flush.any() else 0)
    layers = tuple(
        layer._replace(
            sink_keys=layer.sink_keys[:, :, sinks],
            sink_values=layer.sink_values[:, :, sinks],
            memory=layer.memory and layer.memory._replace(recent=_of_the_last(layer.memory.recent, slots - first)),
        )
        for layer in state.layers
    )
    return state._replace(
        layers=layers,
        ids=state.ids[:, first:],
        valid=state.valid[:, first:],
        written=state.written[:, first:],
        surprise=None if state.surprise is None else state.surprise[:, first:],
        counts=None if state.counts is None or not state.counts.any() else state.counts,
    )


def _of_the_last(recent: Tensor, tokens: int) -> Tensor:
    """Of a layer's recent inputs ``[B, slots, hidden]`` those of the last tokens."""
    return recent[:, max(recent.shape[1] - tokens, 0) :]


def restore(empty: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """A state shaped like ``empty`` with the file's tensors; trimmed slots come back empty."""
    if isinstance(empty, Tensor):
        if prefix == "counts" and prefix not in tensors:  # after flush() there are none
            return empty
        tensor = tensors[prefix].to(empty.device, empty.dtype)
        if "sink" in prefix and not tensor.numel():
            return empty
        missing = empty.shape[1] - tensor.shape[1] if empty.dim() > 1 and "keys" not in prefix else 0
        if missing > 0 and "values" not in prefix:
            pad = empty.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])
            tensor = torch.cat([pad, tensor], dim=1)
        return tensor
    if not isinstance(empty, tuple):
        return empty
    names = getattr(empty, "_fields", range(len(empty)))
    fields = [restore(e, tensors, f"{prefix}.{n}" if prefix else str(n)) for n, e in zip(names, empty, strict=True)]
    return type(empty)(*fields) if hasattr(empty, "_fields") else tuple(fields)
