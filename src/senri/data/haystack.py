"""Text to hide facts in, as token ids, and the hiding: exact lengths, at places where a sentence may stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np

from senri.data.corpus import Document
from senri.data.samples import SampleError

# The filler of the passkey test (Mohtashami & Jaggi 2023), which Infini-attention and RULER use too.
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Stretch(NamedTuple):
    """Token ids and the places between them where a sentence may be put in."""

    ids: np.ndarray  # [N] int32
    cuts: np.ndarray  # [C] sorted positions in [0, N]; the first is 0, the last N
    source: str


class Haystack(Protocol):
    """Anything that facts can be hidden in."""

    def stretch(self, length: int, rng: Random) -> Stretch:
        """``length`` tokens, the same for the same state of ``rng``.

        Raises:
            SampleError: there is less text.
        """
        ...


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class BookHaystack:
    """Stretches of real texts: a random place in a random text, from a sentence's start on, through as many texts as
    it takes; no text twice in one stretch.

    Args:
        documents: at least one; a long text is as likely as its length.
        separator: id of a token that a stretch has between two texts.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Any, separator: int | None = None) -> None:
        self.documents, self.tokenizer = list(documents), tokenizer
        self.separator = np.array([] if separator is None else [separator], dtype=np.int32)
        self._ids: dict[int, np.ndarray] = {}
        self._sizes = list(accumulate(len(d.text) for d in self.documents))
        self.ends, self.starts = sentence_tables(tokenizer)

    def ids(self, index: int) -> np.ndarray:
        """Token ids of one document, kept."""
        if index not in self._ids:
            self._ids[index] = np.array(encode(self.tokenizer, self.documents[index].text), dtype=np.int32)
        return self._ids[index]

    def stretch(self, length: int, rng: Random) -> Stretch:
        """See :class:`Haystack`."""
        count = len(self.documents)
        first = rng.choices(range(count), cum_weights=self._sizes)[0]
        start = self._next_start(first, int(rng.random() * len(self.ids(first))))
        parts, names, missing = [self.ids(first)[start:]], [self.documents[first].name], length
        missing -= len(parts[0])
        for step in range(1, count + 1):
            if missing <= 0:
                break
            index = (first + step) % count
            more = self.ids(index)[: start if index == first else None]
            parts += [self.separator, more]
            names.append(self.documents[index].name)
            missing -= len(self.separator) + len(more)
        if missing > 0:
            raise SampleError(
                f"the haystack has {length - missing:,} tokens and a sample needs {length:,}: give it more text, or "
                "ask for shorter lengths"
            )
        ids = np.concatenate(parts)[:length]
        return Stretch(ids, self.cuts(ids), " + ".join(dict.fromkeys(names)))

    def disjoint(self, length: int, count: int, rng: Random) -> list[Stretch]:
        """``count`` stretches of one document each that have no token in common.

        Raises:
            SampleError: there is less text.
        """
        places = []
        for index, document in enumerate(self.documents):
            if len(document.text.encode()) >= length:  # a token has a byte at least
                starts = range(0, len(self.ids(index)) - length + 1, length)
                places += [(index, start) for start in starts]
        if len(places) < count:
            raise SampleError(
                f"the haystack has {len(places)} separate stretches of {length:,} tokens and {count} are needed: "
                "give it more text, or ask for fewer or shorter ones"
            )
        chosen = rng.sample(places, count)
        stretches = ((self.ids(i)[start : start + length], self.documents[i].name) for i, start in chosen)
        return [Stretch(ids, self.cuts(ids), name) for ids, name in stretches]

    def cuts(self, ids: np.ndarray) -> np.ndarray:
        """Where a sentence ends, before the next one or the paragraph's end; and both ends of the whole."""
        inside = np.flatnonzero(self.ends[ids[:-1]] & self.starts[ids[1:]]) + 1
        return np.unique(np.concatenate([[0], inside, [len(ids)]]))

    def _next_start(self, index: int, position: int) -> int:
        """The first sentence's start from ``position`` on; in a text without one, ``position`` itself."""
        ids = self.ids(index)[position:]
        size = 512  # looked through in growing parts: a book is long and the next sentence near
        while len(cuts := self.cuts(ids[:size])) == 2 and size < len(ids):
            size *= 2
        return position + int(cuts[1]) if len(cuts) > 2 else position


