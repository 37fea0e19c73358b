"""What comes before the first token: imports, weights, conversion."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from senri.benchmark.plan import Spec
from senri.benchmark.process import LeftOut


def load(spec: Spec) -> dict[str, Any]:
    """From the start of the process to the first token of an answer: ``import`` (the interpreter's start with it),
    ``load``, ``first_token``, in seconds.
    """
    import psutil

    before = max(time.time() - psutil.Process().create_time(), 0.0)  # in hundredths of a second
    started = time.perf_counter()
    import torch

    from senri.benchmark.rows import about, open_model

    imported = time.perf_counter()
    model, tokenizer = open_model(spec)
    loaded = time.perf_counter()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        model.generate(ids, max_new_tokens=1, do_sample=False)
    return {
        **about(model),
        "import": before + imported - started,
        "load": loaded - imported,
        "first_token": time.perf_counter() - loaded,
    }


def conversion(spec: Spec) -> dict[str, Any]:
    """Seconds of loading the unconverted base and of converting it; of the base that pip ships also ``first_call``:
    what the very first call adds, which turns the GGUF file into a copy in the user's cache.
    """
    from senri.benchmark.rows import quiet
    from senri.hf.base import BASE_NAME, load_unconverted, resolve_dtype
    from senri.hf.convert import convert_to_senri

    quiet()
    name = spec["model"]["name"]
    load_seconds, convert_seconds = [], []
    for _ in range(spec["repeats"]):
        started = time.perf_counter()
        base = load_unconverted(name)
        if base is None:
            raise LeftOut("a saved Senri model has nothing left to convert")
        base = base.to(resolve_dtype(spec["model"]["dtype"]))
        load_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        convert_to_senri(base, **spec["model"]["overrides"])
        convert_seconds.append(time.perf_counter() - started)
    return {
        "load_seconds": load_seconds,
        "convert_seconds": convert_seconds,
        "first_call": _first_call() if name == BASE_NAME else None,
    }


def _first_call() -> float | None:
    """Seconds; None where the cache is not where XDG says."""
    from senri.hf.base import base_directory

    with tempfile.TemporaryDirectory() as scratch:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = scratch
        try:
            started = time.perf_counter()
            made = base_directory()
            seconds = time.perf_counter() - started
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before
        return seconds if made.is_relative_to(Path(scratch)) else None
