"""Peak memory and speed of reading one book: Senri at 8K, 64K and 256K tokens, full attention with the same weights at
8K and 16K, in one run.

``python benchmarks/reading.py`` (about 15 minutes on two cores, no options). Each row is a process of its own, so that
its peak is its own; rows go to runs/benchmarks/reading.json and, as a table, to the terminal.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import torch

ROWS = [
    ("full attention", 8192),
    ("full attention", 16384),
    ("senri", 8192),
    ("senri", 65536),
    ("senri", 262144),
    ("senri", 8192),  # again at the end: shows how much the machine itself drifted
]
WARM_UP = 4096  # tokens read before the clock starts


class Peak:
    """Largest resident memory of this process between enter and exit, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.stop.is_set():
            self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def book(tokens: int) -> torch.Tensor:
    """The first tokens of the King James Bible."""
    from transformers import AutoTokenizer

    from senri.data import iter_bible, iter_pieces, iter_tokens
    from senri.hf.base import base_directory

    tokenizer = AutoTokenizer.from_pretrained(base_directory())
    return torch.tensor(next(iter_pieces(iter_tokens(iter_bible(), tokenizer), tokens)))


@torch.no_grad()
def measure(kind: str, tokens: int) -> dict[str, object]:
    """One row, in this process."""
    import transformers

    from senri import load_base
    from senri.hf.base import base_directory, resolve_dtype

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = book(tokens)
    speeds: list[float] = []
    if kind == "senri":
        model, _ = load_base()
        model.read(ids[:WARM_UP])
        model.end_session()
        marks = [(0, 0.0)]
        with Peak() as peak:
            now = model.read(ids, progress=lambda p: marks.append((p.tokens, p.seconds)))
        speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks)]
        seconds, state = now.seconds, model.session.nbytes
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(base_directory(), dtype=resolve_dtype("auto"))
        model.model(ids[None, :WARM_UP])
        with Peak() as peak:
            started = time.perf_counter()
            cache = model.model(ids[None], use_cache=True).past_key_values
            seconds = time.perf_counter() - started
        state = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        "kind": kind,
        "tokens": tokens,
        "dtype": str(model.dtype),
        "peak_mb": peak.bytes / 1e6,
        "state_mb": state / 1e6,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "median_piece_speed": statistics.median(speeds) if speeds else None,
    }


def main() -> None:
    """Run every row in a fresh process."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    rows = []
    print("| reading | tokens | peak memory | state | tokens/s |\n|---|---:|---:|---:|---:|")
    for kind, tokens in ROWS:
        command = [sys.executable, __file__, kind, str(tokens)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {kind} | {tokens:,} | {row['peak_mb']:,.0f} MB | {row['state_mb']:.1f} MB | "
            f"{row['tokens_per_second']:,.0f} |",
            flush=True,
        )
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reading.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
