"""Modules built from plain numbers: exact local attention and the memory that reads what left it."""

from senri.layers.append import append, reserve
from senri.layers.memory_attention import MemoryAttention, MemoryLayerState, MemoryStream, WriteGate, Writing, taps_of
from senri.layers.packed_linear import (
    FrozenLinear,
    PackedLinear,
    PackedWeights,
    PlainLinear,
    fuses,
    is_bare,
    is_plain,
    packs,
    wants_gradients,
)
from senri.layers.sinks import NewSinks, Sinks, new_sinks, sinks_behind
from senri.layers.sliding_window import WindowPlan, best_block_size, sliding_window_attention, window_plan
from senri.layers.unigram_cache import UnigramCache

__all__ = [
    "FrozenLinear",
    "MemoryAttention",
    "MemoryLayerState",
    "MemoryStream",
    "NewSinks",
    "PackedLinear",
    "PackedWeights",
    "PlainLinear",
    "Sinks",
    "UnigramCache",
    "WindowPlan",
    "WriteGate",
    "Writing",
    "append",
    "best_block_size",
    "fuses",
    "is_bare",
    "is_plain",
    "new_sinks",
    "packs",
    "reserve",
    "sinks_behind",
    "sliding_window_attention",
    "taps_of",
    "wants_gradients",
    "window_plan",
]
