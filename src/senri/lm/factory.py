"""``create_model``: one layer of a kind and Pythia layers behind it, by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from senri.lm.base import Layer
from senri.lm.feedback import FeedbackLM
from senri.lm.memory_layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
from senri.lm.model import TransformerLM
from senri.lm.pythia import PythiaLayer

# The first layer of each model.
MODELS: dict[str, type[Layer]] = {
    "pythia": PythiaLayer,
    "infini": InfiniLayer,
    "multi_memory": MultiMemoryLayer,
    "hierarchical": HierarchicalLayer,
}
_MODEL_OPTIONS = {"vocab_size": 50304, "num_layers": 6, "feedback_scale": None}


def model_options(name: str) -> dict[str, Any]:
    """The options of a model and their defaults.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}{_near(name, MODELS)}; models: {', '.join(MODELS)}")
    return {**_MODEL_OPTIONS, **_defaults(PythiaLayer), **_defaults(MODELS[name])}


def create_model(name: str, **options: Any) -> TransformerLM:
    """``pythia``: Pythia layers; ``infini``, ``multi_memory``, ``hierarchical``: one memory layer, then Pythia layers.

    Args:
        options: ``vocab_size`` (50,304), ``num_layers`` (6, the memory layer included), ``feedback_scale`` (None; a
            number makes a :class:`~senri.lm.feedback.FeedbackLM`), and all that the layers take; by default as
            Pythia-70M. An option goes to each layer that has it. See :func:`model_options`.

    Raises:
        ValueError: an unknown name or option, listing the valid ones; numbers that do not fit together.
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"model {name!r} has no option {option!r}{_near(option, known)}; options: {', '.join(known)}"
            )
    values = {**known, **options}
    if values["num_layers"] < 1:
        raise ValueError(f"num_layers must be >= 1, not {values['num_layers']}")
    kinds: list[type[Layer]] = [MODELS[name], *[PythiaLayer] * (values["num_layers"] - 1)]
    layers = [kind(**{option: values[option] for option in _defaults(kind)}) for kind in kinds]
    shape = layers, values["vocab_size"], values["layer_norm_eps"]
    if values["feedback_scale"] is None:
        return TransformerLM(*shape)
    return FeedbackLM(*shape, feedback_scale=values["feedback_scale"])


def _defaults(kind: type[Layer]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(kind).parameters.values()}


def _near(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
