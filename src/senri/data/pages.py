"""Pages: book text crowded with facts, each of which is asked for in several ways, for training on cached features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, Plant, encode, plant
from senri.data.training_chat import PROMPTS
from senri.data.training_forms import Exchange, Forms
from senri.data.training_recall import ABOVE, Asked, Recall, labelled, needle, overwritten, whereabouts

GROUPS = {needle: 0.65, overwritten: 0.2, whereabouts: 0.15}  # shares of the groups of facts
ROOM = 0.5  # share of a page that facts may take
FIRST_WORDS = 0.8  # share of the pages that open a text which begin with a fact, one that is asked for
LEAD = (4, 150)  # tokens of book text before a question, more often few than many
NO_LEAD = 0.25  # share of the questions without: asked in an empty window, as after the end of a text
LATE = 0.5  # share of the questions that are asked behind thousands of tokens of book text
RIVAL = 0.3  # share of the questions, where there is one, with another fact of the group in sight
IN_SIGHT = 0.1  # share of the questions whose own fact stands in sight
FOLLOWS = 0.3  # share of the questions that follow on another one and its answer
MESSAGE = 0.15  # share of the groups of which a chat message tells a fact


FILLER = (
    "The wind is cold.", "The road is long.", "The bread is warm.", "The lake is deep.", "It is late.", "Stay here.",
    "The snow is white.", "The night is dark.", "A bird sings.", "We walk on.", "Nobody knows why.", "The door is red.",
    "The horses are tired.", "There is nothing to see.", "Come with me.", "He waits.", "Left, then right.",
    "The house is small.", "One and two and three.", "The coat is brown.", "The bell rings at noon.", "Look up.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question to a page, asked where the page itself is out of sight."""

    lead: np.ndarray  # [L] int32, text before it
    late: bool  # asked behind a running text: the lead follows on one without facts
    fact: int  # number of the page's fact that answers; -1: the answer stands in the lead
    exchange: Exchange
    left_to_base: bool = False  # right is what the base says, whatever was read


