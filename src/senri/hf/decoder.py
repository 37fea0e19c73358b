"""One Senri decoder layer: Llama's (or Qwen2's) with windowed attention, and a memory in some layers.

Parameter names are the base model's, so that its weights load as they are; what is new lives under ``memory``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from senri.hf.cache import LayerState
from senri.hf.configuration_senri import SenriConfig
from senri.hf.fused_layer import can_fuse, fused
from senri.layers import (
    MemoryAttention,
    MemoryStream,
    NewSinks,
    PackedWeights,
    Sinks,
    WindowPlan,
    Writing,
    append,
    sliding_window_attention,
)
from senri.memory import Banks, Hierarchical, Multi, Routed, Store, orthogonal_basis


class SenriRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary angles, exact at any position.

    Below ``max_position_embeddings`` the base model's own float32 arithmetic, bit for bit. Beyond it float32 angles
    lose their phase (at a million tokens the spacing of float32 is 0.06 rad), so they are formed in float64.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # .to(bfloat16) must not round the frequencies: from_pretrained() keeps them in float32 too
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, T, D]`` for ``position_ids`` ``[B, T]``."""
        inv_freq = self.inv_freq.to(x.device)
        angles = position_ids[..., None].float() * inv_freq.float()
        exact = (position_ids[..., None].double() * inv_freq.double()) % (2 * torch.pi)
        angles = torch.where(position_ids[..., None] < self.max_seq_len_cached, angles, exact.float())
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def sinks(self, x: Tensor, num_sinks: int, window: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[1, S, D]`` that rotate the sinks' keys back by their distance from an unrotated query."""
        distance = window + torch.arange(num_sinks - 1, -1, -1, device=x.device)
        cos, sin = self(x, distance[None])
        # the query brings no attention_scaling of its own
        return cos * self.attention_scaling, -sin * self.attention_scaling


class AttentionPlan(NamedTuple):
    """What one forward call's attention is, the same for all layers."""

    window: WindowPlan
    rotary: tuple[Tensor, Tensor]  # cos and sin [B, T, D] of the new tokens
    new_sinks: NewSinks | None
    sink_rotary: tuple[Tensor, Tensor]  # cos and sin [1, S, D]


class SenriAttention(nn.Module):
    """Sliding-window attention with rotary positions and sinks; optionally mixed per head with a memory's read."""

    def __init__(self, config: SenriConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.sliding_window_size
        self.dropout = config.attention_dropout
        heads, kv_heads = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden: Tensor,
        state: LayerState,
        plan: AttentionPlan,
        memory_read: Tensor | None = None,
        memory_weight: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """``hidden`` ``[B, T, hidden]`` -> output of the same shape, and the state with the new window and sinks.

        With ``memory_read`` ``[B, T, H, D]`` and ``memory_weight`` g ``[B, T, H, 1]``: ``g * read + (1 - g) *
        attention`` before the output projection (Munkhdalai et al. 2024, eq. 6).
        """

        raw_q, raw_k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(raw_q, raw_k, *plan.rotary)
        out, new_state = self.attend(q, k, v, raw_q, raw_k, state, plan)
        if memory_read is not None and memory_weight is not None:
            out = memory_weight * memory_read + (1 - memory_weight) * out
        return self.o_proj(out.reshape(*hidden.shape[:2], -1)), new_state

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, raw_q: Tensor, raw_k: Tensor, state: LayerState, plan: AttentionPlan
    ) -> tuple[Tensor, LayerState]:
        """Rotated ``q`` ``[B, H, T, D]``, ``k``, ``v`` ``[B, Hkv, T, D]`` and the unrotated ones -> ``[B, T, H, D]``,
        and the state with the new window and sinks.
        """
        sinks = self._sinks(state, plan, raw_q, raw_k, v)
        keys, kept_keys = append(state.keys, k, self.window - 1)
        values, kept_values = append(state.values, v, self.window - 1)
        dropout = self.dropout if self.training else 0.0
        out = sliding_window_attention(
            q, keys, values, plan.window, scale=self.head_dim**-0.5, dropout=dropout, sinks=sinks
        )
        new_state = state._replace(keys=kept_keys, values=kept_values, sink_keys=sinks.keys, sink_values=sinks.values)
        return out.transpose(1, 2), new_state

    def _sinks(self, state: LayerState, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> Sinks:
        """The sinks with those that are among the new tokens; q, k before their rotation."""
        new = plan.new_sinks
        if new is None:
            return Sinks(q, state.sink_keys, state.sink_values)
        taken = new.take(k)
        rotated, _ = apply_rotary_pos_emb(taken, taken, *plan.sink_rotary)
        return Sinks(q, new.put(state.sink_keys, rotated), new.put(state.sink_values, new.take(v)))


class SenriDecoderLayer(nn.Module):
    """Pre-norm decoder layer; pure in its state: ``(hidden, state) -> (hidden, state)``."""

    def __init__(self, config: SenriConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SenriAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.shares = config.memory_sharing
        self.hidden_act = config.hidden_act
        self.packed = PackedWeights()
        self.memory = build_memory(config, layer_idx) if layer_idx in config.memory_layers else None

    def forward(
        self,
        hidden: Tensor,
        state: LayerState,
        plan: AttentionPlan,
        stream: MemoryStream,
        shared: Writing | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerState, Writing | None]:
        """Returns the new hidden states, the memory's input where the read-out waits for the head, the new state, and
        what the memory writes; ``shared``: that of the layer whose memory this one only reads.
        """
        if can_fuse(self, hidden, plan):
            hidden, normed, new_state = fused(self, hidden, state, plan)
            waits = self.memory is not None and state.memory is not None
            return hidden, normed if waits else None, new_state, shared if self.shares else None
        normed = self.input_layernorm(hidden)
        read, weight, added, memory_state, waiting = None, None, None, state.memory, None
        if self.memory is not None and state.memory is not None:
            if self.memory.readout == "head":
                waiting = normed
            else:
                if self.memory.writes:
                    shared = self.memory.writing(normed, stream, state.memory)
                assert shared is not None
                out, memory_state = self.memory(normed, stream, state.memory, writing=shared)
                if self.memory.readout == "mix":
                    read = out
                    # an empty memory must not dilute the attention
                    filled = self.memory.read_mask(shared)
                    weight = self.memory.mix_gate.sigmoid().to(read.dtype)[:, None] * filled[..., None, None]
                else:
                    added = out
        attended, new_state = self.self_attn(normed, state, plan, read, weight)
        hidden = hidden + attended
        if added is not None:
            hidden = hidden + added
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden, waiting, new_state._replace(memory=memory_state), shared if self.shares else None


def build_store(config: SenriConfig) -> Store | None:
    """The configured store; None: a single memory."""
    if config.store == "routed":
        with torch.device("cpu"):  # the basis has numbers even while a model is made without any
            basis = orthogonal_basis(config.routing_basis, config.memory_head_dim)
        return Routed(basis, config.top_k_memories, routing=config.routing != "off")
    if config.store == "banks":
        return Banks(config.num_memory_banks, config.segments_per_bank)
    if config.store == "multi":
        return Multi(config.num_memories)
    return Hierarchical(config.num_memories) if config.store == "hierarchical" else None


def build_memory(config: SenriConfig, layer_idx: int) -> MemoryAttention:
    """A memory layer from the configuration's numbers."""
    assert config.memory_num_key_value_heads is not None
    return MemoryAttention(
        config.hidden_size,
        config.memory_num_heads,
        config.memory_num_key_value_heads,
        config.memory_head_dim,
        config.sliding_window_size,
        rule=config.update_rule,
        feature_map=config.feature_map,
        chunk_size=config.chunk_size,
        segment_size=config.segment_size,
        num_slots=config.memory_num_slots,
        conv_size=config.memory_conv_size,
        context_size=config.memory_context_size,
        context_heads=math.gcd(config.num_attention_heads, config.memory_num_key_value_heads * config.memory_head_dim),
        write_gate=config.write_gate,
        readout="mix" if config.memory_gate == "infini" else config.memory_readout,
        store=build_store(config),
        trained_as_one=config.store == "routed" and config.routing == "auto",
        alibi_scale=config.alibi_scale if config.use_alibi else None,
        writes=layer_idx == config.memory_layers[0] or not config.memory_sharing,
        end_token=_end_token(config),
    )


def _end_token(config: SenriConfig) -> int | None:
    """The token that ends a chat turn; of several, as Llama has them, the last."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return ends[-1] if ends else None