class RepeatedHaystack:
    """One sentence or a few, over and over."""

    def __init__(self, tokenizer: Any, text: str = FILLER) -> None:
        self.unit = np.array(encode(tokenizer, text), dtype=np.int32)

    def stretch(self, length: int, rng: Random) -> Stretch:
        """See :class:`Haystack`; needs no ``rng``."""
        times = -(-length // len(self.unit))
        cuts = np.arange(times + 1) * len(self.unit)
        return Stretch(np.tile(self.unit, times)[:length], np.unique(np.minimum(cuts, length)), "repeated filler")


class SentenceHaystack:
    """Sentences made one by one, e.g. needles that nobody asks for.

    Args:
        make: ``rng -> sentence``, beginning with a space.
    """

    def __init__(self, tokenizer: Any, make: Any) -> None:
        self.tokenizer, self.make = tokenizer, make

    def stretch(self, length: int, rng: Random) -> Stretch:
        """See :class:`Haystack`."""
        ids: list[int] = []
        cuts = [0]
        while len(ids) < length:
            ids += encode(self.tokenizer, self.make(rng))
            cuts.append(min(len(ids), length))
        return Stretch(np.array(ids[:length], dtype=np.int32), np.array(cuts), "sentences of the same kind")


@dataclass(frozen=True)
class Plant:
    """A sentence and where its first token shall stand in the finished context, about."""

    position: float
    ids: tuple[int, ...]


def plant(
    stretch: Stretch, plants: Sequence[Plant], length: int, head: Sequence[int] = ()
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """``head``, then the stretch with every plant at the last sentence boundary up to its position; ``length`` tokens.

    A plant keeps its place whatever comes behind it, so that contexts of different length share their beginning.

    Returns:
        ids ``[length]`` int32, and for each plant, in the order given, its ``[start, end)``.

    Raises:
        SampleError: the plants do not fit, or the stretch is too short.
    """
    room = length - len(head) - sum(len(p.ids) for p in plants)
    if room < 0 or room > len(stretch.ids):
        wanted = length - room
        raise SampleError(
            f"a context of {length:,} tokens does not hold its facts and instructions ({wanted:,} tokens): ask for a "
            "longer one"
            if room < 0
            else f"the stretch has {len(stretch.ids):,} tokens and the context needs {room:,}"
        )
    parts: list[np.ndarray] = [np.array(head, dtype=np.int32)]
    spans: dict[int, tuple[int, int]] = {}
    used, done = 0, len(head)  # tokens taken of the stretch, laid in the context
    cuts = stretch.cuts[stretch.cuts < room]  # the context's end may cut a sentence: no place for another one
    for index in sorted(range(len(plants)), key=lambda i: plants[i].position):
        aim = used + plants[index].position - done
        later = cuts[cuts >= used]
        later = later if len(later) else np.array([room])
        cut = int(later[max(int(np.searchsorted(later, aim, side="right")) - 1, 0)])
        parts += [stretch.ids[used:cut], np.array(plants[index].ids, dtype=np.int32)]
        done += cut - used
        spans[index] = (done, done + len(plants[index].ids))
        used, done = cut, spans[index][1]
    parts.append(stretch.ids[used:room])
    return np.concatenate(parts).astype(np.int32), [spans[i] for i in range(len(plants))]


@lru_cache(maxsize=4)
def sentence_tables(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of every token id: whether it ends a sentence, and whether it begins a new word after a space or ends a line."""
    size = len(tokenizer)
    words = tokenizer.batch_decode([[i] for i in range(size)])
    closing = "\"'”’)] "
    ends = np.array([w.rstrip(closing).endswith((".", "!", "?")) for w in words])
    starts = np.array([w[:1] in ("\n", "\r") or (w[:1] == " " and w[1:2].isalnum()) for w in words])
    return ends, starts
