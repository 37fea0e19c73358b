"""What this machine can do at best: matrix products at the model's shapes, and reading memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.benchmark.work import layer_shapes
from senri.hf.configuration_senri import SenriConfig
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers.packed_linear import has_products

ROUNDS = 15
DTYPES = (torch.bfloat16, torch.float32)


def median_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Of several runs, after two that do not count."""
    times = []
    for number in range(rounds + 2):
        started = time.perf_counter()
        run()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.no_grad()
def matrix_rates(config: SenriConfig, tokens: int, rounds: int = ROUNDS) -> dict[str, dict[str, float | None]]:
    """FLOP/s of one layer's products with weights, all seven one after the other, ``tokens`` rows each.

    By dtype, and by kernel: ``linear`` is PyTorch's own, ``packed`` oneDNN's with weights that were laid out before
    (None where this build has none).
    """
    flop = 2 * tokens * sum(rows * columns for rows, columns in layer_shapes(config).values())
    rates: dict[str, dict[str, float | None]] = {}
    for dtype in DTYPES:
        pairs = [
            (torch.randn(tokens, rows, dtype=dtype), torch.randn(columns, rows, dtype=dtype) * rows**-0.5)
            for rows, columns in layer_shapes(config).values()
        ]
        found: dict[str, float | None] = {"linear": flop / median_seconds(lambda p=pairs: _linear(p), rounds)}  # type: ignore[misc]
        packed = _packed(pairs, tokens)
        found["packed"] = None if packed is None else flop / median_seconds(packed, rounds)
        rates[_name(dtype)] = found
    return rates


def _linear(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, weight in pairs:
        F.linear(x, weight)


def _packed(pairs: list[tuple[Tensor, Tensor]], tokens: int) -> Callable[[], object] | None:
    """The products with weights in oneDNN's own layout, as ``torch.compile`` would freeze them."""
    if not has_products():
        return None
    ready = [(x, torch.ops.mkldnn._reorder_linear_weight(weight, tokens)) for x, weight in pairs]

    def run() -> None:
        for x, weight in ready:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return run


@torch.no_grad()
def bandwidth(num_bytes: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Bytes/s of reading a buffer that no cache holds, with one thread and with all: the faster of two kernels."""
    buffer = torch.ones(num_bytes // 4)
    rates = {}
    for name, threads in (("one thread", 1), ("all threads", torch.get_num_threads())):
        with _threads(threads):
            kernels: tuple[Callable[[], object], ...] = (buffer.sum, lambda: torch.dot(buffer, buffer))
            rates[name] = num_bytes / min(median_seconds(run, rounds) for run in kernels)
    return rates


@torch.no_grad()
def vector_rate(model: SenriForCausalLM, rounds: int = ROUNDS) -> float:
    """Bytes/s of all the decoder's weights and the head's, each multiplied by one vector: decoding and nothing else."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and ".memory." not in name]
    vectors = {width: torch.randn(1, width, dtype=model.dtype) for width in {w.shape[1] for w in weights}}

    def run() -> None:
        for weight in weights:
            F.linear(vectors[weight.shape[1]], weight)

    return sum(w.numel() * w.element_size() for w in weights) / median_seconds(run, rounds)


def measure_bounds(model: SenriForCausalLM, spec: dict[str, Any]) -> dict[str, Any]:
    """The row of a run: all of the above."""
    rounds = spec.get("rounds", ROUNDS)
    return {
        "matrix": matrix_rates(model.config, spec["piece_size"], rounds),
        "bandwidth": bandwidth(spec["buffer_bytes"], rounds),
        "vector": vector_rate(model, rounds),
        "dtype": _name(model.dtype),
        "threads": torch.get_num_threads(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