@dataclass(frozen=True)
class Page:
    """A stretch of a book; without facts, plain text."""

    ids: np.ndarray  # [size] int32
    write: np.ndarray  # [size] int8, as in TrainingSample
    questions: tuple[Question, ...]
    messages: tuple[Question, ...]  # that tell a fact themselves, left to the base; without answers yet
    facts: tuple[str, ...]  # what each is about, in order: another value for the same contradicts it
    fact_of: np.ndarray  # [size] int16: number of the fact that a token belongs to, or -1
    source: str
    opens: bool  # it is the beginning of a text; else it goes on from the page before it


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
        """Stream number ``index``: every third one is plain text, and every fifth of these says little again and again.

        Of a stream with facts, each page of the first half opens a text, most of them with a fact: what is said at the
        beginning has nothing before it that it could be known by. The last of them goes on as one text.

        Raises:
            SampleError: the texts are too short.
        """
        rng = Random(f"{self.seed}/pages/{index}")
        plain = index % 3 == 2
        if plain and index // 3 % 5 == 0:
            return self._again_and_again(rng)
        stretch = self.books.stretch(self.size * (self.pages + 1), rng)
        made = []
        used = 0
        for number in range(self.pages):
            opens = number == 0 or (not plain and number < self.pages // 2)
            if number and opens:  # with a sentence
                used += int(self.books.cuts(stretch.ids[used : used + self.size])[1])
            recalls = [] if plain else self._recalls(rng)
            begins = opens and rng.random() < FIRST_WORDS and _ask_first(recalls)
            facts = [labelled(self.tokenizer, told) for recall in recalls for told in recall.told]
            rest = stretch.ids[used:]
            part = stretch._replace(ids=rest, cuts=self.books.cuts(rest))
            # in order, so that what is told again is told later
            places = sorted(rng.random() * self.size for _ in facts)
            if begins:
                places[0] = 0.0
            ids, spans = plant(part, [Plant(p, f) for p, (f, _) in zip(places, facts, strict=True)], self.size)
            used += self.size - sum(len(f) for f, _ in facts)
            write = np.zeros(self.size, dtype=np.int8)
            fact_of = np.full(self.size, -1, dtype=np.int16)
            for fact, ((start, stop), (_, labels)) in enumerate(zip(spans, facts, strict=True)):
                write[start:stop] = labels
                fact_of[start:stop] = fact
            told_here = tuple(told.about for recall in recalls for told in recall.told)
            asked = tuple(self._questions(recalls, rng))
            said = tuple(self._messages(recalls, Random(f"{self.seed}/messages/{index}/{number}")))
            made.append(Page(ids, write, asked, said, told_here, fact_of, stretch.source, opens))
        return made

    def _again_and_again(self, rng: Random) -> list[Page]:
        """Pages of a few sentences in a row: they look like facts, but what comes again need not be kept."""
        size = self.size * self.pages
        said = encode(self.tokenizer, "".join(f" {text}" for text in rng.sample(FILLER, rng.randint(2, 6))))
        ids = np.array((said * (size // len(said) + 1))[:size], dtype=np.int32).reshape(self.pages, self.size)
        nothing = np.zeros(self.size, dtype=np.int8)
        none = np.full(self.size, -1, dtype=np.int16)
        return [Page(row, nothing, (), (), (), none, "filler", number == 0) for number, row in enumerate(ids)]

    def unrelated(self) -> list[list[int]]:
        """Token ids of texts and questions that no page answers, to be answered as by the base."""
        rng = Random(f"{self.seed}/unrelated")
        made = []
        for prompt in (prompt for question in PROMPTS for prompt in self.forms.prompts(question)):
            made.append([*self._lead(rng), *prompt])
        return made

    def _lead(self, rng: Random) -> list[int]:
        if rng.random() < NO_LEAD:
            return []
        return self.books.stretch(round(math.exp(rng.uniform(*map(math.log, LEAD)))), rng).ids.tolist()

    def _recalls(self, rng: Random) -> list[Recall]:
        """Groups of facts that fill their share of a page; none that could be taken for another."""
        groups: list[Recall] = []
        stems: list[str] = []
        room = int(ROOM * self.size)
        for _ in range(12):
            group = rng.choices(list(GROUPS), list(GROUPS.values()))[0](rng, False)
            size = sum(len(labelled(self.tokenizer, told)[0]) for told in group.told)
            mine = [*map(asked_stem, group.asked), *(told.about for told in group.told)]
            if size > room or not {*mine}.isdisjoint(stems):
                continue
            room -= size
            groups.append(group)
            stems += mine
        return groups

    def _questions(self, recalls: Sequence[Recall], rng: Random) -> list[Question]:
        made, first = [], 0
        every = [asked for recall in recalls for asked in recall.asked]
        for recall in recalls:
            for asked in recall.asked:
                others = [other for other in every if other is not asked]
                for _ in range(self.questions):
                    earlier = [rng.choice(others)] if others and rng.random() < FOLLOWS else []
                    *answered, exchange = self.forms.exchanges([*earlier, asked], rng)
                    shown, seen = self._shown(recall, asked, rng)
                    late = rng.random() < LATE
                    before = [] if late else self._lead(rng)
                    said = [token for e in answered for token in (*e.prompt, *e.answer)]
                    lead = np.array([*before, *encode(self.tokenizer, shown), *said], dtype=np.int32)
                    made.append(Question(lead, late, -1 if seen else first + asked.fact, exchange))
            first += len(recall.told)
        return made

    def _messages(self, recalls: Sequence[Recall], rng: Random) -> list[Question]:
        """Facts as a chat message tells them, often with another value than the page told last: the base replies."""
        made, first = [], 0
        for recall in recalls:
            if self.forms.chat and rng.random() < MESSAGE:
                said = rng.choice(recall.told)
                last = max(number for number, told in enumerate(recall.told) if told.about == said.about)
                late = rng.random() < LATE
                lead = np.array([] if late else self._lead(rng), dtype=np.int32)
                made.append(
                    Question(lead, late, first + last, self.forms.message(said.text.strip()), left_to_base=True)
                )
            first += len(recall.told)
        return made

    def _shown(self, recall: Recall, asked: Asked, rng: Random) -> tuple[str, bool]:
        """Facts that stand in sight of a question, and whether its own is among them."""
        own = recall.told[asked.fact]
        rivals = [told.text for told in recall.told if told.about != own.about]
        shown = rng.sample(rivals, rng.randint(1, min(2, len(rivals)))) if rivals and rng.random() < RIVAL else []
        if seen := rng.random() < IN_SIGHT:
            shown.insert(rng.randint(0, len(shown)), own.text)
        return "".join(shown), seen


def _ask_first(recalls: list[Recall]) -> bool:
    """Put a group in front whose first fact is asked for and stays true; whether there is one."""
    first = next((n for n, r in enumerate(recalls) if any(asked.fact == 0 for asked in r.asked)), None)
    if first is not None:
        recalls.insert(0, recalls.pop(first))
    return first is not None


def asked_stem(asked: Asked) -> str:
    """A question without what may be appended to it."""
    return asked.question.removesuffix("?").removesuffix(ABOVE)
