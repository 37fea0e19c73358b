"""Transformers' own Llama with the weights that Senri starts from: full attention, a cache that grows."""

from __future__ import annotations

import time
from typing import Any

WARM_UP = 1024  # tokens


def measure(tokens: int, decode: int, repeats: int) -> dict[str, Any]:
    """Read in one call, which is its fastest way: logits of the last token alone. See :mod:`senri.benchmark.peers`."""
    import torch
    from transformers import LlamaForCausalLM

    from senri.benchmark.texts import book_ids
    from senri.hf.base import base_directory, load_tokenizer, resolve_dtype

    place, dtype = base_directory(), resolve_dtype("auto")
    ids = book_ids(tokens, load_tokenizer(place))[None]
    model = LlamaForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="sdpa").eval()
    seconds, decode_seconds, state = [], [], 0
    with torch.no_grad():
        model(ids[:, :WARM_UP], logits_to_keep=1)
        for _ in range(repeats):
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - started)
            cache = out.past_key_values
            state = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
            started = time.perf_counter()
            for _ in range(decode):
                logits = model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            decode_seconds.append(time.perf_counter() - started)
            del out, cache
    return {
        "name": "full attention",
        "tokens": tokens,
        "seconds": seconds,
        "decode_seconds": decode_seconds,
        "state_bytes": state,
        "note": f"transformers, same weights, {str(dtype).removeprefix('torch.')}, sdpa",
    }
