"""Which settings are fastest for the peers of ``senri bench``: llama.cpp's micro-batch and flash attention, the
segments of infini-transformer-pytorch, the chunks of titans-pytorch.

``python benchmarks/peer_settings.py [tokens [a Python with llama_cpp]]`` (4096 tokens: some minutes on two cores). What
is not installed is left out. Rows go to runs/benchmarks/peer_settings.json and, as a table, to the terminal. Of
llama.cpp, whose settings change nothing but the speed, ``senri bench`` takes the fastest; of the others, what they
document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from senri.benchmark.peers import infini_transformer_pytorch, llama_cpp, titans_pytorch

REPEATS = 3
DECODE = 32  # tokens


def trials(tokens: int, python: str | None) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is tried, in words, and its measurement."""
    for flash in (True, False):
        for n_ubatch in (128, 256, 512, 1024, 2048):
            settings = {"n_ubatch": n_ubatch, "flash_attention": flash, "threads": torch.get_num_threads()}
            settings |= {"decode": DECODE, "repeats": REPEATS}
            yield (
                f"llama.cpp bf16, n_ubatch {n_ubatch}, flash attention {'on' if flash else 'off'}",
                lambda s=settings: llama_cpp.run(python, "bf16", tokens, **s),  # type: ignore[misc]
            )
    for heads in (9, 1):
        for segment in (512, 1024, 2048):
            yield (
                f"infini-transformer-pytorch, {heads} head(s), segments of {segment}",
                lambda h=heads, s=segment: infini_transformer_pytorch.measure(tokens, 0, REPEATS, h, s),  # type: ignore[misc]
            )
        for chunk, piece in ((64, 512), (128, 512), (256, 1024), (512, 1024)):
            yield (
                f"titans-pytorch, {heads} head(s), chunks of {chunk}, calls of {piece}",
                lambda h=heads, c=chunk, p=piece: titans_pytorch.measure(tokens, 0, REPEATS, h, c, p),  # type: ignore[misc]
            )


def main() -> None:
    """Try them all."""
    if len(sys.argv) > 3 or not all(word.isdigit() for word in sys.argv[1:2]):
        sys.exit(__doc__)
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    rows, missing = [], set()
    print("| settings | reading, tokens/s | decoding, tokens/s | Senri's layer, tokens/s |\n|---|---:|---:|---:|")
    for name, measure in trials(tokens, sys.argv[2] if len(sys.argv) > 2 else None):
        peer = name.split(",")[0]
        if peer in missing:
            continue
        try:
            row = {"settings": name, "tokens": tokens, **measure()}
        except ValueError as problem:
            missing.add(peer)
            print(f"{peer} is left out: {problem}", file=sys.stderr)
            continue
        rows.append(row)
        speeds = [
            f"{count / statistics.median(row[key]):,.0f}" if row.get(key) else ""
            for key, count in (("seconds", tokens), ("decode_seconds", DECODE), ("senri_seconds", tokens))
        ]
        print(f"| {name} | {' | '.join(speeds)} |", flush=True)
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (folder / "peer_settings.json").write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
