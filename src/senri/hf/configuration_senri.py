"""SenriConfig: a Llama configuration plus the window and the memory behind it."""

from __future__ import annotations

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from senri.memory.feature_maps import FEATURE_MAPS
from senri.memory.rules import RULES
from senri.memory.stores import STORES

PRESETS: dict[str, dict[str, Any]] = {
    # hidden_size and num_hidden_layers say which base a preset is for
    "smollm-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "sliding_window_size": 1024,
        "num_memory_layers": 2,
        "first_memory_layer": 10,
        "memory_layer_interval": 10,
        "memory_num_heads": 9,
        "memory_head_dim": 64,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "sliding_window_size": 4096,
        "num_memory_layers": 3,
        "first_memory_layer": 12,
        "memory_layer_interval": 4,
        "memory_num_heads": 14,
        "memory_head_dim": 64,
        "top_k_memories": 64,
    },
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "update_rule": tuple(RULES),
    "feature_map": tuple(FEATURE_MAPS),
    "store": ("single", *STORES),
    "routing": ("auto", "on", "off"),
    "routing_basis": ("identity", "hadamard", "random"),
    "memory_readout": ("layer", "head"),
    "memory_gate": ("additive", "infini"),
    "write_gate": ("none", "hidden", "surprise"),
    "decoding_weights": ("auto", "full", "int8"),
}
_AT_LEAST = {
    "sliding_window_size": 1,
    "num_sink_tokens": 0,
    "chunk_size": 1,
    "segment_size": 1,
    "num_memory_layers": 0,
    "first_memory_layer": 0,
    "memory_layer_interval": 1,
    "memory_num_heads": 1,
    "memory_num_key_value_heads": 1,
    "memory_head_dim": 1,
    "memory_num_slots": 1,
    "memory_conv_size": 0,
    "memory_context_size": 0,
    "top_k_memories": 1,
    "num_memory_banks": 1,
    "segments_per_bank": 1,
    "num_memories": 1,
}
# Keys of saved configurations and of base models' ones that PreTrainedConfig takes without a field of its own.
_PASSED_ON = {
    "name_or_path",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
}


