"""The compressive memory of infini-transformer-pytorch (Munkhdalai et al. 2024, arXiv:2404.07143)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

from senri.benchmark.peers.memory_layers import INSTALL, WIDTH, Step, race

SEGMENT = 512  # the default of the package's InfiniTransformerWrapper


def measure(tokens: int, decode: int, repeats: int, heads: int = 9, segment: int = SEGMENT) -> dict[str, Any]:
    """One of its attention layers without the attention: norm, projections, memory (delta rule), output projection.

    Senri's layer beside it has the rule ``delta``, which is this one. There is nothing to decode. See
    :func:`senri.benchmark.peers.memory_layers.race`.

    Args:
        heads: memories; WIDTH / heads wide each.
        segment: tokens that are written at once.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from infini_transformer_pytorch.infini_transformer import CausalAttention
    except ImportError as error:
        raise ValueError(f"infini-transformer-pytorch cannot be imported ({error}): {INSTALL}") from None
    layer = CausalAttention(WIDTH, dim_head=WIDTH // heads, heads=heads, use_mem_delta_rule=True).eval()

    return race(
        "infini-transformer-pytorch",
        memory_step(layer),
        segment,
        lambda state: sum(x.numel() * x.element_size() for x in state),
        f"{version('infini-transformer-pytorch')}, a layer without its attention, delta rule",
        tokens=tokens,
        repeats=repeats,
        heads=heads,
        rule="delta",
    )


def memory_step(layer: Any) -> Step:
    """``forward`` of a CausalAttention that returns new memories; its values stand in for what attention found."""

    def step(hidden: Tensor, state: Any) -> Any:
        q, k, v = layer.split_heads(layer.to_qkv(layer.norm(hidden)))
        layer.to_out(layer.merge_heads(layer.fastweight_mem.retrieve_and_add_to_output(v, q, state)))
        return layer.fastweight_mem.create_new_memories(k, v, state)

    return step
