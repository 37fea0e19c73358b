"""Needle-in-a-haystack samples: facts hidden in text at known depths, and questions for them.

One generator for all variants: Senri's own (``NIAH``), and RULER's eight (``RULER_NIAH``; Hsieh et al. 2024,
arXiv:2404.06654, table 2: its numbers of keys, values and queries, its kinds, its haystacks; our wording).
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from senri.data.haystack import Haystack, Plant, RepeatedHaystack, SentenceHaystack, encode, plant
from senri.data.samples import Cell, Context, Question, SampleError
from senri.data.words import CITIES, FIRST_NAMES, FOODS, JOBS, LAST_NAMES, random_words

RULER_DEPTHS = 40  # RULER draws needle depths from this many, evenly spaced


@dataclass(frozen=True)
class Wording:
    """How a fact is told and asked for. ``{key}`` and ``{value}`` are filled in; a fact begins with a space."""

    fact: str
    question: str
    head: str = ""  # before the haystack


@dataclass(frozen=True)
class NeedleTask:
    """One variant of the test. ``key`` and ``value`` name a kind of :data:`KINDS`."""

    name: str
    wordings: tuple[Wording, ...]  # one a sample, in turn
    value: str
    key: str = "person"
    keys: int = 1  # facts with different keys; the ones not asked for distract
    values: int = 1  # facts with the same key; all are asked for
    queries: int = 1  # keys asked for in one question
    overwritten: int = 0  # earlier values of the same key, which must not be answered
    haystack: str = "books"  # books | filler | facts
    by_depth: bool = True  # False: every fact at a random depth
    max_new_tokens: int = 16
    stop: str | None = "\n"


def _person(rng: Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _code(rng: Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=3))
    return f"KEY-{letters}{rng.randrange(10**5):05d}"


KINDS: dict[str, Callable[[Random], str]] = {
    "code": _code,
    "digits": lambda rng: str(rng.randrange(10**4, 10**5)),
    "number": lambda rng: str(rng.randrange(10**6, 10**7)),
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "words": random_words,
    "person": _person,
    "city": lambda rng: rng.choice(CITIES),
    "food": lambda rng: rng.choice(FOODS),
    "job": lambda rng: rng.choice(JOBS),
}

_PLAIN = Wording(
    " The secret key is: {value}.", "\nQuestion: What is the secret key mentioned above?\nAnswer:"
)  # the form of SPEC section 6
_NAMED = Wording(
    " The secret key of {key} is: {value}.",
    "\nQuestion: What is the secret key of {key} mentioned above?\nAnswer:",
)
_PASSKEY = Wording(
    " The pass key is {value}. Remember it. {value} is the pass key.",
    "\nQuestion: What is the pass key mentioned above?\nAnswer: The pass key is",
)
_LAST = Wording(
    " The secret key of {key} is: {value}.",
    "\nQuestion: What is the last secret key of {key} mentioned above?\nAnswer:",
)
_ALL_VALUES = Wording(_NAMED.fact, "\nQuestion: What are all the secret keys of {key} mentioned above?\nAnswer:")
_ALL_KEYS = Wording(_NAMED.fact, "\nQuestion: What are the secret keys of {key} mentioned above?\nAnswer:")
# Never trained on: training draws from the wordings above only.
HELD_OUT = (
    (
        "city",
        Wording(
            " {key} was born in {value}.",
            "\nQuestion: In which city was {key} born?\nAnswer: {key} was born in",
        ),
    ),
    (
        "food",
        Wording(
            " What {key} likes to eat best is {value}.",
            "\nQuestion: What does {key} like to eat best?\nAnswer: {key} likes to eat",
        ),
    ),
    (
        "job",
        Wording(
            " For many years {key} worked as a {value}.",
            "\nQuestion: What did {key} work as?\nAnswer: {key} worked as a",
        ),
    ),
    (
        "number",
        Wording(
            " The telephone number of {key} is {value}.",
            "\nQuestion: What is the telephone number of {key}?\nAnswer: The telephone number is",
        ),
    ),
    (
        "words",
        Wording(
            " Whoever wants to enter the house of {key} has to say the password {value}.",
            "\nQuestion: Which password opens the house of {key}?\nAnswer: The password is",
        ),
    ),
)

NIAH: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("single", (_PLAIN,), "code"),
        NeedleTask("passkey", (_PASSKEY,), "digits", haystack="filler", max_new_tokens=8),
        NeedleTask("multikey", (_NAMED,), "code", keys=4),
        NeedleTask("multivalue", (_ALL_VALUES,), "code", values=4, by_depth=False, max_new_tokens=64),
        NeedleTask("multiquery", (_ALL_KEYS,), "code", keys=4, queries=4, by_depth=False, max_new_tokens=64),
        NeedleTask("overwritten", (_LAST,), "code", overwritten=2),
        *(NeedleTask(f"wording_{kind}", (wording,), kind, max_new_tokens=16) for kind, wording in HELD_OUT),
    )
}


def _ruler(name: str, key: str, value: str, haystack: str, **counts: int) -> NeedleTask:
    plural = {"number": "numbers", "uuid": "codes"}[value]
    several = counts.get("values", 1) > 1 or counts.get("queries", 1) > 1
    noun, verb, what = (f"magic {plural}", "are", "are all") if several else (f"magic {plural[:-1]}", "is", "is")
    wording = Wording(
        fact=f" The magic {plural[:-1]} of {{key}} is {{value}}.",
        head=f"The text below hides magic {plural}. Remember them well, for a question about them comes after it.\n",
        question=f"\nQuestion: What {what} the {noun} of {{key}} in the text above?"
        f"\nAnswer: The {noun} of {{key}} {verb}",
    )
    return NeedleTask(
        name, (wording,), value, key=key, haystack=haystack, by_depth=False, max_new_tokens=128, stop=None, **counts
    )


RULER_NIAH: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        _ruler("niah_single_1", "words", "number", "filler"),
        _ruler("niah_single_2", "words", "number", "books"),
        _ruler("niah_single_3", "words", "uuid", "books"),
        _ruler("niah_multikey_1", "words", "number", "books", keys=4),
        _ruler("niah_multikey_2", "words", "number", "facts"),
        _ruler("niah_multikey_3", "uuid", "uuid", "facts"),
        _ruler("niah_multivalue", "words", "number", "books", values=4),
        _ruler("niah_multiquery", "words", "number", "books", keys=4, queries=4),
    )
}


def needle_contexts(
    task: NeedleTask,
    books: Haystack,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    sample: int,
) -> list[Context]:
    """One sample of every cell of the grid: for each length and depth a context with its own facts.

    All lie in the same stretch of text, a depth has the same facts at every length, and the ones whose fact comes late
    stand first: so each shares its beginning with the one before it, up to the fact.

    Args:
        books: the haystack of tasks whose ``haystack`` is ``books``.
        lengths: tokens of a sample, the question and the room for the answer included.
        depths: of the asked fact, 0 (start) to 1 (end); unused where the task spreads its facts.
        seed, sample: together with the task's name they decide everything random.

    Raises:
        SampleError: a length does not hold the task, or the haystack is too short.
    """
    wording = task.wordings[sample % len(task.wordings)]
    base = f"{seed}/{task.name}/{sample}"
    stretch = _haystack(task, wording, books, tokenizer).stretch(max(lengths), Random(base))
    cells = [(n, d) for n in lengths for d in (depths if task.by_depth else [None])]
    cells.sort(key=lambda cell: -cell[0] * (cell[1] or 0.0) + 1e-6 * cell[0])
    contexts = []
    for length, depth in cells:
        facts = _Facts(task, wording, Random(f"{base}/{depth}"))
        question = encode(tokenizer, facts.question)
        head = encode(tokenizer, wording.head) if wording.head else []
        size = length - len(question) - task.max_new_tokens
        plants = [
            Plant(len(head) + place * max(size - len(head), 0), tuple(encode(tokenizer, text)))
            for text, place in facts.placed(depth)
        ]
        ids, spans = plant(stretch, plants, size, head)
        contexts.append(
            Context(
                ids,
                (
                    Question(
                        at=size,
                        prompt=tuple(question),
                        answers=tuple(facts.answers),
                        max_new_tokens=task.max_new_tokens,
                        cell={"task": task.name, "length": length, "depth": depth},
                        evidence=tuple(spans[i] for i in facts.asked),
                        stop=task.stop,
                    ),
                ),
                source=stretch.source,
            )
        )
    return contexts


class _Facts:
    """What is told and asked in one sample: ``texts`` in the order of telling, ``asked`` the ones that answer."""

    def __init__(self, task: NeedleTask, wording: Wording, rng: Random) -> None:
        self.task, self.rng = task, rng
        keys = _distinct(KINDS[task.key], task.keys, rng)
        per_key = max(task.values, task.overwritten + 1)
        values = _distinct(KINDS[task.value], task.keys * per_key, rng)
        self.texts, owners = [], []
        for i, key in enumerate(keys):
            for value in values[i * per_key : (i + 1) * per_key]:
                self.texts.append(wording.fact.format(key=key, value=value))
                owners.append(i)
        chosen = sorted(rng.sample(range(task.keys), task.queries))
        self.asked = [i for i, owner in enumerate(owners) if owner in chosen]
        if task.overwritten:
            self.asked = self.asked[-1:]
        self.answers = [values[i] for i in self.asked]
        self.question = wording.question.format(key=_listed([keys[i] for i in chosen]))

    def placed(self, depth: float | None) -> list[tuple[str, float]]:
        """Each text with its place in [0, 1]."""
        rng = self.rng
        if depth is None:
            grid = [i / (RULER_DEPTHS - 1) for i in range(RULER_DEPTHS)]
            return list(zip(self.texts, rng.sample(grid, len(self.texts)), strict=True))
        if self.task.overwritten:
            earlier = sorted(rng.random() * depth for _ in self.texts[1:])
            return list(zip(self.texts, [*earlier, depth], strict=True))
        return [(text, depth if i in self.asked else rng.random()) for i, text in enumerate(self.texts)]


def _haystack(task: NeedleTask, wording: Wording, books: Haystack, tokenizer: Any) -> Haystack:
    if task.haystack == "books":
        return books
    if task.haystack == "filler":
        return RepeatedHaystack(tokenizer)
    return SentenceHaystack(
        tokenizer, lambda rng: wording.fact.format(key=KINDS[task.key](rng), value=KINDS[task.value](rng))
    )


def _distinct(make: Callable[[Random], str], count: int, rng: Random) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(100 * count):
        found[make(rng)] = None
        if len(found) == count:
            return list(found)
    raise SampleError(f"{count:,} different names or values are asked for and there are fewer: ask for less")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def shared_context(
    books: Haystack,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    seed: int,
    sample: int,
) -> Context:
    """One long context with facts for every cell, read once: at each length the questions of that length are asked.

    Each fact has a key of its own (``The secret key of NAME is: ...``), so all others distract: harder than one fact
    in a context of its own, and cheaper by the number of cells.

    Raises:
        SampleError: see :func:`needle_contexts`.
    """
    task = NIAH["multikey"]
    wording = task.wordings[0]
    rng = Random(f"{seed}/shared/{sample}")
    cells: list[Cell] = [
        {"task": "shared", "length": n, "depth": d} for n in lengths for d in depths for _ in range(per_cell)
    ]
    names = _distinct(KINDS["person"], len(cells), rng)
    values = _distinct(KINDS["code"], len(cells), rng)
    questions = [tuple(encode(tokenizer, wording.question.format(key=name))) for name in names]
    facts = [
        tuple(encode(tokenizer, wording.fact.format(key=name, value=value)))
        for name, value in zip(names, values, strict=True)
    ]
    sizes = [
        cell["length"] - len(question) - task.max_new_tokens  # type: ignore[operator]
        for cell, question in zip(cells, questions, strict=True)
    ]
    plants = []
    for i, (cell, size) in enumerate(zip(cells, sizes, strict=True)):
        first = i - i % per_cell
        latest = size - sum(map(len, facts[first : first + per_cell]))  # none may slip behind its question
        plants.append(Plant(min(cell["depth"] * size, latest), facts[i]))  # type: ignore[operator]
    stretch = books.stretch(max(lengths), rng)
    ids, spans = plant(stretch, plants, max(sizes))
    order = sorted(range(len(cells)), key=lambda i: sizes[i])
    return Context(
        ids,
        tuple(
            Question(sizes[i], questions[i], (values[i],), task.max_new_tokens, cells[i], (spans[i],), stop=task.stop)
            for i in order
        ),
        source=stretch.source,
    )


def distance_context(
    books: Haystack,
    tokenizer: Any,
    *,
    distances: Sequence[int],
    facts: int,
    seed: int,
    sample: int,
) -> Context:
    """Facts at the start of one long text, asked for again and again: after each of ``distances`` tokens since they
    were told. The cell's ``distance`` counts from the last fact's end to the question.
    """
    task = NIAH["multikey"]
    wording = task.wordings[0]
    rng = Random(f"{seed}/recall_by_writes/{sample}")
    names, values = _distinct(KINDS["person"], facts, rng), _distinct(KINDS["code"], facts, rng)
    told = [
        tuple(encode(tokenizer, wording.fact.format(key=name, value=value)))
        for name, value in zip(names, values, strict=True)
    ]
    head = sum(map(len, told))
    stretch = books.stretch(max(distances), rng)
    ids, spans = plant(stretch, [Plant(0.0, fact) for fact in told], head + max(distances))
    questions = [
        Question(
            head + distance,
            tuple(encode(tokenizer, wording.question.format(key=name))),
            (value,),
            task.max_new_tokens,
            {"task": "recall_by_writes", "distance": distance},
            (span,),
        )
        for distance in sorted(distances)
        for name, value, span in zip(names, values, spans, strict=True)
    ]
    return Context(ids, tuple(questions), source=stretch.source)
