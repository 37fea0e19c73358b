"""What runs inside the environment that llama.cpp is compiled in: only the standard library, numpy and llama_cpp.

``python -I llama_cpp_script.py '<settings as JSON>'`` prints one line of JSON. Settings:

* ``gguf``: the model; ``ids``: a ``.npy`` file with the int32 ids of the text's tokens;
* ``tokens``, ``decode``, ``repeats``: how many tokens to read, then to decode greedily, and how often;
* ``threads``, ``n_batch``, ``n_ubatch``, ``flash_attention``: as llama.cpp means them;
* ``logits``: instead of timing, a ``.npy`` file to write the logits of all positions to, ``[tokens, vocabulary]``.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from typing import Any

import numpy as np

WARM_UP = 512  # tokens read before the clock starts: maps the weights, starts the threads
SETTINGS: dict[str, Any] = {
    "gguf": str,
    "ids": str,
    "tokens": int,
    "decode": int,
    "repeats": int,
    "threads": int,
    "n_batch": int,
    "n_ubatch": int,
    "flash_attention": bool,
    "logits": (str, type(None)),
}


def parse(arguments: list[str]) -> dict[str, Any]:
    """The settings of the command line.

    Raises:
        ValueError: no JSON object, an unknown, missing or impossible setting.
    """
    if len(arguments) != 1:
        raise ValueError("give one argument, the settings as JSON")
    try:
        settings = json.loads(arguments[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"the settings are no JSON: {error}") from None
    if not isinstance(settings, dict) or settings.keys() != SETTINGS.keys():
        raise ValueError(f"the settings must be exactly: {', '.join(SETTINGS)}")
    for name, kind in SETTINGS.items():
        value = settings[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} cannot be {value!r}")
        least = 0 if name == "decode" else 1
        if kind is int and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    return settings


class Reader:
    """A model and its context; the text is in the cache of keys and values as far as it was read."""

    def __init__(self, settings: dict[str, Any], all_logits: bool) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.silent = api.llama_log_callback(lambda *_: None)  # kept: C calls it
        api.llama_log_set(self.silent, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(settings["gguf"].encode(), api.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {settings['gguf']}")
        how = api.llama_context_default_params()
        how.n_ctx = settings["tokens"] + settings["decode"]
        how.n_batch = settings["tokens"] if all_logits else settings["n_batch"]
        how.n_ubatch = settings["n_ubatch"]
        how.n_threads = how.n_threads_batch = settings["threads"]
        how.flash_attn_type = int(settings["flash_attention"])
        self.context = api.llama_init_from_model(self.model, how)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {how.n_ctx} tokens: too little memory?")
        self.n_batch = how.n_batch
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        """Empty the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def read(self, ids: np.ndarray) -> None:
        """Read ``ids`` after what was read; logits of each batch's last token only."""
        for start in range(0, len(ids), self.n_batch):
            piece = np.ascontiguousarray(ids[start : start + self.n_batch], dtype=np.int32)
            pointer = piece.ctypes.data_as(ctypes.POINTER(self.api.llama_token))
            self._decode(self.api.llama_batch_get_one(pointer, len(piece)))
        self.api.llama_synchronize(self.context)

    def _decode(self, batch: Any) -> None:
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise ValueError(f"llama_decode failed with status {status}")

    def last_logits(self) -> np.ndarray:
        """``[vocabulary]`` after the last token that was read; a view that the next call overwrites."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """``[tokens, vocabulary]`` of a text read in one batch."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        self._decode(batch)
        rows = [self.api.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        logits = np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])
        self.api.llama_batch_free(batch)
        return logits

    def state_bytes(self) -> int:
        """Size of what was read: keys and values of the cells in use, as llama.cpp would save them."""
        return self.api.llama_state_seq_get_size(self.context, 0)

    def about(self) -> str:
        """Version of the binding, and what llama.cpp says of the processor."""
        flags = [flag.strip() for flag in self.api.llama_print_system_info().decode().split("|")]
        on = [flag.removesuffix(" = 1") for flag in flags if flag.endswith(" = 1")]
        return f"llama-cpp-python {self.api.__version__}; {', '.join(on)}"


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of reading and of decoding, and what they took.

    Raises:
        ValueError: too few ids, a model that llama.cpp does not load, or one too large.
    """
    ids = np.load(settings["ids"])[: settings["tokens"]]
    if len(ids) < settings["tokens"]:
        raise ValueError(f"{settings['ids']} holds {len(ids)} tokens, fewer than {settings['tokens']}")
    reader = Reader(settings, settings["logits"] is not None)
    result: dict[str, Any] = {"about": reader.about()}
    if settings["logits"] is not None:
        np.save(settings["logits"], reader.all_logits(ids))
        return result
    reader.read(ids[:WARM_UP])
    result |= {"seconds": [], "decode_seconds": []}
    for _ in range(settings["repeats"]):
        reader.forget()
        started = time.perf_counter()
        reader.read(ids)
        result["seconds"].append(time.perf_counter() - started)
        result["state_bytes"] = reader.state_bytes()
        if not settings["decode"]:
            continue
        started = time.perf_counter()
        for _ in range(settings["decode"]):
            reader.read(np.array([reader.last_logits().argmax()]))
        result["decode_seconds"].append(time.perf_counter() - started)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


if __name__ == "__main__":
    try:
        print(json.dumps(measure(parse(sys.argv[1:]))))
    except (ImportError, OSError, ValueError) as problem:
        sys.exit(" ".join(str(problem).split()))
