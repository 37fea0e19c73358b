"""What each fast path of Senri gives over the plain one, on the real base and a real text, in one run.

``python benchmarks/fast_paths.py`` (some minutes on two idle cores, no options). Reading and decoding with the paths
switched on in turn, several rounds; and products of one token with weights of the model's shapes in each format that
PyTorch has. Medians; the tables go to the terminal and to runs/benchmarks/fast_paths.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import senri.hf.decoder as decoder
import senri.hf.model as hf_model
import senri.hf.modeling_senri as modeling
import senri.layers.sliding_window as sliding
from senri import load_base
from senri.data import iter_bible, iter_pieces, iter_tokens
from senri.layers import PackedLinear
from senri.layers.int8_step import Int8Linear
from senri.layers.packed_linear import has_products

ROUNDS, READ, DECODE, WARM_UP = 5, 4096, 32, 4096
EVICT = 64_000_000  # bytes of weights gone through between two uses of one, so that none stays in a cache


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def never(*_args: object, **_kwargs: object) -> None:
    """In place of what chooses a fast path."""


INT8 = [(hf_model, "int8_layers"), (modeling, "is_next")]
LAYERS = [(decoder, "can_fuse"), (modeling, "packs"), *INT8]
PATHS = {  # and what is switched off
    "plain layers, PyTorch's attention kernel": [(sliding, "products_dtype"), *LAYERS],
    "and attention by products": LAYERS,
    "and fused layers (bfloat16: packed)": INT8,
    "and compiled layers with weights in eight bits while decoding": [],
}


@torch.no_grad()
def whole_model() -> list[dict[str, object]]:
    """Tokens/s of reading and milliseconds a token of decoding, by path."""
    model, tokenizer = load_base(decoding_weights="int8")
    ids = torch.tensor(next(iter_pieces(iter_tokens(iter_bible(), tokenizer), WARM_UP + READ + 1)))
    model.read(ids[:WARM_UP])
    state = model.get_memory_state()
    model.model.catch_up(state)  # or each decoding would begin with it

    def read() -> None:
        model.set_memory_state(state)
        model.read(ids[WARM_UP:-1])

    def decode() -> None:
        cache, token = state.fork(), ids[None, -1:]
        for _ in range(DECODE):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    times: dict[str, dict[str, list[float]]] = {path: {"reading": [], "decoding": []} for path in PATHS}
    for number in range(ROUNDS + 1):
        for path, switched_off in PATHS.items():
            patches = [patch.object(module, name, never) for module, name in switched_off]
            for each in patches:
                each.start()
            found = {"reading": seconds(read), "decoding": seconds(decode)}
            for each in patches:
                each.stop()
            for name, value in found.items():
                if number:  # the first round packs
                    times[path][name].append(value)
    return [
        {
            "path": path,
            "reading_tokens_per_second": READ / statistics.median(of["reading"]),
            "decoding_ms_per_token": 1e3 * statistics.median(of["decoding"]) / DECODE,
        }
        for path, of in times.items()
    ]


@torch.no_grad()
def products() -> list[dict[str, object]]:
    """Microseconds of one product with one token, by shape and format of the weights."""
    rows = []
    for inner, outer in ((576, 960), (576, 1536), (1536, 576), (576, 49152)):
        count = max(EVICT // (2 * inner * outer), 1)
        layers = [nn.Linear(inner, outer, bias=False) for _ in range(count)]
        x = torch.randn(1, inner)
        half = [w.weight.bfloat16() for w in layers]
        scales = [w.weight.abs().amax(1) / 127 for w in layers]
        rounded = [(w.weight / s[:, None]).round().to(torch.int8) for w, s in zip(layers, scales, strict=True)]
        packed = [PackedLinear(nn.Linear(inner, outer, bias=False).bfloat16()) for _ in layers if has_products()]
        compiled = [Int8Linear(layer) for layer in layers]
        short = x.bfloat16()
        int8 = [(w, s.bfloat16()) for w, s in zip(rounded, scales, strict=True)]
        formats: dict[str, Callable[[], object]] = {
            "float32 linear": lambda layers=layers, x=x: [layer(x) for layer in layers],
            "bfloat16 linear": lambda half=half, short=short: [F.linear(short, w) for w in half],
            "bfloat16 packed": lambda packed=packed, short=short: [layer(short) for layer in packed],
            "int8 weights, compiled": lambda compiled=compiled, x=x: [layer(x) for layer in compiled],
            "int8 weights, PyTorch's": lambda int8=int8, short=short: [
                torch._weight_int8pack_mm(short, *w) for w in int8
            ],
        }
        for name, work in formats.items():
            if not work():  # this processor has no such products
                continue
            taken = statistics.median(seconds(work) for _ in range(9)) / count
            rows.append({"format": name, "in": inner, "out": outer, "microseconds": 1e6 * taken})
    return rows


def main() -> None:
    """Measure, print, keep."""
    model, formats = whole_model(), products()
    print("| path | reading, tokens/s | decoding, ms a token |\n|---|---:|---:|")
    for row in model:
        print(f"| {row['path']} | {row['reading_tokens_per_second']:,.0f} | {row['decoding_ms_per_token']:.1f} |")
    shapes = sorted({(row["in"], row["out"]) for row in formats}, key=str)
    print("\n| one token, µs | " + " | ".join(f"{i} to {o}" for i, o in shapes) + " |")
    print("|---|" + "---:|" * len(shapes))
    for name in dict.fromkeys(row["format"] for row in formats):
        found = {(row["in"], row["out"]): row["microseconds"] for row in formats if row["format"] == name}
        print(f"| {name} | " + " | ".join(f"{found[shape]:.0f}" for shape in shapes if shape in found) + " |")
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (folder / "fast_paths.json").write_text(json.dumps({**facts, "model": model, "products": formats}, indent=1))


if __name__ == "__main__":
    main()
