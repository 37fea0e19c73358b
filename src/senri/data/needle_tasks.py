"""The variants of the needle-in-a-haystack test: what is hidden, in what words, and what is asked.

One description for all variants: Senri's own (``NIAH``), and RULER's eight (``RULER_NIAH``; Hsieh et al. 2024,
arXiv:2404.06654, table 2: its numbers of keys, values and queries, its kinds, its haystacks; our wording).
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from senri.data.words import CITIES, FIRST_NAMES, FOODS, JOBS, LAST_NAMES, random_words


@dataclass(frozen=True)
class Wording:
    """How a fact is told and asked for. ``{key}`` and ``{value}`` are filled in; a fact begins with a space."""

    fact: str
    question: str
    head: str = ""  # before the haystack
    reworded: tuple[str, ...] = ()  # as somebody asks who does not remember the fact's words


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

# The questions begin the answer in the fact's own words, as RULER's do: a small model that was never taught a form of
# answer finds what stands in plain sight four times as often (docs/LOG.md). "single_free" leaves the answer open.
_FREE = Wording(" The secret key is: {value}.", "\n\nQuestion: What is the secret key mentioned above?\nAnswer:")
_PLAIN = Wording(
    _FREE.fact, _FREE.question + " The secret key is:",
    reworded=("What was the key that is secret?", "I have forgotten the secret key. What is it?"),
)  # fmt: skip
_PASSKEY = Wording(
    " The pass key is {value}. Remember it. {value} is the pass key.",
    "\n\nQuestion: What is the pass key mentioned above?\nAnswer: The pass key is",
)


def _named(asked: str, begun: str, verb: str, *reworded: str) -> Wording:
    question = f"\n\nQuestion: What {asked} of {{key}} mentioned above?\nAnswer: The {begun} of {{key}} {verb}"
    return Wording(" The secret key of {key} is: {value}.", question, reworded=reworded)


_NAMED = _named(
    "is the secret key", "secret key", "is:", "Which key does {key} keep secret?", "I need {key}'s key. What is it?"
)
_LAST = _named(
    "is the last secret key", "last secret key", "is:", "Which secret key has {key} now?",
    "What is the newest secret key of {key}?",
)  # fmt: skip
_ALL = _named("are all the secret keys", "secret keys", "are:")
# Never trained on: training draws from the wordings above only.
HELD_OUT = (
    (
        "city",
        Wording(
            " {key} was born in {value}.",
            "\n\nQuestion: In which city was {key} born?\nAnswer: {key} was born in",
            reworded=("Where was {key} born?", "What is {key}'s birthplace?", "Can you tell me where {key} was born?"),
        ),
    ),
    (
        "food",
        Wording(
            " What {key} likes to eat best is {value}.",
            "\n\nQuestion: What does {key} like to eat best?\nAnswer: {key} likes to eat",
            reworded=(
                "What is {key}'s favourite food?",
                "Which food does {key} like best?",
                "What does {key} prefer to eat?",
            ),
        ),
    ),
    (
        "job",
        Wording(
            " {key} earned a living for many years as {value}.",
            "\n\nQuestion: As what did {key} earn a living?\nAnswer: {key} earned a living as",
            reworded=("What did {key} do for a living?", "What was {key}'s job?", "What was the profession of {key}?"),
        ),
    ),
    (
        "number",
        Wording(
            " The telephone number of {key} is {value}.",
            "\n\nQuestion: What is the telephone number of {key}?\nAnswer: The telephone number is",
            reworded=(
                "What's the phone number of {key}?",
                "Which number must I call to reach {key}?",
                "Please give me {key}'s telephone number.",
            ),
        ),
    ),
    (
        "words",
        Wording(
            " Whoever wants to enter the house of {key} has to say the password {value}.",
            "\n\nQuestion: Which password opens the house of {key}?\nAnswer: The password is",
            reworded=(
                "What is the password of {key}'s house?",
                "What must one say to enter the house of {key}?",
                "How can I get into the house of {key}?",
            ),
        ),
    ),
)

NIAH: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("single", (_PLAIN,), "code"),
        NeedleTask("single_free", (_FREE,), "code"),
        NeedleTask("passkey", (_PASSKEY,), "digits", haystack="filler", max_new_tokens=8),
        NeedleTask("multikey", (_NAMED,), "code", keys=4),
        NeedleTask("multivalue", (_ALL,), "code", values=4, by_depth=False, max_new_tokens=64),
        NeedleTask("multiquery", (_ALL,), "code", keys=4, queries=4, by_depth=False, max_new_tokens=64),
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
        question=f"\n\nQuestion: What {what} the {noun} of {{key}} in the text above?"
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
