"""Language models from scratch: layers of any mix, for experiments on memory and recurrence.

Shapes, everywhere in this package: ``B`` batch, ``T`` tokens of a call, ``P`` tokens before it, ``H`` heads, ``D``
width of a head.
"""

from senri.lm.base import KeyValues, Layer, LayerState, ModelState
from senri.lm.factory import MODELS, create_model, model_options
from senri.lm.feedback import FeedbackLM, Refined, relative_gap
from senri.lm.memory_layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
from senri.lm.model import Output, TransformerLM
from senri.lm.pythia import PythiaLayer
from senri.lm.state_file import StateFileError, load_memory, save_memory

__all__ = [
    "MODELS",
    "FeedbackLM",
    "HierarchicalLayer",
    "InfiniLayer",
    "KeyValues",
    "Layer",
    "LayerState",
    "ModelState",
    "MultiMemoryLayer",
    "Output",
    "PythiaLayer",
    "Refined",
    "StateFileError",
    "TransformerLM",
    "create_model",
    "load_memory",
    "model_options",
    "relative_gap",
    "save_memory",
]
