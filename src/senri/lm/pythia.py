"""Pythia's layer: rotary positions on a part of each head, softmax attention over the running segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.lm.base import KeyValues, Layer, numbers_of


class PythiaAttention(nn.Module):
    """Multi-head softmax attention, causal."""

    def __init__(self, hidden_size: int, num_heads: int, rotary_dim: int, rope_theta: float) -> None:
        super().__init__()
        self.num_heads, self.rotary_dim, self.rope_theta = num_heads, rotary_dim, rope_theta
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, state: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """``[B, T, hidden]``, what came before -> the same, T tokens later."""
        steps = hidden.shape[1]
        # a head's query, key and value stand side by side
        q, k, v = self.query_key_value(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, -1)
        past = 0 if state is None else state.keys.shape[2]
        q, k = self._rotate(q, past), self._rotate(k, past)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        mask = None
        if past and steps > 1:
            mask = torch.ones(steps, past + steps, dtype=torch.bool, device=q.device).tril(past)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past and steps > 1)
        return self.dense(out.transpose(1, 2).flatten(2)), KeyValues(k, v)

    def _rotate(self, x: Tensor, past: int) -> Tensor:
        """Rotary positions ``past, past + 1, ...`` (Su et al. 2021) on the first ``rotary_dim`` of ``[B, H, T, D]``."""
        dim = self.rotary_dim
        # always float32, operation by operation as in transformers
        rates = 1.0 / self.rope_theta ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
        angles = torch.arange(past, past + x.shape[2], device=x.device, dtype=torch.float32)[:, None] * rates
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class PythiaLayer(Layer):
    """Softmax attention with rotary positions; computes what transformers' GPTNeoX layer does.

    Args:
        hidden_size: width of the model.
        num_heads: of the attention; divides hidden_size.
        intermediate_size: of the perceptron.
        rotary_pct: share of each head that is rotated by position.

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        intermediate_size: int = 2048,
        *,
        rotary_pct: float = 0.25,
        rope_theta: float = 10000.0,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, intermediate_size, layer_norm_eps, numbers_of(locals()))
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        rotary_dim = int(hidden_size // num_heads * rotary_pct)
        if not 0 <= rotary_pct <= 1 or rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {rotary_pct} of heads of width {hidden_size // num_heads} is {rotary_dim}: it must be an "
                "even number"
            )
        self.attention = PythiaAttention(hidden_size, num_heads, rotary_dim, rope_theta)

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing was seen yet."""
        return None
