"""A quick look whether everything works here: ``python scripts/local_test.py`` (about a minute, no options).

Loads the pip-shipped base model, compares it with its conversion inside the window, reads a text many windows long,
saves and reopens the memory, and answers a question.
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from senri import ConfigManager, convert_to_senri, load_base
from senri.data import iter_bible, iter_pieces, iter_tokens
from senri.hf.base import base_directory
from senri.session import Session


def check(what: str, passed: bool, detail: str) -> None:
    """Print one finding and stop at the first failure."""
    print(f"{'ok    ' if passed else 'FAILED'} {what}: {detail}")
    if not passed:
        raise SystemExit(1)


def main() -> None:
    """Run all checks."""
    config = ConfigManager()
    check("configuration", True, f"{config.folder}, base {config.base_model_name}")
    model, tokenizer = load_base()
    window = model.config.sliding_window_size
    ids = next(iter_pieces(iter_tokens(iter_bible(), tokenizer), 4 * window))

    # in bfloat16 other kernels run where no gradient is asked for, and round otherwise
    base = LlamaForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)
    inside = torch.tensor([ids[:256]])
    with torch.no_grad():
        same = torch.equal(base(inside).logits, convert_to_senri(base)(inside).logits)
    check("conversion", same, "logits inside the window are the base model's, bit for bit")

    session = Session(model, tokenizer)
    started = time.perf_counter()
    session.read_tokens(iter([ids]), "King James Bible")
    speed = len(ids) / (time.perf_counter() - started)
    written = int(session.state.state.layers[model.config.memory_layers[0]].memory.memory.written)
    check("reading", written == len(ids), f"{len(ids):,} tokens at {speed:,.0f} tokens/s, each written once")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.senri"
        session.save(path)
        before = session.ask("Who made the heaven and the earth?")
        other = Session(model, tokenizer)
        other.load(path)
        size = path.stat().st_size / 1e6
    check(
        "saving",
        other.ask("Who made the heaven and the earth?") == before,
        f"{size:.2f} MB, same answer: {before}",
    )


if __name__ == "__main__":
    main()
