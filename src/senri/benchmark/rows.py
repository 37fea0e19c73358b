"""Rows of the configured model: bounds, reading, decoding. Each function measures in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senri.benchmark.bounds import measure_bounds
from senri.benchmark.plan import Spec
from senri.benchmark.process import Peak, say_progress
from senri.benchmark.texts import book_ids
from senri.benchmark.work import WorkMeter, layer_work, weight_bytes
from senri.hf.base import load_model
from senri.hf.modeling_senri import SenriForCausalLM
from senri.hf.session_mixin import ReadProgress

WARM_UP = 2  # pieces read before the clock starts; the second is the first that defers layers
WARM_UP_TOKENS = 4  # decoded before the clock starts


def open_model(spec: Spec) -> tuple[SenriForCausalLM, Any]:
    """The configured model in ``eval()`` and its tokenizer, without a word from transformers."""
    quiet()
    model = spec["model"]
    return load_model(model["name"], model["dtype"], model["adapter"], **model["overrides"])


def quiet() -> None:
    """No bars and notes of transformers on stderr, which is for progress."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def about(model: SenriForCausalLM) -> dict[str, Any]:
    """What every row says of its model."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}


def bounds(spec: Spec) -> dict[str, Any]:
    """See :func:`senri.benchmark.bounds.measure_bounds`."""
    model, _ = open_model(spec)
    return measure_bounds(model, spec)


@torch.no_grad()
def reading(spec: Spec) -> dict[str, Any]:
    """Reading ``tokens`` tokens of ``batch`` texts at once, ``repeats`` times, by ``model.read``; then one prediction.

    Keys: ``seconds`` of each reading; ``piece_seconds`` of each whole piece of each reading; ``first_token_seconds``
    (what reading put off, and the logits of the last token); ``work`` of one reading as it was done, ``all_layers`` as
    if every layer had been computed; ``peak_bytes`` while reading.
    """
    model, tokenizer = open_model(spec)
    size, batch = spec["piece_size"], spec["batch"]
    ids = texts(spec["tokens"], batch, tokenizer)
    with session(model):
        model.read(texts(WARM_UP * size, batch, tokenizer), piece_size=size)
    seconds, pieces, first, peak_bytes, state = [], [], [], 0, 0
    meter = WorkMeter(model)
    for number in range(spec["repeats"]):
        marks = [(0, 0.0)]

        def note(now: ReadProgress, marks: list[tuple[int, float]] = marks, number: int = number) -> None:
            marks.append((now.tokens, now.seconds))
            say_progress(f"{now.tokens:,} of {spec['tokens']:,} tokens, reading {number + 1} of {spec['repeats']}")

        with session(model):
            with Peak() as peak, meter:
                seconds.append(model.read(ids, piece_size=size, progress=note).seconds)
            started = time.perf_counter()
            assert model.session is not None
            state = model.session.nbytes
            model(ids[:, -1:], logits_to_keep=1)
            first.append(time.perf_counter() - started)
        pieces.append([b[1] - a[1] for a, b in pairwise(marks) if b[0] - a[0] == size])
        peak_bytes = max(peak_bytes, peak.bytes)
    every = layer_work(model.config, spec["tokens"]).times(batch * model.config.num_hidden_layers)
    return {
        **about(model),
        "tokens": spec["tokens"],
        "batch": batch,
        "piece_size": size,
        "seconds": seconds,
        "piece_seconds": pieces,
        "first_token_seconds": first,
        "work": meter.work._asdict(),
        "all_layers": every._asdict(),
        "layers_a_token": meter.layer_tokens / (batch * spec["tokens"]),
        "layers": model.config.num_hidden_layers,
        "state_bytes": state,
        "peak_bytes": peak_bytes,
    }


def texts(tokens: int, batch: int, tokenizer: Any) -> Tensor:
    """``[batch, tokens]``: consecutive stretches of one book."""
    return book_ids(tokens * batch, tokenizer).view(batch, tokens)


@contextmanager
def session(model: SenriForCausalLM) -> Iterator[None]:
    """None is open before or after."""
    model.end_session()
    try:
        yield
    finally:
        model.end_session()


def states(spec: Spec) -> dict[str, Any]:
    """Read as far as ``decoding`` will start from, and save the memory at each of these places."""
    model, tokenizer = open_model(spec)
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    ids = book_ids(max(spec["after"]), tokenizer)
    sizes = {}
    for start, stop in pairwise([0, *spec["after"]]):
        say_progress(f"{start:,} of {len(ids):,} tokens")
        model.read(ids[start:stop], piece_size=spec["piece_size"])
        path = state_file(folder, stop)
        model.save_memory(path, tokenizer)
        sizes[str(stop)] = path.stat().st_size
    return {**about(model), "file_bytes": sizes}


def state_file(folder: Path, tokens: int) -> Path:
    """Where the memory of so many tokens is saved."""
    return folder / f"{tokens}.senri"


@torch.no_grad()
def decoding(spec: Spec) -> dict[str, Any]:
    """Making ``tokens`` tokens after a saved reading, ``repeats`` times from the same state.

    Keys: ``seconds`` of each ``generate()`` (greedy, and never at an end); ``step_seconds``: of each forward call with
    one token where nothing but ``argmax`` stands between two, so that the difference is what ``generate()`` adds;
    ``weight_bytes`` and ``state_bytes`` that a token has to read.
    """
    model, tokenizer = open_model(spec)
    path = state_file(Path(spec["folder"]), spec["after"])
    model.load_memory(path, tokenizer)
    state, last = model.get_memory_state(), book_ids(spec["after"], tokenizer)[-1:]
    model.end_session()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    seconds, steps = [], []

    def generate(tokens: int) -> Tensor:
        return model.generate(last[None], past_key_values=state.fork(), max_new_tokens=tokens, do_sample=False)

    generate(WARM_UP_TOKENS)
    with Peak() as peak:
        for _ in range(spec["repeats"]):
            started = time.perf_counter()
            out = generate(spec["tokens"])
            seconds.append(time.perf_counter() - started)
            assert out.shape[1] == 1 + spec["tokens"]
            steps += _steps(model, state.fork(), last[None], spec["tokens"])
    return {
        **about(model),
        "after": spec["after"],
        "tokens": spec["tokens"],
        "seconds": seconds,
        "step_seconds": steps,
        "weight_bytes": weight_bytes(model),
        "state_bytes": state.nbytes,
        "peak_bytes": peak.bytes,
    }


def _steps(model: SenriForCausalLM, cache: Any, token: Tensor, count: int) -> list[float]:
    """Seconds of each step."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - started)
    return times
