"""How sure a memory is by the number of facts in it, on pages of books that it was not trained on.

``python benchmarks/facts_in_memory.py BOOKS [ADAPTER]`` (about ten minutes on two cores). BOOKS: a folder of texts;
ADAPTER: a file of method features, by default the one that ships. Facts are worded as in training, with other names and
values; each row asks 160 questions. A question is right when every token of the value is the most probable one, the
tokens before it given. The last row is about questions that nothing answers: there the base's answer must stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random

import torch
import transformers

from senri.config import ConfigManager
from senri.data.corpus import load_documents
from senri.data.pages import RecallPages
from senri.hf.base import load_model
from senri.training.features import AskedFeatures, collect
from senri.training.fit import Reading, Text
from senri.training.settings import FeatureSettings

STREAMS, SEED = 12, 12345  # a third of the streams has no facts
QUESTIONS, BATCH = 160, 8
END = 2  # tokens behind the value: the full stop, and the line's or the turn's end
Told = dict[int, set[int]]  # page -> its facts that are told
Choose = Callable[[AskedFeatures], Told | None]


class Rows:
    """The conditions: what else the memory holds beside the fact that is asked for."""

    def __init__(self, reading: Reading, rng: Random) -> None:
        self.reading, self.rng, self.facts = reading, rng, reading.features.facts

    def of_page(self, page: int, about: str, own: int | None = None) -> set[int]:
        """All facts of a page but others about the same."""
        return {number for number, other in enumerate(self.facts[page]) if number == own or other != about}

    def alone(self, asked: AskedFeatures) -> Told:
        return {asked.page: {asked.fact}}

    def same(self, count: int) -> Choose:
        """And ``count`` of its kind: told in the same words of somebody else."""

        def choose(asked: AskedFeatures) -> Told | None:
            facts, about = self.facts[asked.page], self.facts[asked.page][asked.fact]
            alike = [n for n, other in enumerate(facts) if other != about and _kind(other) == _kind(about)]
            if len(alike) < count:
                return None
            return {asked.page: {asked.fact, *self.rng.sample(alike, count)}}

        return choose

    def pages(self, count: int) -> Choose:
        """And all others of its page and of ``count`` - 1 more."""

        def choose(asked: AskedFeatures) -> Told:
            about = self.facts[asked.page][asked.fact]
            others = self.rng.sample([page for page in self.reading.fact_pages if page != asked.page], count - 1)
            told = {asked.page: self.of_page(asked.page, about, asked.fact)}
            return told | {page: self.of_page(page, about) for page in others}

        return choose

    def overwritten(self, asked: AskedFeatures) -> Told | None:
        """Told again with other values; the last is asked for."""
        about = self.facts[asked.page][asked.fact]
        told = {number for number, other in enumerate(self.facts[asked.page]) if other == about}
        return {asked.page: told} if len(told) > 1 and asked.fact == max(told) else None


def _kind(about: str) -> str:
    """What a fact says, without whose it is."""
    before, of, _ = about.strip().partition(" of ")
    return before if of else " ".join(about.split()[-2:])


@torch.no_grad()
def right(reading: Reading, choose: Choose, rng: Random) -> tuple[int, int]:
    """Questions answered right, and asked."""
    embedding = reading.embedding
    asked = [q for page in reading.fact_pages for q in reading.by_page[page] if q.fact >= 0]
    rng.shuffle(asked)
    texts = []
    for question in asked:
        told = choose(question)
        if told is not None and len(texts) < QUESTIONS:
            pages = [(page, frozenset(facts)) for page, facts in told.items()]
            texts.append(Text(pages, [question], [], int(reading.silent[0])))
    hits = 0
    for start in range(0, len(texts), BATCH):
        group = texts[start : start + BATCH]
        for text, added in zip(group, reading.added(group)[0], strict=True):
            (question,) = text.asked
            said = ((question.final.float() + added[: len(question.target)]) @ embedding.T).argmax(-1)
            value = slice(-END if len(question.target) > END else None)
            hits += bool((said == question.target)[value].all())
    return hits, len(texts)


@torch.no_grad()
def changed(reading: Reading, rng: Random) -> tuple[int, int]:
    """Of the base's answers to what nothing answers, those that a page of facts changes, and all."""
    embedding, count = reading.embedding, 0
    for question in reading.unrelated:
        page = rng.choice(reading.fact_pages)
        told = [(page, frozenset(range(len(reading.features.facts[page]))))]
        (added,), _ = reading.added([Text(told, [question], [], int(reading.silent[0]))])
        final = question.final.float()
        now = (final + added[: len(final)]) @ embedding.T
        count += bool((now.argmax(-1) != (final @ embedding.T).argmax(-1)).any())
    return count, len(reading.unrelated)


def main() -> None:
    """The table of one adapter."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = ConfigManager()
    settings = FeatureSettings(**config.training.features.model_dump())
    model, tokenizer = load_model(adapter=sys.argv[2] if len(sys.argv) == 3 else "default")
    source = RecallPages(
        load_documents([sys.argv[1]]), tokenizer, size=settings.page_size, pages=settings.pages, questions=1,
        chat=config.training.chat_ratio, seed=SEED,
    )  # fmt: skip
    features = collect(model, source, range(STREAMS), batch=4)
    reading = Reading(model.float(), features, settings, SEED)
    rng = Random(SEED)
    rows = Rows(reading, rng)
    print("| in the memory | right |\n|---|---:|")
    for name, choose in (
        ("the asked fact alone", rows.alone),
        *((f"and {count} of its kind", rows.same(count)) for count in (1, 2, 3)),
        ("all of its page", rows.pages(1)),
        ("all of four pages", rows.pages(4)),
        ("told again: the last", rows.overwritten),
    ):
        hits, asked = right(reading, choose, rng)
        print(f"| {name} | {hits} of {asked} ({hits / max(asked, 1):.0%}) |", flush=True)
    count, total = changed(reading, rng)
    print(f"| unrelated questions whose answer a page of facts changes | {count} of {total} |")


if __name__ == "__main__":
    main()
