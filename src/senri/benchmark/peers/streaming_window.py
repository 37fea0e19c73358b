"""StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): the same weights, a sliding window and the first tokens as sinks.

It is Senri without a memory: all layers are computed, and what leaves the window is lost.
"""

from __future__ import annotations

import time
from typing import Any

SINKS = 4  # as in the paper


def measure(tokens: int, decode: int, repeats: int) -> dict[str, Any]:
    """Read in pieces as Senri does, with the logits of the last token. See :mod:`senri.benchmark.peers`."""
    import torch

    from senri.benchmark.texts import book_ids
    from senri.hf.base import load_base
    from senri.hf.session_mixin import READ_PIECE

    model, tokenizer = load_base(adapter="none", num_memory_layers=0, num_sink_tokens=SINKS)
    ids = book_ids(tokens, tokenizer)[None]
    seconds, decode_seconds, state = [], [], 0
    with torch.no_grad():
        model.model(ids[:, :READ_PIECE], use_cache=False)
        for _ in range(repeats):
            cache = model.model.new_cache()
            started = time.perf_counter()
            for piece in ids.split(READ_PIECE, dim=1):
                hidden = model.model(piece, past_key_values=cache).last_hidden_state
            token = model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - started)
            state = cache.nbytes
            started = time.perf_counter()
            for _ in range(decode):
                token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            decode_seconds.append(time.perf_counter() - started)
    window = model.config.sliding_window_size
    return {
        "name": "streaming window",
        "tokens": tokens,
        "seconds": seconds,
        "decode_seconds": decode_seconds,
        "state_bytes": state,
        "note": f"same weights, {str(model.dtype).removeprefix('torch.')}, window {window:,}, {SINKS} sinks, no memory",
    }
