"""Names in a text, found by their tokens: capitalised words inside a sentence."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np

from senri.data.haystack import Stretch, encode, sentence_tables

SHORTEST = 3  # letters; shorter ones are Mr, I, Oh
# What books write with a capital and nobody remembers by it.
_NO_NAMES = ("Mrs", "Miss", "Sir", "Madam", "Lord", "Lady", "God", "The", "And", "But", "You", "That", "This", "What")

Span = tuple[int, int]  # [start, end)


class Cloze(NamedTuple):
    """A text that ends with a sentence in which a name comes again."""

    ids: np.ndarray  # [T] int32
    name: Span  # the place asked for
    earlier: tuple[Span, ...]  # where it stood before, all of them further back than the window
    others: tuple[Span, ...]  # all other names


def find_cloze(stretch: Stretch, tokenizer: Any, length: int, window: int, rng: Random) -> Cloze | None:
    """``length`` tokens out of a longer stretch, with a name at the end that does not stand in the ``window`` tokens
    before it, but earlier; None where there is none.
    """
    ids = stretch.ids
    words = _capitalised(ids, tokenizer)
    ends = stretch.cuts[1:-1]  # where a sentence is whole
    found = []
    for word, spots in words.items():
        for (before, _), (spot, inside) in pairwise(spots):
            end = int(next(iter(ends[np.searchsorted(ends, spot + len(word)) :]), 0))
            if inside and end >= length and before >= end - length and spot - before - len(word) >= window:
                found.append((word, spot, end))
    rng.shuffle(found)
    for word, spot, end in found:
        text = tokenizer.decode(list(word)).strip()
        glued = tuple(encode(tokenizer, text))  # as it is written behind a quotation mark
        elsewhere = _find(ids[end - length : spot], glued)
        common = text in _NO_NAMES or _find(ids, tuple(encode(tokenizer, f" {text.lower()}")))
        if common or any(start + window + len(glued) > spot - end + length for start in elsewhere):
            continue
        first = end - length
        spans = {w: [(s - first, s - first + len(w)) for s, _ in s_ if first <= s < end] for w, s_ in words.items()}
        earlier = [span for span in spans[word] if span[0] < spot - first]
        earlier += [(start, start + len(glued)) for start in elsewhere]
        others = [span for w, places in spans.items() if w != word for span in places]
        name = (spot - first, spot - first + len(word))
        return Cloze(ids[first:end], name, tuple(sorted(earlier)), tuple(others))
    return None


def _capitalised(ids: np.ndarray, tokenizer: Any) -> dict[tuple[int, ...], list[tuple[int, bool]]]:
    """Every capitalised word, as its tokens, and where it stands: the first token, and whether inside a sentence."""
    capital, small, joined, letters = _word_tables(tokenizer)
    ends, _ = sentence_tables(tokenizer)
    words: dict[tuple[int, ...], list[tuple[int, bool]]] = {}
    for start in np.flatnonzero(capital[ids]).tolist():
        end = start + 1
        while end < len(ids) and small[ids[end]]:
            end += 1
        if end < len(ids) and not joined[ids[end]] and letters[ids[start:end]].sum() >= SHORTEST:
            inside = start > 0 and not ends[ids[start - 1]]
            words.setdefault(tuple(ids[start:end].tolist()), []).append((start, inside))
    return words


def _find(ids: np.ndarray, part: tuple[int, ...]) -> list[int]:
    """Where the part begins in the ids."""
    hit = np.ones(max(len(ids) - len(part) + 1, 0), dtype=bool)
    for offset, token in enumerate(part):
        hit &= ids[offset : offset + len(hit)] == token
    return np.flatnonzero(hit).tolist()


@lru_cache(maxsize=4)
def _word_tables(tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every token id: whether it begins a capitalised word, is small letters that go on with one, or would make
    another word of it; and how many letters it has.
    """
    tokens = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    small = [t.isalpha() and t.islower() for t in tokens]
    capital = [
        t[:1] == " " and t[1:2].isupper() and (len(t) == 2 or (t[2:].isalpha() and t[2:].islower())) for t in tokens
    ]
    joined = [t[:1].isalnum() or t[:1] in ("�", "_", "-") for t in tokens]
    return np.array(capital), np.array(small), np.array(joined), np.array([len(t.strip()) for t in tokens])