@strict
class SenriConfig(LlamaConfig):
    r"""Configuration of [`SenriModel`]: every argument of [`LlamaConfig`], and:

    Args:
        sliding_window_size: number of most recent tokens each query attends to exactly (W).
        num_sink_tokens: first tokens of a text that stay visible behind the window (attention sinks); 0 for none.
        chunk_size: tokens the memory scan handles at once; a speed knob, never a change of result.
        segment_size: pairs between two refreshes of the `delta` rule's correction; by it banks and memories take
            turns, and ALiBi ages.
        num_memory_layers, first_memory_layer, memory_layer_interval: which layers have a memory.
        memory_num_heads, memory_num_key_value_heads, memory_head_dim: query heads, memories, their width.
        memory_num_slots: pairs that rule `slot` holds.
        update_rule: `linear` | `delta` | `delta_token` | `gated_delta` | `slot`.
        feature_map: `elu_plus_one` | `relu` | `identity` | `dpfp` | `hedgehog`; None takes the rule's own.
        store: `single` (one memory a head) | `routed` | `banks` | `multi` | `hierarchical` (see docs/stores.md).
        routing: of store `routed`. `on` reads as many memories; `off` writes many and reads them as one; `auto` trains
            as one memory and has many in `eval()`.
        routing_basis: `identity` | `hadamard` (memory_head_dim a power of two) | `random`; memory_head_dim vectors.
        top_k_memories: memories that a query of store `routed` reads.
        num_memory_banks, segments_per_bank: of store `banks`: how many, and segments written to one before the next.
        num_memories: of stores `multi` and `hierarchical`.
        memory_sharing: the first memory layer's memory serves all memory layers; the others only read it.
        use_alibi, alibi_scale: pairs fade by `exp(-alibi_scale * slope)` a segment, one slope a memory head.
        memory_readout: `layer` reads into the memory layer's residual; `head` stores token embeddings and adds the
            read at the logits (needs tied embeddings).
        memory_gate: `additive` zero-init branch, or `infini`: Infini-attention's per-head sigmoid mix.
        memory_conv_size: taps of the short causal convolution on the memory's q, k, v; 0 for none.
        memory_context_size: tokens whose attention makes each key and query, instead of the convolution; 0 for none.
        unigram_cache: whether logits are rescaled by how often each token has left the window.
        write_gate: `none` | `hidden` | `surprise` (needs tied embeddings).
        decoding_weights: for single tokens, on a CPU without gradients, in float32 or a bfloat16 that the processor has
            products for. `full`: as they are; `int8`: in eight bits, 32 to a scale and an offset, all layers in one
            compiled call; `auto`: that, if the weights were made of such levels (a GGUF file in Q4_1 or Q8_0) and
            nothing is lost. Saved and trained is what is full. What was computed token by token is then equal to
            rounding of such weights, no longer to 1e-4.
        qkv_bias: biases on the attention's q, k, v only (Qwen2).

    Raises:
        ValueError: an impossible value or combination, naming the field; an unknown argument.
    """

    model_type = "senri"

    sliding_window_size: int = 1024
    num_sink_tokens: int = 1
    chunk_size: int = 64
    decoding_weights: str = "full"
    segment_size: int = 2048
    num_memory_layers: int = 2
    first_memory_layer: int = 10
    memory_layer_interval: int = 10
    memory_num_heads: int = 9
    memory_num_key_value_heads: int | None = None
    memory_head_dim: int = 64
    memory_num_slots: int = 768
    update_rule: str = "linear"
    feature_map: str | None = None
    store: str = "single"
    routing: str = "auto"
    routing_basis: str = "identity"
    top_k_memories: int = 64
    num_memory_banks: int = 2
    segments_per_bank: int = 4
    num_memories: int = 4
    memory_sharing: bool = False
    use_alibi: bool = False
    alibi_scale: float = 1.0
    memory_readout: str = "layer"
    memory_gate: str = "additive"
    memory_conv_size: int = 0
    memory_context_size: int = 0
    unigram_cache: bool = False
    write_gate: str = "none"
    qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        known = set(PreTrainedConfig().to_dict()) | set(self.__dataclass_fields__) | _PASSED_ON
        for name in kwargs:
            if name not in known and not name.startswith("_"):
                near = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"SenriConfig has no field {name!r}{hint}")
        if self.memory_num_key_value_heads is None:
            self.memory_num_key_value_heads = self.memory_num_heads
        super().__post_init__(**kwargs)
        self.validate_memory()  # here too, as a ValueError: @strict's own error is none

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does, which sets the overrides in ``kwargs`` without a check: they are checked here."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).validate_memory()
        return made

    @property
    def memory_layers(self) -> list[int]:
        """Indices of the layers that have a memory."""
        start, step = self.first_memory_layer, self.memory_layer_interval
        return [start + i * step for i in range(self.num_memory_layers)]

    def validate_memory(self) -> None:
        """Part of `@strict`'s validation: rejects what cannot work, naming the field."""
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name in ("memory_sharing", "use_alibi"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.alibi_scale, int | float) or not 0 < self.alibi_scale < math.inf:
            raise ValueError(f"alibi_scale must be a number above 0, not {self.alibi_scale!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "feature_map" and value is None):
                raise ValueError(f"{name} {value!r} is not one of: {', '.join(choices)}")
        if self.num_memory_layers and self.memory_layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"memory layers {self.memory_layers} do not fit into {self.num_hidden_layers} layers: lower "
                "first_memory_layer, memory_layer_interval or num_memory_layers"
            )
        assert self.memory_num_key_value_heads is not None
        if self.memory_num_heads % self.memory_num_key_value_heads:
            raise ValueError(
                f"memory_num_heads ({self.memory_num_heads}) must be a multiple of memory_num_key_value_heads "
                f"({self.memory_num_key_value_heads})"
            )
        self._validate_store()
        self._validate_combinations()

    def _validate_store(self) -> None:
        """Store, sharing and ALiBi against the rule and each other."""
        kind = STORES.get(self.store)
        if kind is not None and self.update_rule not in kind.rules:
            others = ["single", *(name for name, other in STORES.items() if self.update_rule in other.rules)]
            raise ValueError(
                f"store {self.store!r} works with update_rule: {', '.join(kind.rules)}; "
                f"update_rule {self.update_rule!r} works with store: {', '.join(others)}"
            )
        width = self.memory_head_dim
        if self.store == "routed" and self.routing_basis == "hadamard" and width & (width - 1):
            raise ValueError(
                f"routing_basis 'hadamard' needs a memory_head_dim that is a power of two, not {width}: change it, or "
                "take 'identity' or 'random'"
            )
        if self.memory_sharing and self.num_memory_layers < 2:
            raise ValueError(f"memory_sharing needs num_memory_layers of at least 2, not {self.num_memory_layers}")
        if self.use_alibi and not RULES[self.update_rule].forgets:
            forgets = ", ".join(name for name, rule in RULES.items() if rule.forgets)
            raise ValueError(f"use_alibi needs an update_rule that forgets: {forgets}; {self.update_rule!r} does not")

    def _validate_combinations(self) -> None:
        if RULES[self.update_rule].normalised and self.feature_map == "identity":
            raise ValueError(
                f"feature_map 'identity' can be negative, so update_rule {self.update_rule!r} cannot divide by z"
            )
        if self.memory_conv_size == 1:
            raise ValueError("memory_conv_size 1 convolves nothing: use 0 (none) or at least 2")
        for name in ("memory_conv_size", "memory_context_size"):
            if self.sliding_window_size < getattr(self, name):
                raise ValueError(f"sliding_window_size must be at least {name}")
        if self.memory_conv_size and self.memory_context_size:
            raise ValueError("memory_conv_size and memory_context_size both make the keys: set one of them to 0")
        for name in ("memory_readout", "write_gate"):
            value = getattr(self, name)
            if value in ("head", "surprise") and not self.tie_word_embeddings:
                raise ValueError(
                    f"{name} {value!r} needs tie_word_embeddings=True: it works through the tied embedding"
                )
        if self.memory_gate == "infini":
            if self.memory_readout != "layer":
                raise ValueError("memory_gate 'infini' mixes into the attention heads: it needs memory_readout 'layer'")
            attention = (self.num_attention_heads, self.head_dim)
            if (self.memory_num_heads, self.memory_head_dim) != attention:
                raise ValueError(
                    "memory_gate 'infini' needs memory_num_heads and memory_head_dim equal to the attention's: "
                    f"{attention}"
                )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_parameters: rope_type {rope_type!r} depends on the length read; it cannot be streamed"
            )


def preset_for(base: PreTrainedConfig) -> dict[str, Any]:
    """The memory settings for a base model: its preset's, or the same proportions for a model without one."""
    for preset in PRESETS.values():
        if (preset["hidden_size"], preset["num_hidden_layers"]) == (base.hidden_size, base.num_hidden_layers):
            return {k: v for k, v in preset.items() if k not in ("hidden_size", "num_hidden_layers")}
    third = max(base.num_hidden_layers // 3, 1)
    return {
        "num_memory_layers": min(2, max(base.num_hidden_layers - third, 1)),
        "first_memory_layer": min(third, base.num_hidden_layers - 1),
        "memory_layer_interval": third,
        "memory_num_heads": base.num_attention_heads,
        "memory_head_dim": getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
    }
