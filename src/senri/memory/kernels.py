"""GPU kernels of flash-linear-attention for rules ``delta_token`` and ``gated_delta``: optional, picked by ``scan``.

Package ``fla-core`` (Yang and Zhang 2024, https://github.com/fla-org/flash-linear-attention), imported when first used.
The other rules stay with PyTorch: fla's linear attention adds a constant to the normaliser where ``linear`` has a lower
bound, and forgets nothing; ``delta`` and ``slot`` it does not know.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from senri.memory.rules import Chunk
from senri.memory.state import Pending

RULES = ("delta_token", "gated_delta")
DEVICES = ("cuda",)
# Not float32: the kernels would round its products to TensorFloat-32 (10 bits), PyTorch's path does not.
DTYPES = (torch.bfloat16, torch.float16)
MAX_KEY_DIM = 256  # what their state kernel has registers for


@functools.cache
def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def suit(q: Tensor, stream: Pending, key_dim: int, *, rule: str, chunk_size: int) -> bool:
    """Whether the kernels can compute this call to a single memory, and have something to gain.

    Args:
        q: as given to ``scan``; stream: the pairs to write; key_dim: the feature map's width F.
    """
    return (
        q.device.type in DEVICES
        and rule in RULES
        and q.dtype in DTYPES
        and q.dtype == stream.k.dtype == stream.v.dtype
        and q.shape[1] > chunk_size  # one chunk is a few products without them
        and q.shape[2] > 0
        and key_dim <= MAX_KEY_DIM
        and key_dim % 2 == stream.v.shape[-1] % 2 == 0  # odd widths of 16 bits: Triton compiles the tails wrongly
        and _installed()
    )


def delta(M: Tensor, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`senri.memory.rules.delta_chunk` for a whole call, however long.

    Query heads that share a memory (GQA) each get a copy of it: the kernels know one query head a state.

    Args:
        M: ``[B, H, Dv, F]`` float32; chunk: of the whole call, T >= 1 steps.
        dtype: of keys, queries and values inside the kernels. Gates and the state they return are float32.

    Returns:
        output ``[B, H, G, T, Dv]`` in ``dtype``, and the new ``M`` in float32.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    group = chunk.q.shape[2]

    def heads(x: Tensor) -> Tensor:
        """``[B, H, T, ...]`` -> ``[B, T, H G, ...]``"""
        return x.repeat_interleave(group, 1).transpose(1, 2)

    # -inf - -inf is no number, and exp(-60) is 0 in every sum
    forget = torch.zeros_like(chunk.beta) if chunk.log_alpha is None else chunk.log_alpha.clamp(min=-60.0)
    out, last = chunk_gated_delta_rule(
        chunk.q.flatten(1, 2).transpose(1, 2).to(dtype),
        heads(chunk.k).to(dtype),
        heads(chunk.v).to(dtype),
        heads(forget),
        heads(chunk.beta),
        scale=1.0,
        initial_state=M.repeat_interleave(group, 1).mT,
        output_final_state=True,
    )
    return out.transpose(1, 2).unflatten(1, (-1, group)), last[:, ::group].mT.contiguous()
