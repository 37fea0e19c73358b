"""What the model that ships makes of one text, and what it should: golden.json, made in float64.

``PYTHONPATH=src python tests/hf/golden.py`` makes it anew: for a change that is meant to change the arithmetic, and for
no other.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senri import load_base
from senri.data import iter_bible
from senri.memory.state import named_tensors

FILE = Path(__file__).with_suffix(".json")
TOKENS, PIECE = 1500, 512  # of the text; the window is 1024, so that its first 476 tokens are in the memory
SCORED = 120  # last tokens, whose logits and losses are kept
FACTS = " The secret key of Martha Lind is: KEY-QWT90218. The secret key of Anna Adler is: KEY-ABC12345."
BEFORE = 150  # tokens of the book before the facts
QUESTION = " The secret key of Anna Adler is: KEY-ABC12345."  # the text's end, so that the memory has something to say
PLACES = (-120, -90, -60, -30, -10, -9, -8, -7, -6, -5, -4, -3, -2)  # of the text, whose logits are kept
TOP = 8  # most probable tokens of each, and every ...
EVERY = 997  # ... th of the vocabulary


def text(tokenizer: Any) -> Tensor:
    """Ids ``[1, TOKENS]``: the King James Bible, two facts in its beginning, and one of them again at its end."""

    def encode(of: str) -> list[int]:
        return tokenizer(of, add_special_tokens=False)["input_ids"]

    verses = iter_bible()
    book = encode("".join(verse for verse, _ in zip(verses, range(120), strict=False)))
    facts, question = encode(FACTS), encode(QUESTION)
    filler = book[BEFORE : TOKENS - len(facts) - len(question)]
    ids = [*book[:BEFORE], *facts, *filler, *question]
    assert len(ids) == TOKENS
    return torch.tensor([ids])


@torch.no_grad()
def compute(dtype: torch.dtype) -> dict[str, Any]:
    """Of the text, read in pieces without logits but for its last tokens: their losses, logits of some, the memory."""
    model, tokenizer = load_base("float32" if dtype == torch.float64 else dtype)
    model.to(dtype)
    ids = text(tokenizer)
    model.read(ids[:, :-SCORED], piece_size=PIECE)
    logits = model(ids[:, -SCORED:]).logits[0].double()
    losses = F.cross_entropy(logits[:-1], ids[0, 1 - SCORED :], reduction="none")
    model.flush()
    memory = {i: named_tensors(state) for i, state in model.session.memories.items()}
    return {
        "loss": losses.mean().item(),
        "question_loss": losses[-len(tokenizer(QUESTION)["input_ids"]) :].mean().item(),
        "logsumexp": [logits[place].logsumexp(-1).item() for place in PLACES],
        "top": [logits[place].topk(TOP).indices.tolist() for place in PLACES],
        "top_logits": [logits[place].topk(TOP).values.tolist() for place in PLACES],
        "spread_logits": [logits[place, ::EVERY].tolist() for place in PLACES],
        "memory": {
            f"{i}.{name}": [tensor.double().norm().item(), tensor.double().sum().item()]
            for i, tensors in memory.items()
            for name, tensor in tensors.items()
        },
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute(torch.float64), indent=1) + "\n")
