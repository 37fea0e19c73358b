"""What calibration gives, without one gradient step: a passage that comes again beyond the window.

``python benchmarks/calibration.py`` (a few minutes, no options). The text is the King James Bible; the shipped adapter
was calibrated on other books. Scored are the tokens of the second reading that lie a whole window behind its start, so
that only the memory can know them.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
import transformers

from senri import SenriForCausalLM, load_base
from senri.data import iter_bible, iter_pieces, iter_tokens

START = 400_000  # tokens into the text: Psalms and after, less known by heart than Genesis
PAIRS = (256, 512, 1024, 2048)  # pairs in memory between the two readings of a token


@torch.no_grad()
def second_reading(model: SenriForCausalLM, ids: torch.Tensor, pairs: int) -> tuple[float, float]:
    """Top-1 accuracy and loss (nats) where a passage of window + ``pairs`` tokens is read for the second time."""
    length = model.config.sliding_window_size + pairs
    twice = torch.cat([ids[:length], ids[:length]])
    first = length + model.config.sliding_window_size
    hidden = model.model(twice[None], use_cache=False).last_hidden_state[0, first:-1]
    logits, target = model.lm_head(hidden).float(), twice[first + 1 :]
    return float((logits.argmax(-1) == target).float().mean()), float(F.cross_entropy(logits, target))


def main() -> None:
    """Silent, uncalibrated and calibrated memory side by side."""
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_base()
    memory = model.model.memories[model.config.memory_layers[0]]
    stream = iter_pieces(iter_tokens(iter_bible(), tokenizer), START)
    next(stream)
    ids = torch.tensor(next(stream)[:8192])
    calibrated = {name: p.clone() for name, p in memory.named_parameters()}
    print("| pairs | tokens scored | silent | uncalibrated | calibrated |\n|---:|---:|---:|---:|---:|")
    for pairs in PAIRS:
        cells = []
        for variant in ("silent", "uncalibrated", "calibrated"):
            memory.reset_parameters()
            if variant == "calibrated":
                memory.load_state_dict(calibrated)
            if variant == "uncalibrated":
                memory.read_gate.scale.data.copy_(calibrated["read_gate.scale"])
            accuracy, loss = second_reading(model, ids, pairs)
            cells.append(f"{accuracy:.1%}, {loss:.2f}")
        print(f"| {pairs} | {pairs - 1} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
