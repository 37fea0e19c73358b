"""What a training sample tells and what it asks, as texts: needles, overwritten facts, chains."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np

from senri.data.training_facts import FIRST, KINDS, ROOMS, TELLINGS, Telling
from senri.data.training_questions import other_questions

ABOVE = " mentioned above"
COLON_LEFT_OUT = 0.3  # share of the answers
OTHERWISE = 0.6  # share of the questions that are not in the words in which the fact is told
_WHAT = "What is the "


class Told(NamedTuple):
    """A fact; it begins with a space."""

    text: str
    values: tuple[tuple[int, int], ...]  # [start, end) of the characters of every value in it
    about: str  # what it says something of: told again with another value, it is no longer true


class Asked(NamedTuple):
    """A question and its answer in two parts."""

    question: str
    begun: str  # the answer up to the value
    value: str
    fact: int  # number of the fact that answers


@dataclass(frozen=True)
class Recall:
    """Facts and questions for some of them."""

    told: tuple[Told, ...]
    needed: frozenset[int]  # the facts that the answers rest on
    asked: tuple[Asked, ...]
    ordered: bool = False  # the facts must be told in this order


class Link(NamedTuple):
    """How a name is given a number, how it is given another name's, and how it is asked for."""

    first: str
    next: str
    question: str
    begun: str


# None of them is RULER's variable tracking, or worded as ours (senri.data.ruler).
LINKS = (
    Link(" Drawer {key} holds the number {value}.", " Drawer {key} holds the same number as drawer {value}.",
         "Which number does drawer {key} hold?", "Drawer {key} holds the number"),
    Link(" The signal {key} means {value}.", " The signal {key} means the same as the signal {value}.",
         "Which number does the signal {key} mean?", "The signal {key} means"),
    Link(" Let {key} be equal to {value}.", " Let {key} be equal to {value}.",
         "Which number is {key} equal to?", "{key} is equal to"),
    Link(" Set {key} to {value}.", " Set {key} to {value}.", "Which number is {key} set to?", "{key} is set to"),
    Link(" The price of {key} is {value}.", " The price of {key} is the price of {value}.",
         "How much is the price of {key}?", "The price of {key} is"),
)  # fmt: skip


def tell(fact: str, key: str, value: str, about: str = "") -> Told:
    """The fact with ``{key}`` and every ``{value}`` filled in.

    Args:
        about: by default the fact up to its value, the same with a colon before that and without; the whole fact
            around it where whose it is comes later.
    """
    text, *rest = fact.format(key=key, value="\0").split("\0")
    spans = []
    for part in rest:
        spans.append((len(text), len(text) + len(value)))
        text += value + part
    before = text[: spans[0][0]].rstrip(": ")
    return Told(text, tuple(spans), about or (before if key in before else fact.format(key=key, value="...")))


def labelled(tokenizer: Any, told: Told) -> tuple[tuple[int, ...], np.ndarray]:
    """A fact's token ids, and for each: 1 for the values and the token right behind each, else -1.

    A space that is a token of its own belongs to its value, as in the answer: before numbers there is one.
    """
    coded = tokenizer(told.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = np.full(len(coded["input_ids"]), -1, dtype=np.int8)
    for start, stop in told.values:
        inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < stop and b > start]
        a, b = coded["offset_mapping"][max(inside[0] - 1, 0)]
        labels[inside[0] - (told.text[a:b] == " ") : inside[-1] + 2] = 1
    return tuple(coded["input_ids"]), labels


def needle(rng: Random, small: bool = False) -> Recall:
    """One, two or four facts, half of the time all of one kind (which distract), and one to three questions.

    Args:
        small: as little as there can be: one fact, one question.
    """
    count = 1 if small else rng.choice((1, 2, 4))
    asked = rng.sample(range(count), 1 if small else rng.randint(1, min(3, count)))
    first = _telling(rng)
    alike = rng.random() < 0.5 and first.key != ""
    facts: list[tuple[Telling, str, str]] = []
    while len(facts) < count:
        telling = first if alike or not facts else _telling(rng)
        fact = telling, _draw(telling.key, rng), _draw(telling.value, rng)
        if not any(_confusable(fact, other) for other in facts):
            facts.append(fact)
    return Recall(
        tuple(tell(telling.fact, key, value) for telling, key, value in facts),
        frozenset(asked),
        tuple(_ask(*facts[i], rng, fact=i) for i in asked),
    )


def overwritten(rng: Random, small: bool = False) -> Recall:
    """One fact told two or three times with other values each time; half of the questions say that the last is meant.

    Args:
        small: two times.
    """
    telling = _telling(rng)
    key = _draw(telling.key, rng)
    values = _distinct(telling.value, 2 if small else rng.randint(2, 3), rng)
    return Recall(
        tuple(tell(telling.fact, key, value) for value in values),
        frozenset([len(values) - 1]),
        (_ask(telling, key, values[-1], rng, fact=len(values) - 1, last=rng.random() < 0.5),),
        ordered=True,
    )


