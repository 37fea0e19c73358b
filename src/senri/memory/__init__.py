"""The memory core: pure tensor functions, usable without any model.

Shapes, everywhere in this package: ``B`` batch, ``T`` tokens, ``H`` heads, ``G`` query heads per memory head,
``Dk`` / ``Dv`` key and value width of one head, ``C`` tokens of one chunk, ``W`` delay (the window).
"""

from senri.memory import reference
from senri.memory.feature_maps import FEATURE_MAPS, feature_dim
from senri.memory.rules import RULES, SlotParameters
from senri.memory.scan import read, scan
from senri.memory.state import MemoryState, Pending
from senri.memory.stores import STORES, Banks, Hierarchical, Multi, Routed, Store, orthogonal_basis
from senri.memory.stream import delay_line
from senri.memory.unigram import UnigramStream

__all__ = [
    "FEATURE_MAPS",
    "RULES",
    "STORES",
    "Banks",
    "Hierarchical",
    "MemoryState",
    "Multi",
    "Pending",
    "Routed",
    "SlotParameters",
    "Store",
    "UnigramStream",
    "delay_line",
    "feature_dim",
    "orthogonal_basis",
    "read",
    "reference",
    "scan",
]
