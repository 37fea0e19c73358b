"""What calibration gives, without one gradient step: a passage that comes again beyond the window.

``python benchmarks/calibration.py`` (some ten minutes on two cores, no options). The text is the King James Bible, from
the Psalms on; calibrated is on its beginning. Scored are the tokens of the second reading that lie a whole window
behind its start, so that only the memory can know them. Every token is written; keys are made of the token before, by
a short convolution.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
import transformers

from senri import SenriForCausalLM, load_base
from senri.data import iter_bible, iter_pieces, iter_tokens
from senri.hf.calibrate import HEIGHT, calibrate

START = 400_000  # tokens into the text: Psalms and after, less known by heart than Genesis
PAIRS = (256, 512, 1024, 2048)  # pairs in memory between the two readings of a token
CALIBRATION = 16384  # tokens
RULES = ("delta_token", "slot")
MEMORY = {
    "num_memory_layers": 1,
    "first_memory_layer": 14,
    "memory_num_heads": 1,
    "memory_head_dim": 576,
    "memory_readout": "head",
    "memory_conv_size": 2,
    "memory_context_size": 0,
    "write_gate": "none",
}


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
    print("| rule | pairs | tokens scored | silent | uncalibrated | calibrated |\n|---|---:|---:|---:|---:|---:|")
    for rule in RULES:
        model, tokenizer = load_base(adapter="none", update_rule=rule, **MEMORY)
        stream = iter_pieces(iter_tokens(iter_bible(), tokenizer), START)
        calibrate(model, torch.tensor(next(stream)[:CALIBRATION]))
        ids = torch.tensor(next(stream)[:8192])
        memory = model.model.memories[model.config.memory_layers[0]]
        calibrated = {name: p.clone() for name, p in memory.named_parameters()}
        for pairs in PAIRS:
            cells = []
            for variant in ("silent", "uncalibrated", "calibrated"):
                memory.reset_parameters()
                if variant == "calibrated":
                    memory.load_state_dict(calibrated)
                if variant == "uncalibrated":  # as loud: its values are no whitened ones
                    loud = HEIGHT / model.lm_head.weight.float().norm(dim=-1).mean()
                    memory.read_gate.scale.data.copy_(calibrated["read_gate.scale"] * loud)
                accuracy, loss = second_reading(model, ids, pairs)
                cells.append(f"{accuracy:.1%}, {loss:.2f}")
            print(f"| {rule} | {pairs} | {pairs - 1} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