def chain(rng: Random, small: bool = False) -> Recall:
    """A number that goes from name to name, one to four times, and the question which number a later name has; half of
    the time a second chain lies between.

    Args:
        small: one chain of two facts.
    """
    link = rng.choice(LINKS)
    sizes = [2] if small else [rng.randint(2, 5), rng.choice((0, rng.randint(2, 5)))]
    names, values = _names(sum(sizes), rng), _distinct("number", 2, rng)
    owners = [0] * sizes[0] + [1] * sum(sizes[1:])
    rng.shuffle(owners)
    told: list[Told] = []
    last = ["", ""]
    needed: list[int] = []
    target = sizes[0] - 1 if rng.random() < 0.5 else rng.randint(1, sizes[0] - 1)
    asked = Asked("", "", "", 0)
    for owner, name in zip(owners, names, strict=True):
        told.append(tell(link.next if last[owner] else link.first, name, last[owner] or values[owner]))
        last[owner] = name
        if owner == 0 and len(needed) <= target:
            needed.append(len(told) - 1)
            asked = Asked(link.question.format(key=name), link.begun.format(key=name), values[0], len(told) - 1)
    return Recall(tuple(told), frozenset(needed), (asked,), ordered=True)


_MOVES = (" {key} moved to the {value}.", " {key} went to the {value}.", " {key} journeyed to the {value}.",
          " {key} travelled to the {value}.", " {key} went back to the {value}.")  # fmt: skip


def whereabouts(rng: Random, small: bool = False) -> Recall:
    """Persons who go from room to room, and the question where one or two of them are: the sentences of bAbI's first
    task (Weston et al. 2015, arXiv:1502.05698), with other names and more rooms.

    Args:
        small: one person, two rooms.
    """
    names = rng.sample(FIRST, 1 if small else rng.randint(1, 4))
    told: list[Told] = []
    last: dict[str, tuple[int, str]] = {}
    for number in range(2 if small else rng.randint(len(names), 6)):
        name = names[number] if number < len(names) else rng.choice(names)
        room = rng.choice([room for room in ROOMS if room != (last[name][1] if name in last else None)])
        told.append(tell(rng.choice(_MOVES), name, room, f" {name} is in"))
        last[name] = number, room
    asked = rng.sample(sorted(last), min(len(last), rng.randint(1, 2)))
    return Recall(
        tuple(told),
        frozenset(last[name][0] for name in asked),
        tuple(Asked(f"Where is {name}?", f"{name} is in the", last[name][1], last[name][0]) for name in asked),
        ordered=True,
    )


_TIMES = [telling.times for telling in TELLINGS]


def _telling(rng: Random) -> Telling:
    return rng.choices(TELLINGS, _TIMES)[0]


def _draw(kind: str, rng: Random) -> str:
    return KINDS[kind](rng) if kind else ""


def _distinct(kind: str, count: int, rng: Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(kind, rng)] = None
    return list(found)


def _names(count: int, rng: Random) -> list[str]:
    """Names of one make: capitals alone, or with digits."""
    letters, digits = rng.choice(((2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (2, 2)))
    found: dict[str, None] = {}
    while len(found) < count:
        name = [*rng.choices(string.ascii_uppercase, k=letters), *rng.choices(string.digits, k=digits)]
        found["".join(name)] = None
    return list(found)


def _confusable(a: tuple[Telling, str, str], b: tuple[Telling, str, str]) -> bool:
    """Whether one's question could mean the other, or both have the same value."""
    one, two = (_stem(telling).format(key=key) for telling, key, _ in (a, b))
    if a[1] and b[1] and (a[1].startswith(b[1]) or b[1].startswith(a[1])):  # many questions end with the name
        return True
    return one.startswith(two) or two.startswith(one) or a[2] == b[2]


def _stem(telling: Telling) -> str:
    return telling.question.removesuffix("?").removesuffix(ABOVE)


def _ask(telling: Telling, key: str, value: str, rng: Random, *, fact: int, last: bool = False) -> Asked:
    question = rng.choice(other_questions(telling)) if rng.random() < OTHERWISE else telling.question
    stem, mark, begun = question[:-1].removesuffix(ABOVE), question[-1], telling.begun
    plain = stem.startswith(_WHAT)
    if last and plain:
        stem, begun = stem.replace(_WHAT, f"{_WHAT}last ", 1), begun.replace("The ", "The last ", 1)
    elif last:
        stem += " according to what was said last"
    if plain and rng.random() < 0.5:
        stem += ABOVE
        if rng.random() < 0.5:  # as models answer
            begun = re.sub(" is(:?)$", rf"{ABOVE} is\1", begun)
    if rng.random() < COLON_LEFT_OUT:
        begun = begun.removesuffix(":")
    return Asked(f"{stem}{mark}".format(key=key), begun.format(key=key), value, fact)


def spans_of(words: Sequence[str], text: str) -> tuple[tuple[int, int], ...]:
    """[start, end) of every place where one of the words stands in the text, whole."""
    places = []
    for word in words:
        start = text.find(word)
        while start >= 0:
            end = start + len(word)
            if not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
                places.append((start, end))
            start = text.find(word, end)
    return tuple(sorted(places))
