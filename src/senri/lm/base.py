"""What all layers have in common: Pythia's parallel residual block around something that looks at the past."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from senri.memory.state import MemoryState, map_tensors, nbytes


class KeyValues(NamedTuple):
    """What softmax attention saw of the running segment."""

    keys: Tensor  # [B, H, P, D], rotated
    values: Tensor  # [B, H, P, D]


LayerState = KeyValues | MemoryState | None  # None: softmax attention at the start of a segment


class ModelState(NamedTuple):
    """What a model carries between calls, a part a layer; replaced by every call and never written in place.

    The memories have a fixed size and last; keys and values grow with the segment and end with it.
    """

    layers: tuple[LayerState, ...]
    fed_back: Tensor | None = None  # [B, hidden] what a FeedbackLM feeds to the next token

    def next_segment(self) -> ModelState:
        """Keys and values forgotten: the next token begins a segment, at position 0 of softmax attention."""
        return self._replace(layers=tuple(layer if isinstance(layer, MemoryState) else None for layer in self.layers))

    def detach(self) -> ModelState:
        """The same state, cut from the graph."""
        return map_tensors(lambda t: t.detach(), self)

    def to(self, device: torch.device | str) -> ModelState:
        """The same state on another device."""
        return map_tensors(lambda t: t.to(device), self)

    @property
    def nbytes(self) -> int:
        """Bytes that all of it takes."""
        return nbytes(self)


class MLP(nn.Module):
    """Two projections with GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size)
        self.act = nn.GELU()
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` -> the same."""
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden)))


class Layer(nn.Module, ABC):
    """``x + attention(norm(x)) + mlp(norm'(x))`` (GPT-NeoX, Black et al. 2022, section 2.1). Modules are named as in
    transformers' GPTNeoX, so that its weights fit.

    Args:
        hidden_size: width of the model.
        intermediate_size: of the perceptron.
        numbers: everything that the layer was built from, for saved states and runs.
    """

    attention: nn.Module

    def __init__(
        self, hidden_size: int, intermediate_size: int, layer_norm_eps: float, numbers: dict[str, Any]
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.numbers = {"type": type(self).__name__, **numbers}
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size)

    @abstractmethod
    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """The state before any text."""

    def forward(self, hidden: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """``[B, T, hidden]`` and the state -> the same after T more tokens."""
        attended, state = self.attention(self.input_layernorm(hidden), state)
        return self.mlp(self.post_attention_layernorm(hidden)) + attended + hidden, state


def numbers_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor from its ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
