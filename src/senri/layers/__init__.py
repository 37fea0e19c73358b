"""Modules built from plain numbers: exact local attention and the memory that reads what left it."""

from senri.layers.memory_attention import MemoryAttention, MemoryLayerState, MemoryStream, WriteGate, Writing, taps_of
from senri.layers.sinks import NewSinks, Sinks, new_sinks, sinks_behind
from senri.layers.sliding_window import WindowPlan, sliding_window_attention, window_plan

__all__ = [
    "MemoryAttention",
    "MemoryLayerState",
    "MemoryStream",
    "NewSinks",
    "Sinks",
    "WindowPlan",
    "WriteGate",
    "Writing",
    "new_sinks",
    "sinks_behind",
    "sliding_window_attention",
    "taps_of",
    "window_plan",
]
