"""Modules built from plain numbers: exact local attention and the memory that reads what left it."""

from senri.layers.memory_attention import MemoryAttention, MemoryLayerState, MemoryStream, WriteGate, Writing, taps_of
from senri.layers.packed_linear import PackedLinear, PackedWeights, is_plain, packs, wants_gradients
from senri.layers.sinks import NewSinks, Sinks, new_sinks, sinks_behind
from senri.layers.sliding_window import WindowPlan, best_block_size, sliding_window_attention, window_plan

__all__ = [
    "MemoryAttention",
    "MemoryLayerState",
    "MemoryStream",
    "NewSinks",
    "PackedLinear",
    "PackedWeights",
    "Sinks",
    "WindowPlan",
    "WriteGate",
    "Writing",
    "best_block_size",
    "is_plain",
    "new_sinks",
    "packs",
    "sinks_behind",
    "sliding_window_attention",
    "taps_of",
    "wants_gradients",
    "window_plan",
]
