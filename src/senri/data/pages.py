"""Pages: book text crowded with facts, each of which is asked for in several ways, for training on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, Plant, plant
from senri.data.training_forms import Exchange, Forms
from senri.data.training_recall import ABOVE, Asked, Recall, Told, labelled, needle, overwritten

OVERWRITTEN = 0.25  # share of the groups of facts in which one is told again with another value
ROOM = 0.4  # share of a page that facts may take
LEAD = (4, 40)  # tokens of book text before a question


@dataclass(frozen=True)
class Question:
    """One question to a page, asked where the page itself is out of sight."""

    lead: np.ndarray  # [L] int32, text before it
    fact: int  # number of the page's fact that answers
    exchange: Exchange


@dataclass(frozen=True)
class Page:
    """A stretch of a book; without facts, plain text."""

    ids: np.ndarray  # [size] int32
    write: np.ndarray  # [size] int8, as in TrainingSample
    questions: tuple[Question, ...]
    facts: tuple[str, ...]  # each fact up to its value, in order: another value behind the same words contradicts it
    fact_of: np.ndarray  # [size] int16: number of the fact that a token belongs to, or -1
    source: str


class RecallPages:
    """Streams of consecutive pages; each stream follows from the seed and its number alone.

    Args:
        documents: the texts.
        tokenizer: a fast one.
        size: tokens of a page; pages: of a stream.
        questions: that every asked fact gets, each in a form of its own.
        chat: share of them in the tokenizer's chat format.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Any,
        *,
        size: int,
        pages: int,
        questions: int,
        chat: float,
        seed: int,
    ) -> None:
        self.tokenizer, self.size, self.pages, self.questions, self.seed = tokenizer, size, pages, questions, seed
        self.books = BookHaystack(documents, tokenizer)
        self.forms = Forms(tokenizer, chat)

    def stream(self, index: int) -> list[Page]:
        """Stream number ``index``: every second one is plain text.

        Raises:
            SampleError: the texts are too short.
        """
        rng = Random(f"{self.seed}/pages/{index}")
        stretch = self.books.stretch(self.size * self.pages, rng)
        made = []
        used = 0
        for _ in range(self.pages):
            recalls = self._recalls(rng) if index % 2 == 0 else []
            facts = [labelled(self.tokenizer, told) for recall in recalls for told in recall.told]
            rest = stretch.ids[used:]
            part = stretch._replace(ids=rest, cuts=self.books.cuts(rest))
            # in order, so that what is told again is told later
            places = sorted(rng.random() * self.size for _ in facts)
            ids, spans = plant(part, [Plant(p, f) for p, (f, _) in zip(places, facts, strict=True)], self.size)
            used += self.size - sum(len(f) for f, _ in facts)
            write = np.zeros(self.size, dtype=np.int8)
            fact_of = np.full(self.size, -1, dtype=np.int16)
            for number, ((start, stop), (_, labels)) in enumerate(zip(spans, facts, strict=True)):
                write[start:stop] = labels
                fact_of[start:stop] = number
            told_here = tuple(said(told) for recall in recalls for told in recall.told)
            made.append(Page(ids, write, tuple(self._questions(recalls, rng)), told_here, fact_of, stretch.source))
        return made

    def _recalls(self, rng: Random) -> list[Recall]:
        """Groups of facts that fill their share of a page; none that could be taken for another."""
        groups: list[Recall] = []
        stems: list[str] = []
        room = int(ROOM * self.size)
        for _ in range(12):
            group = (overwritten if rng.random() < OVERWRITTEN else needle)(rng, False)
            size = sum(len(labelled(self.tokenizer, told)[0]) for told in group.told)
            mine = [*map(asked_stem, group.asked), *map(said, group.told)]
            clash = any(a.startswith(b) or b.startswith(a) for a in mine for b in stems)
            if size > room or clash:
                continue
            room -= size
            groups.append(group)
            stems += mine
        return groups

    def _questions(self, recalls: Sequence[Recall], rng: Random) -> list[Question]:
        made, first = [], 0
        for recall in recalls:
            for asked in recall.asked:
                for _ in range(self.questions):
                    (exchange,) = self.forms.exchanges([asked], rng)
                    lead = self.books.stretch(rng.randint(*LEAD), rng).ids
                    made.append(Question(lead, first + asked.fact, exchange))
            first += len(recall.told)
        return made


def said(told: Told) -> str:
    """A fact up to its value, the same with a colon before that and without."""
    return told.text[: told.values[0][0]].rstrip(": ")


def asked_stem(asked: Asked) -> str:
    """A question without what may be appended to it."""
    return asked.question.removesuffix("?").removesuffix(ABOVE)
