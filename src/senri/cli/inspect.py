"""``senri inspect``: what a memory file holds, without loading a model."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from senri.cli.common import MemoryFile, console

NAME = "inspect"
_SHOWN = (
    "source",
    "complete",
    "tokens_read",
    "base",
    "dtype",
    "sliding_window_size",
    "num_sink_tokens",
    "memory_layers",
    "memory_heads",
    "memory_num_slots",
    "memory_readout",
    "update_rule",
    "feature_map",
    "store",
    "routing_basis",
    "num_memory_banks",
    "segments_per_bank",
    "num_memories",
    "memory_sharing",
    "alibi_scale",
    "format_version",
    "model_fingerprint",
    "tokenizer_fingerprint",
)


def command(memory: MemoryFile) -> None:
    """Show what a memory file holds: its header, and each layer's memory."""
    from senri.hf.memory_file import load_tensors, memories_in
    from senri.memory.inspect import effective_rank, key_overlap, load

    header, tensors = load_tensors(memory)
    console.print(f"{memory}: {memory.stat().st_size / 1e6:.2f} MB")
    for name in _SHOWN:
        if header.get(name) is not None:
            console.print(f"  {name:<22} {header[name]}")
    table = Table(title="memories", title_justify="left")
    for column in ("layer", "memories", "matrix", "pairs written", "norm", "rank", "key overlap", "load"):
        table.add_column(column, justify="right")
    for layer, state in memories_in(tensors).items():
        matrix = state.M if state.slots is None else state.slots.K  # where pairs are kept, of their keys
        ranks = effective_rank(matrix)
        filled = ranks > 0
        overlap = key_overlap(state)
        full = load(state).tolist()
        _, *memories, rows, columns = state.M.shape
        table.add_row(
            str(layer),
            str(math.prod(memories)),
            f"{rows} x {columns}",
            ", ".join(f"{n:,}" for n in state.written.tolist()),
            f"{float(state.M.norm()):.2f}",
            f"{_mean(ranks[filled]):.0f} of {min(matrix.shape[-2:])}",
            f"{_mean(overlap[filled]):.2f}",
            ", ".join(f"{share:.0%}" for share in full),
        )
    console.print(table)
    console.print("means of the memories that hold something; rank: the effective one")
    console.print("load: pairs against p with p ln p = d²/2, or slots held")


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else 0.0
