"""The neural memory of titans-pytorch (Behrouz et al. 2024, arXiv:2501.00663): a perceptron that learns as it reads."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

from senri.benchmark.peers.memory_layers import INSTALL, WIDTH, race

CHUNK = 64  # tokens of one update, as in the package's README
PIECE = 512  # tokens of a call: the weights after each chunk are all in memory at once


def measure(
    tokens: int, decode: int, repeats: int, heads: int = 9, chunk: int = CHUNK, piece: int = PIECE
) -> dict[str, Any]:
    """Its ``NeuralMemory`` with the package's defaults: two layers, momentum, forgetting.

    Senri's layer beside it has the rule ``gated_delta``, the nearest: it corrects and forgets. There is nothing to
    decode. See :func:`senri.benchmark.peers.memory_layers.race`.

    Args:
        heads: memories; WIDTH / heads wide each.
        chunk: tokens of one update; piece: tokens of a call.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from titans_pytorch import NeuralMemory
    except ImportError as error:
        raise ValueError(f"titans-pytorch cannot be imported ({error}): {INSTALL}") from None
    layer = NeuralMemory(WIDTH, chunk_size=chunk, dim_head=WIDTH // heads, heads=heads).eval()

    def step(hidden: Tensor, state: Any) -> Any:
        return layer(hidden, state=state)[1]

    def state_bytes(state: Any) -> int:  # the weights as learned so far and their momentum
        return sum(x.numel() * x.element_size() for part in state.states for x in part.values())

    return race(
        "titans-pytorch",
        step,
        piece,
        state_bytes,
        f"{version('titans-pytorch')}, NeuralMemory, chunks of {chunk}",
        tokens=tokens,
        repeats=repeats,
        heads=heads,
        rule="gated_delta",
    )
