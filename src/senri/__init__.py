"""Senri: a small language model reads text of any length in constant memory and recalls it.

Public names are loaded on first use: `import senri` alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from senri.config import ConfigManager
    from senri.hf.base import load_base
    from senri.hf.cache import SenriCache
    from senri.hf.calibrate import calibrate
    from senri.hf.configuration_senri import SenriConfig
    from senri.hf.convert import convert_qwen_to_senri, convert_to_senri
    from senri.hf.model import SenriModel
    from senri.hf.modeling_senri import SenriForCausalLM
    from senri.lm.factory import create_model
    from senri.lm.memory_layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
    from senri.lm.model import TransformerLM
    from senri.lm.pythia import PythiaLayer
    from senri.memory.state import MemoryState
    from senri.memory.svd import SVDCleaningStats

__version__ = "0.1.0"

# Where each public name lives. A test holds this, the imports above and __all__ together.
_HOMES = {
    "ConfigManager": "senri.config",
    "HierarchicalLayer": "senri.lm.memory_layers",
    "InfiniLayer": "senri.lm.memory_layers",
    "MemoryState": "senri.memory.state",
    "MultiMemoryLayer": "senri.lm.memory_layers",
    "PythiaLayer": "senri.lm.pythia",
    "SVDCleaningStats": "senri.memory.svd",
    "SenriCache": "senri.hf.cache",
    "SenriConfig": "senri.hf.configuration_senri",
    "SenriForCausalLM": "senri.hf.modeling_senri",
    "SenriModel": "senri.hf.model",
    "TransformerLM": "senri.lm.model",
    "calibrate": "senri.hf.calibrate",
    "convert_qwen_to_senri": "senri.hf.convert",
    "convert_to_senri": "senri.hf.convert",
    "create_model": "senri.lm.factory",
    "load_base": "senri.hf.base",
}

__all__ = [
    "ConfigManager",
    "HierarchicalLayer",
    "InfiniLayer",
    "MemoryState",
    "MultiMemoryLayer",
    "PythiaLayer",
    "SVDCleaningStats",
    "SenriCache",
    "SenriConfig",
    "SenriForCausalLM",
    "SenriModel",
    "TransformerLM",
    "__version__",
    "calibrate",
    "convert_qwen_to_senri",
    "convert_to_senri",
    "create_model",
    "load_base",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'senri' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
