"""Attention sinks: the first tokens of a text, which every query goes on seeing once they have left its window.

A pretrained model rests much of its attention on the first token; a window that loses it loses the model (Xiao et al.
2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453). A sink that has left the window is
read at a constant distance, as if the sinks stood in order right behind the window: sink ``i`` of ``S`` at
``W + S - 1 - i``. At its true distance the rotary positions would leave the range that the model was trained on.

Shapes: ``B`` batch, ``H`` query heads, ``Hkv`` key heads, ``T`` new tokens, ``S`` sinks, ``D`` head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8  # head widths that fused kernels take are multiples of it


class Sinks(NamedTuple):
    """What the queries of one layer see behind their window."""

    queries: Tensor  # [B, H, T, D], not rotated
    keys: Tensor  # [B, Hkv, S, D], rotated back by their constant distance
    values: Tensor  # [B, Hkv, S, D]


class NewSinks(NamedTuple):
    """The sinks among the new tokens of one forward call; the same for all layers."""

    column: Tensor  # [B, S] int64: where each stands among the new tokens
    fresh: Tensor  # [B, S] bool; False: it came before, or will come

    def take(self, x: Tensor) -> Tensor:
        """Their part of the new tokens' ``x`` ``[B, Hkv, T, D]``: ``[B, Hkv, S, D]``, of no meaning where not fresh."""
        return x.gather(2, self.column[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def put(self, old: Tensor, taken: Tensor) -> Tensor:
        """``old`` ``[B, Hkv, S, D]`` with ``taken`` where fresh."""
        return torch.where(self.fresh[:, None, :, None], taken, old)


def sinks_behind(index: Tensor, num_sinks: int, window: int) -> Tensor | None:
    """Which sinks have left each query's window: ``[B, T, S]`` bool; None: none of any query's.

    Args:
        index: ``[B, T]``, number of each token in its text; padding has that of the token before it.
    """
    behind = index[..., None] - torch.arange(num_sinks, device=index.device) >= window
    return behind if behind.any() else None


def new_sinks(index: Tensor, valid: Tensor, num_sinks: int) -> NewSinks | None:
    """The sinks among the new tokens, None where there are none; ``index`` as above, ``valid`` ``[B, T]`` bool."""
    found = valid[..., None] & (index[..., None] == torch.arange(num_sinks, device=index.device))
    return NewSinks(found.int().argmax(1), found.any(1)) if found.any() else None


def with_scores(q: Tensor, sinks: Sinks) -> Tensor:
    """Queries ``[B, H, T, D']`` that bring their scores with the sinks along.

    A key has one rotation for all queries; a sink at a constant distance would need another for each. So the sinks'
    scores are computed from the unrotated queries and become further dimensions of the heads: ``q' = [q, scores]``,
    ``k' = [k, 0]``, and sink ``i`` is the unit vector ``[0, e_i]`` (:func:`join`): a key like all others.
    """
    full = torch.promote_types(q.dtype, torch.float32)
    queries = sinks.queries.unflatten(1, (sinks.keys.shape[1], -1)).to(full)
    # no matrix product: autocast would round it
    scores = (queries[..., None, :] * sinks.keys[:, :, None, None].to(full)).sum(-1).flatten(1, 2)
    # in two parts, so that half precision keeps enough of a large score; the gradient goes through the second
    coarse = scores.detach().bfloat16().to(full)
    wide = torch.cat([q, coarse.to(q.dtype), (scores - coarse).to(q.dtype)], -1)
    return F.pad(wide, (0, -wide.shape[-1] % ALIGNMENT))


def join(k: Tensor, v: Tensor, sinks: Sinks, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hkv, K, D]`` with the sinks before them, in heads of ``width``: ``[B, Hkv, S + K, D']``."""
    num_sinks, head_dim = sinks.keys.shape[2:]
    pad = (0, width - head_dim, num_sinks, 0)
    key, value = F.pad(k, pad), F.pad(v, pad)
    unit = torch.eye(num_sinks, dtype=k.dtype, device=k.device).repeat(1, 2)
    key[:, :, :num_sinks, head_dim : head_dim + 2 * num_sinks] = unit
    value[:, :, :num_sinks, :head_dim] = sinks.values
    return key, value
