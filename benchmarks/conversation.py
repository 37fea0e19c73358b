"""Facts told anew in a conversation: what the next answers say.

``python benchmarks/conversation.py BOOKS [TEXTS]`` (5; half a minute each on one core with bfloat16 products). BOOKS: a
folder of texts that training did not see. Each text has 4,000 tokens with six facts in them, and is ended (``flush``).
Then, for each fact in a conversation of its own: a message tells it anew with another value, a second asks for it, an
aside (``ask``) says something else, and another fact of the text is asked for. The model is that of config/. The counts
go to the terminal, all that was said to runs/benchmarks/conversation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from senri.cli.common import open_session
from senri.data import TextError
from senri.data.corpus import load_documents
from senri.data.haystack import BookHaystack, Plant, encode, plant
from senri.data.needle_tasks import HELD_OUT, KINDS, NIAH, Wording
from senri.data.samples import SampleError
from senri.evaluation.statistics import share
from senri.session import Session

TEXTS, TOKENS = 5, 4000
WORDINGS: list[tuple[str, Wording]] = [("code", NIAH["multikey"].wordings[0]), *HELD_OUT]
ASIDE = "Thank you. What is the capital of France?"
COUNTS = (
    "new value", "old value", "first reply names the old value", "another fact right",
    "new value and nothing else", "another fact and nothing else",
)  # fmt: skip


class Fact(NamedTuple):
    """What is told, what it is later, and how it is asked for."""

    told: str
    anew: str
    question: str
    old: str
    new: str


def make_facts(rng: Random) -> list[Fact]:
    """One of each wording, of different people."""
    people: list[str] = []
    facts = []
    for kind, wording in WORDINGS:
        person = _new("person", people, rng)
        people.append(person)
        old = KINDS[kind](rng)
        new = _new(kind, [old], rng)
        asked = wording.question.strip().removeprefix("Question: ").partition("\n")[0].replace(" mentioned above", "")
        told, anew = (wording.fact.format(key=person, value=value) for value in (old, new))
        facts.append(Fact(told, anew.strip(), asked.format(key=person), old, new))
    return facts


def _new(kind: str, known: list[str], rng: Random) -> str:
    while (made := KINDS[kind](rng)) in known:
        pass
    return made


def converse(session: Session, fact: Fact, other: Fact) -> dict[str, Any]:
    """A conversation about ``fact`` that ends with a question for ``other``, with what was right of it."""
    said = [session.say(fact.anew), session.say(fact.question), session.ask(ASIDE), session.say(other.question)]
    named = [
        fact.new in said[1], fact.old in said[1], fact.old in said[0], other.old in said[3],
        said[1].strip("\"'. ") == fact.new, said[3].strip("\"'. ") == other.old,
    ]  # fmt: skip
    return {"told": fact.anew, "asked": [fact.question, other.question], "said": said} | dict(
        zip(COUNTS, named, strict=True)
    )


def main() -> None:
    """Read, converse, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("texts", type=int, nargs="?", default=TEXTS)
    given = parser.parse_args()
    try:
        documents = load_documents([given.books])
        loaded = open_session()
        model, tokenizer, found = loaded.model, loaded.tokenizer, []
        books = BookHaystack(documents, tokenizer)
        for number in range(given.texts):
            rng = Random(f"conversation/{number}")
            facts = make_facts(rng)
            plants = [Plant(rng.random() * TOKENS, tuple(encode(tokenizer, fact.told))) for fact in facts]
            ids, _ = plant(books.stretch(TOKENS, rng), plants, TOKENS)
            model.reset_memory()
            model.read(torch.from_numpy(ids).long())
            model.flush()
            state = model.session
            for i, fact in enumerate(facts):
                model.session = state.fork()
                session = Session(model, tokenizer, generation=loaded.generation)
                found.append({"text": number, **converse(session, fact, facts[i - 1])})
                print(found[-1], file=sys.stderr, flush=True)
    except (TextError, SampleError) as error:
        parser.error(str(error))
    path = Path("runs/benchmarks/conversation.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for name in COUNTS:
        right = sum(row[name] for row in found)
        interval = share(right, len(found))
        print(f"{name}: {right} of {len(found)} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]")


if __name__ == "__main__":
    main()
