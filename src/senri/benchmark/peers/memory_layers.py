"""Memory layers side by side: one layer of another package and Senri's own at the same width, in one process.

Both read the same inputs in float32 without gradients: the embeddings of a real text's tokens, normalised as a decoder
layer's input is. Only the layer's calls are timed, and the two take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from senri.benchmark.texts import book_ids
from senri.hf.base import base_directory, load_tokenizer
from senri.hf.session_mixin import READ_PIECE
from senri.layers import MemoryAttention, MemoryStream
from senri.memory.state import nbytes

Step = Callable[[Tensor, Any], Any]  # the layer's input [1, T, hidden] and the state before -> the state after
WIDTH = 576  # of the base model
WARM_UP = 2  # pieces
WINDOW = 1  # the window only delays what is written: here as good as not at all, so that every token is
INSTALL = "pip install 'senri[bench-peers]'"


@torch.no_grad()
def race(
    name: str,
    step: Step,
    piece: int,
    state_bytes: Callable[[Any], int],
    note: str,
    *,
    tokens: int,
    repeats: int,
    heads: int,
    rule: str,
) -> dict[str, Any]:
    """The result of a peer (see :mod:`senri.benchmark.peers`).

    Args:
        step: one call of the peer's layer, reads and all; piece: tokens of each call.
        state_bytes: of the state that the last call returned.
        heads, rule: of Senri's layer, as of the peer's.

    Returns:
        what every peer returns, and ``senri_seconds``, ``senri_state_bytes`` and ``senri_note``.
    """
    hidden = layer_inputs(tokens)
    senri_step = _senri(heads, rule)
    _read(step, hidden[:, : WARM_UP * piece], piece)
    _read(senri_step, hidden[:, : WARM_UP * READ_PIECE], READ_PIECE)
    seconds, senri_seconds = [], []
    for _ in range(repeats):
        taken, state = _read(step, hidden, piece)
        seconds.append(taken)
        taken, senri_state = _read(senri_step, hidden, READ_PIECE)
        senri_seconds.append(taken)
    shape = f"{heads} x {WIDTH // heads} wide, float32"
    return {
        "name": name,
        "tokens": tokens,
        "seconds": seconds,
        "decode_seconds": [],
        "state_bytes": state_bytes(state),
        "note": f"{note}; {shape}, {piece} tokens a call, {torch.get_num_threads()} threads",
        "senri_seconds": senri_seconds,
        "senri_state_bytes": nbytes(senri_state[0].memory),
        "senri_note": f"MemoryAttention, rule {rule}; {shape}, {READ_PIECE} tokens a call",
    }


def layer_inputs(tokens: int) -> Tensor:
    """``[1, tokens, WIDTH]`` float32: embeddings of a text, each of root mean square 1."""
    place = base_directory()
    ids = book_ids(tokens, load_tokenizer(place))
    with safe_open(place / "model.safetensors", "pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    found = F.embedding(ids, embedding)[None].float()
    return F.rms_norm(found, found.shape[-1:])


def _read(step: Step, hidden: Tensor, piece: int) -> tuple[float, Any]:
    """Seconds of reading all of ``hidden`` from an empty state, and the last state."""
    state = None
    started = time.perf_counter()
    for part in hidden.split(piece, dim=1):
        state = step(part, state)
    return time.perf_counter() - started, state


def _senri(heads: int, rule: str) -> Step:
    layer = MemoryAttention(WIDTH, heads, heads, WIDTH // heads, WINDOW, rule=rule).eval()

    def step(hidden: Tensor, state: Any) -> Any:
        if state is None:
            state = layer.init_state(1, hidden.dtype, hidden.device), torch.zeros(1, WINDOW, dtype=torch.bool)
        before, valid = state
        valid = torch.cat([valid, valid.new_ones(hidden.shape[:2])], 1)
        _, after = layer(hidden, MemoryStream(valid, None, None), before)
        return after, valid[:, -WINDOW:]

    return step
