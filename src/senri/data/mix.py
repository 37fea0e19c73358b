"""The training data: books, and in a share of the samples something that must be recalled from beyond the window.

Every sample is ``length`` tokens of real text; facts, questions and answers take the place of that much of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np

from senri.data.babilong import MAX_NEW_TOKENS, Story, babilong_context, instruction
from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, Plant, encode, plant
from senri.data.names import find_cloze
from senri.data.samples import SampleError
from senri.data.training_forms import Forms
from senri.data.training_recall import Recall, Told, chain, labelled, needle, overwritten, spans_of
from senri.data.training_sample import TrainingSample

SHORTEST_COPY, LONGEST_COPY = 64, 512  # tokens of a passage that comes again
SURPRISE = 8  # its first tokens, which nothing announces
TRIES = 30  # other texts or stories before a sample is given up
_SEPARATOR = "<|endoftext|>"
_RECALL = {"needle": needle, "overwritten": overwritten, "chain": chain}
PARTS = ("book", *_RECALL, "repeat", "names", "babi")


class TrainingMix:
    """Samples without end; each follows from the seed and its index alone.

    Args:
        documents: the texts, of the training side of :func:`senri.data.corpus.split_documents`.
        tokenizer: a fast one (its offsets are needed).
        length: tokens of a sample.
        window: tokens that the model sees exactly; what is asked for lies further back.
        ratios: relative frequency of each of :data:`PARTS`; one that is not named does not come.
        chat: share of the samples with questions that ask them in the tokenizer's chat format, if it has one.
        babi: stories by task (:func:`senri.data.babilong.load_babi`, part ``train``).

    Raises:
        ValueError: an unknown part, no part at all, ``babi`` without stories, or ``length`` not above ``window``.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Any,
        *,
        length: int,
        window: int,
        ratios: Mapping[str, float],
        seed: int,
        chat: float = 0.2,
        babi: Mapping[str, Sequence[Story]] | None = None,
    ) -> None:
        _check_ratios(ratios, babi)
        if not documents:
            raise ValueError("there are no texts to train on: name files or folders with some")
        if not tokenizer.is_fast:
            raise ValueError("the training data needs a fast tokenizer: load it with AutoTokenizer and use_fast=True")
        self.tokenizer, self.window, self.seed = tokenizer, window, seed
        self.parts = [part for part in PARTS if ratios.get(part)]
        self._shares = list(accumulate(ratios[part] for part in self.parts))
        self.babi = {task: list(stories) for task, stories in (babi or {}).items() if stories}
        self.books = BookHaystack(documents, tokenizer, separator=_separator(tokenizer))
        self.digests = tuple(sorted({document.digest for document in documents}))
        self._forms = Forms(tokenizer, chat)
        self._set_length(length)

    def at_length(self, max_length: int) -> TrainingMix:
        """The mix with samples of another length, on the same texts."""
        other = copy(self)
        other._set_length(max_length)
        return other

    def _set_length(self, length: int) -> None:
        if length <= self.window and self.parts != ["book"]:
            raise ValueError(
                f"samples of {length:,} tokens never need the memory behind a window of {self.window:,}: train with "
                "a length above the window"
            )
        self.length = length

    def __getitem__(self, index: int) -> TrainingSample:
        """Sample number ``index``.

        Raises:
            SampleError: the texts are too short, or ``length`` does not hold such a sample.
        """
        rng = Random(f"{self.seed}/{index}")
        part = rng.choices(self.parts, cum_weights=self._shares)[0]
        if part in _RECALL:
            return self._recall(part, _RECALL[part], rng)
        return {"book": self._book, "repeat": self._repeat, "names": self._names, "babi": self._babi}[part](rng)

    def _book(self, rng: Random) -> TrainingSample:
        ids, _, source = self.books.stretch(self.length, rng)
        weight = np.ones(self.length, dtype=np.float32)
        weight[0] = 0
        return TrainingSample(ids, weight, np.zeros(self.length, dtype=np.int8), "book", source)

    def _recall(self, part: str, make: Callable[[Random, bool], Recall], rng: Random) -> TrainingSample:
        """Facts at sentence boundaries, the asked ones beyond the window, and the questions behind the text."""
        for small in (False, True):  # what does not fit is tried as small as it can be
            recall = make(rng, small)
            facts = [labelled(self.tokenizer, told) for told in recall.told]
            exchanges = [(e.prompt, e.answer) for e in self._forms.exchanges(recall.asked, rng)]
            at = self.length - sum(len(part) for exchange in exchanges for part in exchange)
            told = sum(len(ids) for ids, _ in facts)
            limit = at - self.window - told
            if limit >= 0:
                break
        else:
            raise SampleError(
                f"{self.length:,} tokens do not hold a fact beyond the window of {self.window:,} and a question "
                f"({self.length - limit:,} are needed): train with a greater length"
            )
        plants = [Plant(place, ids) for place, (ids, _) in zip(_places(recall, limit, at, rng), facts, strict=True)]
        stretch = self.books.stretch(at - told, rng)
        text, spans = plant(stretch, plants, at)
        assert all(spans[i][1] + self.window <= at for i in recall.needed)
        sample = self._sample(text, exchanges, part, stretch.source)
        for (start, stop), (_, labels) in zip(spans, facts, strict=True):
            sample.write[start:stop] = labels
        return sample

    def _sample(
        self, text: np.ndarray, exchanges: Sequence[tuple[list[int], list[int]]], task: str, source: str
    ) -> TrainingSample:
        """The text ``[N]`` as plain text, and questions and answers behind it: the answers are scored."""
        tail = [(token, scored) for pair in exchanges for scored, ids in enumerate(pair) for token in ids]
        ids = np.concatenate([text, np.array([token for token, _ in tail], dtype=np.int32)])
        weight = np.zeros(len(ids), dtype=np.float32)
        weight[len(text) :] = [scored for _, scored in tail]
        write = np.zeros(len(ids), dtype=np.int8)
        write[len(text) :] = -1
        return TrainingSample(ids, weight, write, task, source)

    def _repeat(self, rng: Random) -> TrainingSample:
        """A passage of the text once more, at another sentence boundary; its first ``SURPRISE`` tokens unscored."""
        most = min(LONGEST_COPY, (self.length - self.window) // 2)
        if most < SHORTEST_COPY:
            raise SampleError(
                f"{self.length:,} tokens do not hold a passage twice with a window of {self.window:,} between: train "
                f"with {self.window + 2 * SHORTEST_COPY:,} at least"
            )
        size = rng.randint(SHORTEST_COPY, most)
        ids, cuts, source = self.books.stretch(self.length - size, rng)
        again = _boundary(cuts, size + self.window, len(ids), rng)
        first = _boundary(cuts, 0, again - self.window - size, rng)
        ids = np.concatenate([ids[:again], ids[first : first + size], ids[again:]])
        weight = np.zeros(self.length, dtype=np.float32)
        weight[again + SURPRISE : again + size] = 1
        write = np.zeros(self.length, dtype=np.int8)
        write[first : first + size] = -1
        return TrainingSample(ids, weight, write, "repeat", source)

    def _names(self, rng: Random) -> TrainingSample:
        """Book text up to the end of a sentence with a name that was last seen beyond the window."""
        for _ in range(TRIES):
            stretch = self.books.stretch(self.length + max(self.length // 2, 256), rng)
            cloze = find_cloze(stretch, self.tokenizer, self.length, self.window, rng)
            if cloze is None:
                continue
            weight = np.zeros(self.length, dtype=np.float32)
            weight[slice(*cloze.name)] = 1
            write = np.zeros(self.length, dtype=np.int8)
            for span in (cloze.name, *cloze.others):
                write[slice(*span)] = -1  # whether they are asked for is nowhere to be seen
            for span in cloze.earlier:
                write[slice(*span)] = 1
            return TrainingSample(cloze.ids, weight, write, "names", stretch.source)
        raise SampleError(
            f"in {TRIES} places of the texts no name comes again after {self.window:,} tokens within {self.length:,}: "
            "train with a greater length, on texts with names, or without the part names"
        )

    def _babi(self, rng: Random) -> TrainingSample:
        """A story's facts spread through the text, and its question, as the evaluation asks it."""
        task = rng.choice(list(self.babi))
        for attempt in range(TRIES):
            story = rng.choice(self.babi[task])
            answer = encode(self.tokenizer, f" {story.answer}\n")
            every = replace(story, supporting=tuple(range(len(story.facts))))  # where all facts stand is wanted
            length = self.length - len(answer) + MAX_NEW_TOKENS
            try:
                context = babilong_context(every, self.books, self.tokenizer, length, rng, task)
                break
            except SampleError:
                if attempt == TRIES - 1:
                    raise
        (question,) = context.questions
        sample = self._sample(context.ids, [(list(question.prompt), answer)], "babi", context.source)
        sample.write[: len(encode(self.tokenizer, instruction(task)))] = -1
        for i, (start, stop) in enumerate(question.evidence):
            text = f" {story.facts[i]}"
            values = spans_of(question.answers, text) if i in story.supporting else ()
            sample.write[start:stop] = labelled(self.tokenizer, Told(text, values, ""))[1]
        return sample


def _check_ratios(ratios: Mapping[str, float], babi: Mapping[str, Sequence[Story]] | None) -> None:
    if unknown := [part for part in ratios if part not in PARTS]:
        raise ValueError(f"the training data has no part {', '.join(unknown)}; it has: {', '.join(PARTS)}")
    if min(ratios.values(), default=0) < 0 or not sum(ratios.values()) > 0:
        raise ValueError("the ratios of the training data must not be negative, and one must be above 0")
    if ratios.get("babi") and not any((babi or {}).values()):
        raise ValueError("the part babi needs stories: give a folder of bAbI, or set its ratio to 0")


def _separator(tokenizer: Any) -> int:
    """The token between two texts: where the end of a turn has one of its own, it is not that."""
    token = tokenizer.get_vocab().get(_SEPARATOR, tokenizer.eos_token_id)
    if token is None:
        raise ValueError("the tokenizer has no token that ends a text: set its eos_token")
    return token


def _places(recall: Recall, limit: int, at: int, rng: Random) -> list[float]:
    """Where the facts begin, about: the needed ones up to ``limit``, others up to ``at``."""
    if recall.ordered:
        last = rng.random() * limit
        return [*sorted(rng.random() * last for _ in recall.told[1:]), last]
    return [rng.random() * (limit if i in recall.needed else at) for i in range(len(recall.told))]


def _boundary(cuts: np.ndarray, low: int, high: int, rng: Random) -> int:
    """A sentence boundary in [low, high], or any place there where it has none."""
    inside = cuts[(cuts >= low) & (cuts <= high)]
    return int(rng.choice(inside)) if len(inside) else rng.randint(low, high)
