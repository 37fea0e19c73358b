"""The same facts asked for in five ways, as people ask who do not remember the words.

``python benchmarks/other_words.py BOOKS [TEXTS]`` (6; a quarter of a minute each on one core with bfloat16 products).
BOOKS: a folder of texts that training did not see. Each text has 4,000 tokens with six facts in them, and is ended
(``flush``); then each fact is asked for in five ways, in the chat format. The model is that of config/. The counts go
to the terminal, all that was said to runs/benchmarks/other_words.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch

from senri.cli.common import open_session
from senri.data import TextError
from senri.data.corpus import load_documents
from senri.data.haystack import BookHaystack, Plant, encode, plant
from senri.data.needle_tasks import HELD_OUT, KINDS, NIAH
from senri.data.samples import SampleError
from senri.evaluation.statistics import share
from senri.session import Session

TEXTS, TOKENS, ANSWER = 6, 4000, 24
WORDINGS = [("code", NIAH["multikey"].wordings[0]), *HELD_OUT]
WAYS = {
    "code": (
        "What is the secret key of {key}?", "What is {key}'s secret key?", "Do you remember the secret key of {key}?",
        "Which secret key does {key} have?", "secret key of {key}?",
    ),
    "city": (
        "In which city was {key} born?", "Where was {key} born?", "What is {key}'s birthplace?",
        "Can you tell me where {key} was born?", "{key} was born in which city?",
    ),
    "food": (
        "What does {key} like to eat best?", "What is {key}'s favourite food?", "Which food does {key} like best?",
        "What does {key} prefer to eat?", "Can you tell me what {key} likes to eat?",
    ),
    "job": (
        "As what did {key} earn a living?", "What did {key} do for a living?", "What was {key}'s job?",
        "What was the profession of {key}?", "How did {key} earn a living?",
    ),
    "number": (
        "What is the telephone number of {key}?", "What is {key}'s telephone number?",
        "What's the phone number of {key}?", "Which number must I call to reach {key}?",
        "Please give me the telephone number of {key}.",
    ),
    "words": (
        "Which password opens the house of {key}?", "What is the password of {key}'s house?",
        "What must one say to enter the house of {key}?", "How can I get into the house of {key}?",
        "Tell me the password for {key}'s house.",
    ),
}  # fmt: skip


def make_facts(rng: Random) -> list[tuple[str, str, str, str]]:
    """One of each wording, of different people: its kind, whose it is, its value and how it is told."""
    people: list[str] = []
    facts = []
    for kind, wording in WORDINGS:
        while (person := KINDS["person"](rng)) in people:
            pass
        people.append(person)
        value = KINDS[kind](rng)
        facts.append((kind, person, value, wording.fact.format(key=person, value=value)))
    return facts


def main() -> None:
    """Read, ask, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("texts", type=int, nargs="?", default=TEXTS)
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    try:
        documents, loaded = load_documents([given.books]), open_session()
        model, tokenizer = loaded.model, loaded.tokenizer
        books = BookHaystack(documents, tokenizer)
        for number in range(given.texts):
            rng = Random(f"natural/{number}")
            facts = make_facts(rng)
            plants = [Plant(rng.random() * TOKENS, tuple(encode(tokenizer, told))) for *_, told in facts]
            ids, _ = plant(books.stretch(TOKENS, rng), plants, TOKENS)
            model.reset_memory()
            model.read(torch.from_numpy(ids).long())
            model.flush()
            session = Session(model, tokenizer, generation={**loaded.generation, "max_new_tokens": ANSWER})
            for kind, person, value, _ in facts:
                for question in WAYS[kind]:
                    said = session.ask(question.format(key=person))
                    right, exact = value in said, said.strip("\"'. ") == value
                    found.append(
                        {"kind": kind, "asked": question.format(key=person), "value": value, "said": said}
                        | {"right": right, "exact": exact}
                    )
                    print(found[-1], file=sys.stderr, flush=True)
    except (TextError, SampleError) as error:
        parser.error(str(error))
    path = Path("runs/benchmarks/other_words.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for kind in (*WAYS, "all"):
        rows = [row for row in found if kind in (row["kind"], "all")]
        right, exact = (sum(row[name] for row in rows) for name in ("right", "exact"))
        interval = share(right, len(rows))
        low, high = 100 * interval.low, 100 * interval.high
        print(f"{kind}: {right} of {len(rows)} [{low:.0f}, {high:.0f}], the value and nothing else {exact}")


if __name__ == "__main__":
    main()
