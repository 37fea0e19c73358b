"""``senri inspect``: what a memory file holds, without loading a model."""

from __future__ import annotations

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
    "format_version",
    "model_fingerprint",
    "tokenizer_fingerprint",
)


def command(memory: MemoryFile) -> None:
    """Show what a memory file holds: its header, and each layer's memory."""
    from senri.hf.memory_file import load_tensors
    from senri.memory.inspect import effective_rank

    header, tensors = load_tensors(memory)
    console.print(f"{memory}: {memory.stat().st_size / 1e6:.2f} MB")
    for name in _SHOWN:
        if header.get(name) is not None:
            console.print(f"  {name:<22} {header[name]}")
    table = Table(title="memories", title_justify="left")
    for column in ("layer", "heads", "matrix", "pairs written", "norm", "effective rank", "slots held"):
        table.add_column(column, justify="right")
    for name, matrix in sorted(tensors.items()):
        if not name.endswith(".memory.memory.M"):
            continue
        written = tensors[name.removesuffix("M") + "written"]
        strength = tensors.get(name.removesuffix("M") + "slots.strength")
        ranks = effective_rank(matrix).flatten().tolist()
        table.add_row(
            name.split(".")[1],
            str(matrix.shape[1]),
            f"{matrix.shape[2]} x {matrix.shape[3]}",
            ", ".join(f"{n:,}" for n in written.tolist()),
            f"{float(matrix.norm()):.2f}",
            f"{sum(ranks) / len(ranks):.0f} of {min(matrix.shape[2:])}",
            "" if strength is None else f"{int((strength > 0).sum())} of {strength.numel()}",
        )
    console.print(table)
