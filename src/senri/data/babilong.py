"""BABILong (Kuratov et al. 2024, arXiv:2406.10149): the facts of a bAbI story (Weston et al. 2015, arXiv:1502.05698) in
order, at random places of a book, and the story's question behind it. The tasks are the paper's qa1 to qa10; the
wording of instructions and examples is our own, and the examples' names and places are none of bAbI's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from senri.data.haystack import Haystack, Plant, encode, plant
from senri.data.samples import Context, Question, SampleError
from senri.data.text import TextError, iter_text

MAX_NEW_TOKENS = 8
HEAD = (
    "Short facts about {about} stand hidden in the text below, among sentences that have nothing to do with them. "
    "Answer the question that follows the text from these facts alone. {rule} Write {form} and nothing else.\n\n"
    "{examples}\n\nText:\n"
)
EXAMPLE = "Example: {facts}\nQuestion: {question}\nAnswer: {answer}"
TAIL = "\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Story:
    """A bAbI question and all facts told before it."""

    facts: tuple[str, ...]
    question: str
    answer: str  # several are joined by commas (qa8)
    supporting: tuple[int, ...]  # which of the facts the answer rests on


class Task(NamedTuple):
    """What is told of a task before its text, and every answer it has."""

    about: str
    rule: str
    form: str
    examples: tuple[tuple[str, str, str], ...]  # facts, question, answer
    labels: tuple[str, ...]


_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_LAST = "A person is where that person went last."
_CARRY = "A thing goes wherever the person who has it goes, and stays where it was put down."
_THINGS = "what persons pick up, put down and give away"

TASKS: dict[str, Task] = {
    "qa1": Task(
        "where persons go",
        _LAST,
        "one word",
        (
            ("Anna went to the attic. Peter moved to the porch. Anna travelled to the barn.", "Where is Anna?", "barn"),
            ("Rosa journeyed to the cellar. Peter went back to the attic.", "Where is Rosa?", "cellar"),
        ),
        _PLACES,
    ),
    "qa2": Task(
        "where persons go and what they carry",
        _CARRY,
        "one word",
        (
            ("Anna took the lamp. Anna went to the attic.", "Where is the lamp?", "attic"),
            ("Peter went to the barn. Peter got the rope. Peter dropped the rope. Peter moved to the porch.",
             "Where is the rope?", "barn"),
        ),
        _PLACES,
    ),
    "qa3": Task(
        "where persons go and what they carry",
        _CARRY,
        "one word",
        (
            ("Anna took the lamp. Anna went to the attic. Anna moved to the porch.",
             "Where was the lamp before the porch?", "attic"),
            ("Peter got the rope. Peter went to the barn. Rosa went to the porch. Peter travelled to the cellar.",
             "Where was the rope before the cellar?", "barn"),
        ),
        _PLACES,
    ),
    "qa4": Task(
        "how places lie to each other",
        "Each fact holds in both directions.",
        "one word",
        (
            ("The attic is north of the cellar. The porch is north of the attic.", "What is north of the attic?",
             "porch"),
            ("The barn is west of the shed. The shed is west of the cellar.", "What is the shed west of?", "cellar"),
        ),
        _PLACES,
    ),
    "qa5": Task(
        "what persons pick up and give to each other",
        "",
        "one word",
        (
            ("Anna picked up the lamp there. Anna gave the lamp to Peter.", "Who did Anna give the lamp to?", "Peter"),
            ("Rosa took the rope there. Rosa handed the rope to Anna.", "What did Rosa give to Anna?", "rope"),
        ),
        ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    ),
    "qa6": Task(
        "where persons go",
        _LAST,
        "yes or no",
        (
            ("Anna went to the attic. Anna moved to the barn.", "Is Anna in the barn?", "yes"),
            ("Peter went to the porch. Peter travelled to the cellar.", "Is Peter in the porch?", "no"),
        ),
        ("no", "yes"),
    ),
    "qa7": Task(
        _THINGS,
        "Count what the person has in the end.",
        "none, one, two or three",
        (
            ("Anna got the lamp there. Anna took the rope there.", "How many objects is Anna carrying?", "two"),
            ("Peter grabbed the book. Peter gave the book to Rosa.", "How many objects is Peter carrying?", "none"),
        ),
        ("none", "one", "three", "two"),
    ),
    "qa8": Task(
        _THINGS,
        "Name what the person has in the end.",
        "the things, with commas between them, or nothing,",
        (
            ("Anna got the lamp there. Anna took the rope there.", "What is Anna carrying?", "lamp,rope"),
            ("Peter grabbed the book. Peter gave the book to Rosa.", "What is Peter carrying?", "nothing"),
        ),
        ("apple", "football", "milk", "nothing"),
    ),
    "qa9": Task(
        "where persons are and where they are not",
        _LAST,
        "yes or no",
        (
            ("Anna is in the attic. Peter went to the barn.", "Is Peter in the barn?", "yes"),
            ("Rosa went to the porch. Rosa is no longer in the porch.", "Is Rosa in the porch?", "no"),
        ),
        ("no", "yes"),
    ),
    "qa10": Task(
        "where persons are or may be",
        _LAST,
        "yes, no or maybe",
        (
            ("Anna is either in the attic or the barn.", "Is Anna in the barn?", "maybe"),
            ("Peter is in the porch. Peter went to the cellar.", "Is Peter in the porch?", "no"),
        ),
        ("maybe", "no", "yes"),
    ),
}  # fmt: skip


def load_babi(folder: str | Path, task: str, part: Literal["train", "test"]) -> list[Story]:
    """The stories of a task, one a question, from a folder of bAbI v1.2 (``tasks_1-20_v1-2/en`` or ``en-10k``).

    Raises:
        TextError: no such file, or a line that is not bAbI's.
    """
    files = sorted(Path(folder).glob(f"{task}_*_{part}.txt"))
    if not files:
        raise TextError(f"{folder} has no {task}_*_{part}.txt: give a folder like bAbI's tasks_1-20_v1-2/en")
    stories = []
    facts: dict[int, str] = {}  # by the number of the line in the story
    for place, line in enumerate("".join(iter_text(files[0])).splitlines(), start=1):
        try:
            number, text = line.split(" ", 1)
            if int(number) == 1:
                facts = {}
            if "\t" in text:
                question, answer, lines = text.split("\t")
                known = list(facts)
                supporting = tuple(known.index(int(fact)) for fact in lines.split())
                stories.append(Story(tuple(facts.values()), question.strip(), answer, supporting))
            else:
                facts[int(number)] = text.strip()
        except ValueError:
            raise TextError(f"{files[0]}: line {place} is not a line of bAbI v1.2: {line[:60]!r}") from None
    return stories


def babilong_context(story: Story, haystack: Haystack, tokenizer: Any, length: int, rng: Random, task: str) -> Context:
    """The story's facts in a stretch of the haystack, and its question at the end; ``length`` tokens with the answer.

    Evidence: the supporting facts. The metric is ``label``: :func:`babilong_correct`.

    Raises:
        SampleError: the task is unknown, the story does not fit into ``length``, or the haystack is too small.
    """
    if task not in TASKS:
        raise SampleError(f"BABILong's tasks here are {', '.join(TASKS)}, not {task}")
    head = encode(tokenizer, instruction(task))
    prompt = encode(tokenizer, TAIL.format(question=story.question))
    facts = [tuple(encode(tokenizer, f" {fact}")) for fact in story.facts]
    at = length - len(prompt) - MAX_NEW_TOKENS
    room = at - len(head) - sum(map(len, facts))
    if room < 0:
        raise SampleError(f"this story of {task} needs {length - room:,} tokens at least, not {length:,}")
    stretch = haystack.stretch(room, rng)
    positions = sorted(rng.uniform(len(head), at) for _ in facts)
    ids, spans = plant(stretch, [Plant(*fact) for fact in zip(positions, facts, strict=True)], at, head)
    answers = tuple(story.answer.split(","))
    question = Question(
        at,
        tuple(prompt),
        answers,
        MAX_NEW_TOKENS,
        {"task": task, "length": length, "depth": None},
        tuple(spans[index] for index in story.supporting),
        "label",
        others=_others(story.question, answers, task),
    )
    return Context(ids, (question,), stretch.source)


def instruction(task: str) -> str:
    """What stands before the text: what to do, and two solved examples."""
    about, rule, form, examples, _ = TASKS[task]
    shown = "\n\n".join(EXAMPLE.format(facts=f, question=q, answer=a) for f, q, a in examples)
    return HEAD.format(about=about, rule=rule, form=form, examples=shown).replace("  ", " ")


def _others(question: str, answers: Sequence[str], task: str) -> tuple[str, ...]:
    """The task's wrong labels; without those that the question names, or the answer contains (none, one)."""
    free = [label for label in TASKS[task].labels if label.lower() not in question.lower()]
    return tuple(label for label in free if not any(label in answer for answer in answers))


def babilong_correct(answer: str, targets: Sequence[str], others: Sequence[str]) -> bool:
    """BABILong's score: the answer's first sentence, case ignored, has every target and none of the other labels.

    Unlike in the published script, ``one`` is not found in ``none`` (there, no answer to a question whose target is
    ``none`` is ever right): a label that another one contains is looked for as a whole word.
    """
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    labels = [label.lower() for label in (*targets, *others)]

    def named(label: str) -> bool:
        nested = any(label != other and label in other for other in labels)
        return bool(re.search(rf"\b{re.escape(label)}\b", said)) if nested else label in said

    found = list(map(named, labels))
    return all(found[: len(targets)]) and not any(found[len(targets) :])
