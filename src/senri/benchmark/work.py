"""How much arithmetic a model has to do, whatever it is done with: counted from its shapes and the layers that run.

Counted are the matrix products of the decoder layers: those with weights, and those of exact attention with the keys
that each query sees. One multiplication and addition are 2 FLOP. What a memory does is not counted: it has to fit into
what is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from senri.hf.configuration_senri import SenriConfig
from senri.hf.fused_layer import projections
from senri.hf.int8_decoder import int8_head, int8_layers, is_next
from senri.hf.modeling_senri import SenriForCausalLM


class Work(NamedTuple):
    """FLOP, by what they are for."""

    weights: float = 0.0  # products with weights
    attention: float = 0.0  # products of queries, keys and values

    @property
    def total(self) -> float:
        """Both."""
        return self.weights + self.attention

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(self.weights + other.weights, self.attention + other.attention)

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(self.weights * factor, self.attention * factor)


def layer_shapes(config: SenriConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each product with weights in one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }


def layer_work(config: SenriConfig, tokens: int, past: int = 0) -> Work:
    """Of one layer over ``tokens`` tokens behind ``past`` others (as many as are still in the window)."""
    weights = 2 * tokens * sum(rows * columns for rows, columns in layer_shapes(config).values())
    window = config.sliding_window_size
    growing = min(max(window - past, 0), tokens)  # queries that do not see a whole window yet
    seen = growing * (2 * past + growing + 1) / 2 + (tokens - growing) * window
    return Work(weights, 2 * 2 * seen * config.num_attention_heads * config.head_dim)


def logit_work(config: SenriConfig, tokens: int) -> Work:
    """Of the language-model head over ``tokens`` tokens."""
    return Work(2.0 * tokens * config.hidden_size * config.vocab_size)


def training_work(config: SenriConfig, tokens: int, scored: int, trainable: str) -> tuple[Work, str]:
    """What a step over one text has to do at least, and in words how that is counted.

    A layer with weights that learn costs three times its forward pass: forward, gradient of its inputs, gradient of
    its weights. What is made a second time to save memory does not count.

    Args:
        tokens: of the text.
        scored: of them, tokens whose logits are needed.
        trainable: ``all`` or ``memory``.
    """
    one, layers, logits = layer_work(config, tokens), config.num_hidden_layers, logit_work(config, scored)
    if trainable == "all":
        return one.times(layers).plus(logits).times(3), "3 × (all layers and logits)"
    if config.memory_readout == "head":
        # nothing that learns lies below a layer: gradients go through the head into the memory, and end there
        return one.times(layers).plus(logits.times(2)), "all layers once, logits twice (no gradient passes a layer)"
    above = layers - min(config.memory_layers)
    return one.times(layers + above).plus(logits.times(2)), f"all layers, {above} of them twice, logits twice"


class WorkMeter:
    """Counts what the decoder layers of a model are really called with, between enter and exit."""

    def __init__(self, model: SenriForCausalLM) -> None:
        self.model = model
        self.work = Work()
        self.layer_tokens = 0  # tokens times layers
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> WorkMeter:
        self.work, self.layer_tokens = Work(), 0
        self._hooks = [layer.register_forward_pre_hook(self._count) for layer in self.model.model.layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, state = args[:2]
        batch, steps = hidden.shape[:2]
        self.work = self.work.plus(layer_work(self.model.config, steps, state.keys.shape[2]).times(batch))
        self.layer_tokens += batch * steps


@torch.no_grad()
def weight_bytes(model: SenriForCausalLM) -> int:
    """Bytes of the weights that making one token reads: all but the embeddings' other rows; a tied head counts once.

    Those that are decoded with in eight bits count as such.
    """
    seen: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        del seen[id(model.model.embed_tokens.weight)]
    total = sum(p.nbytes for p in seen.values())
    token = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    compiled, wanted = int8_layers(model.model, token), model.config.decoding_weights
    if compiled is not None:
        full = [x for layer in model.model.layers for x in projections(layer)]
        total += sum(layer.nbytes for layer in compiled.layers) - sum(x.weight.nbytes for x in full)
    head = int8_head(model.lm_head, wanted) if wanted != "full" and is_next(token) else None
    return total if head is None else total + head.nbytes - model.lm_head.weight.nbytes
