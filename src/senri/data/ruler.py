"""RULER's tasks beside the needles (Hsieh et al. 2024, arXiv:2404.06654): variable tracking, common words, frequent
words, and questions about SQuAD's paragraphs. Parameters and structure are RULER's, the wording is our own.

Every function takes a ``random.Random`` (the same state gives the same sample) and returns a context with one question
at its end. ``at + len(prompt) + max_new_tokens`` is ``length`` in variable tracking, and in the others as near below it
as one more word or paragraph allows. All of them raise :class:`SampleError` when ``length`` is too small or, where a
list of words or paragraphs is used up, too large.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np

from senri.data.haystack import FILLER, Plant, RepeatedHaystack, encode, plant
from senri.data.samples import Cell, Context, Question, SampleError
from senri.data.text import TextError, iter_text
from senri.data.words import words_of

VT_VARIABLES = 5  # one chain of four hops
VT_NEW, CWE_NEW, FWE_NEW, QA_NEW = 30, 120, 50, 32  # tokens to generate
EXAMPLE_FILLERS = 10  # in the worked example of variable tracking
COMMON = 10
FWE_EXPONENT = 2.0
FWE_SMALLEST = 53  # from so many draws on, the counts of the ranks 2 to 5 all differ

VT_HEAD = "A chain of variable assignments is scattered over the text below. Follow it and keep it in mind.\n\n"
VT_TAIL = (
    "\nQuestion: Which variables in the text above have the value {value}? Name them all. Answer: Following the chain "
    "of assignments in the text above, {count} variables have the value {value}. They are:"
)
CWE_HEAD = "In the numbered list of words below, some words occur more often than others. Remember those.\n"
CWE_TAIL = (
    "\nQuestion: Which 10 words occur most often in the list above? Answer: The 10 words that occur most often in the "
    "list are:"
)
FWE_HEAD = "Here is a text in code. Count how often each code word occurs, and find the three that occur most often."
FWE_TAIL = (
    "\nQuestion: Which three code words occur most often in the coded text above? Leave out the dots '...', and "
    "explain nothing. Answer: In the coded text above, the three words that occur most often are:"
)
QA_TASK = "Answer the question from the documents alone. Write the answer and nothing else.\n\n"
QA_HEAD = QA_TASK + "These are the documents.\n\n"
QA_TAIL = QA_TASK + "Question: {question} Answer:"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of SQuAD and what can be answered from it."""

    article: str
    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]  # question, accepted answers


def variable_tracking(tokenizer: Any, length: int, rng: Random) -> Context:
    """vt: five names, the first assigned a number and each further one its predecessor, in order among filler; which
    names have that number? In front stands a solved example with shorter names. Evidence: the five assignments.
    """
    noise = RepeatedHaystack(tokenizer, FILLER + "\n")
    shown, value = _chain(rng, 3)
    head = encode(tokenizer, VT_HEAD)
    facts = _pieces(tokenizer, _assignments(shown, value))
    example, _ = _hide(facts, noise, EXAMPLE_FILLERS * len(noise.unit), rng, head)
    solved = VT_TAIL.format(value=value, count=VT_VARIABLES) + " " + " ".join(shown) + "\n\n"
    names, value = _chain(rng, 5)
    front = [*example.tolist(), *encode(tokenizer, solved), *head]
    prompt = encode(tokenizer, VT_TAIL.format(value=value, count=VT_VARIABLES))
    facts = _pieces(tokenizer, _assignments(names, value))
    room = length - len(front) - sum(map(len, facts)) - len(prompt) - VT_NEW
    _check("vt", length, length - room + (VT_VARIABLES - 1) * len(noise.unit) + 1)
    ids, spans = _hide(facts, noise, room, rng, front)
    question = _question("vt", length, ids, prompt, tuple(names), VT_NEW, evidence=tuple(spans))
    return Context(ids, (question,), "repeated filler")


def _chain(rng: Random, letters: int) -> tuple[list[str], int]:
    return _distinct(rng, ascii_uppercase, letters, VT_VARIABLES), rng.randint(10000, 99999)


def _assignments(names: Sequence[str], value: int) -> list[str]:
    values = [str(value), *(f"VAR {name}" for name in names)]
    return [f" VAR {name} = {source}" for name, source in zip(names, values, strict=False)]


def _hide(
    facts: Sequence[Sequence[int]], noise: RepeatedHaystack, room: int, rng: Random, head: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """``head``, then ``room`` tokens of filler and the facts in order, each before another line of it."""
    stretch = noise.stretch(room, rng)
    starts = sorted(rng.sample(stretch.cuts[stretch.cuts < room].tolist(), len(facts)))
    done = accumulate(map(len, facts), initial=len(head))
    plants = [Plant(before + start, tuple(fact)) for before, start, fact in zip(done, starts, facts, strict=False)]
    return plant(stretch, plants, len(head) + room + sum(map(len, facts)), head)


def common_words(tokenizer: Any, length: int, rng: Random) -> Context:
    """cwe: a numbered list in random order, in which ten words stand 30 times each and all others three times (below
    4,096 tokens: six times and once); which ten? In front stands a short solved list.
    """
    labels, words = _listed(tokenizer)
    short = length < 4096
    solved = rng.sample(list(words), 20 if short else 40)
    example = _repeat(solved, *((3, 1) if short else (10, 3)), rng)
    front = CWE_HEAD + _numbered(example) + CWE_TAIL + " " + _numbered(solved[:COMMON]) + "\n" + CWE_HEAD
    head, prompt = encode(tokenizer, front), encode(tokenizer, CWE_TAIL)
    budget = length - len(head) - len(prompt) - CWE_NEW

    often, seldom = (6, 1) if short else (30, 3)
    order = rng.sample(list(words), len(words))
    times = [often] * COMMON + [seldom] * (len(order) - COMMON)
    entries = list(accumulate(times))
    words_cost = list(accumulate(len(words[word]) * time for word, time in zip(order, times, strict=True)))
    labels_cost = list(accumulate(map(len, labels)))

    def cost(count: int) -> int:
        return labels_cost[entries[count - 1] - 1] + words_cost[count - 1]

    _check("cwe", length, length - budget + cost(COMMON + 1))
    count = _largest(cost, COMMON + 1, len(order), budget)
    if count == len(order):
        raise SampleError(f"cwe has words for {length - budget + cost(count):,} tokens, not {length:,}: ask for less")
    listed = _repeat(order[:count], often, seldom, rng)
    entry_ids = (label + words[word] for label, word in zip(labels, listed, strict=False))
    ids = np.array([*head, *chain.from_iterable(entry_ids)], dtype=np.int32)
    question = _question("cwe", length, ids, prompt, tuple(order[:COMMON]), CWE_NEW)
    return Context(ids, (question,), "wonderwords")


@lru_cache(maxsize=4)
def _listed(tokenizer: Any) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Token ids of the labels of the longest list that there can be, and of every word."""
    words = words_of("noun", "adjective", "verb")
    labels = _labels(30 * COMMON + 3 * (len(words) - COMMON))
    return _pieces(tokenizer, labels), dict(zip(words, _pieces(tokenizer, [f" {w}" for w in words]), strict=True))


def _repeat(words: Sequence[str], often: int, seldom: int, rng: Random) -> list[str]:
    """The first ten so often and the others so seldom, in random order."""
    listed = list(words[:COMMON]) * often + list(words[COMMON:]) * seldom
    rng.shuffle(listed)
    return listed


def _labels(count: int) -> list[str]:
    return ["1.", *(f" {number}." for number in range(2, count + 1))]


def _numbered(words: Sequence[str]) -> str:
    return "".join(f"{label} {word}" for label, word in zip(_labels(len(words)), words, strict=True))


def frequent_words(tokenizer: Any, length: int, rng: Random) -> Context:
    """fwe: ``length // 50`` code words of six letters, drawn by their rank's power (zeta, exponent 2.0), the first rank
    being the noise ``...``; which are the three most frequent?
    """
    words = _distinct(rng, ascii_lowercase, 6, max(length // 50, 5))
    words[0] = "..."
    pieces = _pieces(tokenizer, [f" {word}" for word in words])
    sizes = np.array([len(piece) for piece in pieces])
    share = np.arange(1, len(words) + 1) ** -FWE_EXPONENT / (math.pi**2 / 6)  # zeta(2) = π² / 6
    head, prompt = encode(tokenizer, FWE_HEAD), encode(tokenizer, FWE_TAIL)
    budget = length - len(head) - len(prompt) - FWE_NEW

    def counts(draws: int) -> np.ndarray:
        return (draws * share).astype(int)

    def cost(draws: int) -> int:
        return int(counts(draws) @ sizes)

    _check("fwe", length, length - budget + cost(FWE_SMALLEST))
    draws = _largest(cost, FWE_SMALLEST, 2 * budget, budget)
    text = np.repeat(np.arange(len(words)), counts(draws)).tolist()
    rng.shuffle(text)
    ids = np.array([*head, *chain.from_iterable(pieces[rank] for rank in text)], dtype=np.int32)
    question = _question("fwe", length, ids, prompt, tuple(words[1:4]), FWE_NEW)
    return Context(ids, (question,), "code words")


def question_answering(tokenizer: Any, length: int, rng: Random, paragraphs: Sequence[Paragraph]) -> Context:
    """qa: a question's paragraph among as many others as fit, numbered, in random order. Those of the same article are
    taken first, as in RULER. Evidence: the paragraph.

    Raises:
        SampleError: also when no question can be answered from ``paragraphs``.
    """
    asked = [(p, *question) for p in paragraphs for question in p.questions]
    if not asked:
        raise SampleError("no paragraph comes with a question that has an answer: give a SQuAD file that has some")
    gold, asks, answers = rng.choice(asked)
    others = list({p.text: p for p in paragraphs if p.text != gold.text}.values())
    rng.shuffle(others)
    others.sort(key=lambda p: p.article != gold.article)  # stable: random within the article and within the rest

    head, prompt = encode(tokenizer, QA_HEAD), encode(tokenizer, QA_TAIL.format(question=asks))
    missing = length - len(head) - len(prompt) - QA_NEW
    titles: list[list[int]] = []
    bodies: list[list[int]] = []
    for paragraph in (gold, *others):
        title, body = _pieces(tokenizer, [f"Document {len(titles) + 1}:\n", paragraph.text])
        body += encode(tokenizer, "\n\n")
        missing -= len(title) + len(body)
        if paragraph is gold:
            _check("qa", length, length - missing)
        if missing < 0:
            break
        titles.append(title)
        bodies.append(body)
    else:
        raise SampleError(f"qa has paragraphs for {length - missing:,} tokens, not {length:,}: ask for less")
    order = list(range(len(bodies)))
    rng.shuffle(order)
    parts = [head, *chain.from_iterable((titles[place], bodies[index]) for place, index in enumerate(order))]
    start = sum(map(len, parts[: 2 * order.index(0) + 2]))
    evidence = ((start, start + len(bodies[0]) - len(encode(tokenizer, "\n\n"))),)
    ids = np.array(list(chain.from_iterable(parts)), dtype=np.int32)
    question = _question("qa", length, ids, prompt, answers, QA_NEW, metric="part", evidence=evidence)
    return Context(ids, (question,), gold.article)


def load_squad(path: str | Path) -> list[Paragraph]:
    """The paragraphs of a SQuAD file (v1.1 or v2.0, JSON), each with those of its questions that have an answer.

    Raises:
        TextError: no such file, or not SQuAD's format.
    """
    text = "".join(iter_text(path))
    try:
        return [
            Paragraph(article["title"], paragraph["context"], tuple(_answerable(paragraph["qas"])))
            for article in json.loads(text)["data"]
            for paragraph in article["paragraphs"]
        ]
    except (ValueError, KeyError, TypeError):
        raise TextError(f"{path} is no SQuAD file: it needs the JSON of SQuAD v1.1 or v2.0") from None


def _answerable(questions: Sequence[Any]) -> Iterable[tuple[str, tuple[str, ...]]]:
    for item in questions:
        if not item.get("is_impossible", False):
            yield item["question"], tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))


def _distinct(rng: Random, letters: str, length: int, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(letters, k=length))] = None
    return list(words)


def _pieces(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text for itself: what is put together from them is exactly as long as they are."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _largest(cost: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest number up to ``high`` whose cost is within the budget; ``low``'s is, and cost never falls."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _check(task: str, length: int, smallest: int) -> None:
    if length < smallest:
        raise SampleError(f"{task} needs {smallest:,} tokens at least, not {length:,}: ask for longer samples")


def _question(
    task: str, length: int, ids: np.ndarray, prompt: Sequence[int], answers: tuple[str, ...], new: int, **more: Any
) -> Question:
    cell: Cell = {"task": task, "length": length, "depth": None}
    return Question(len(ids), tuple(prompt), answers, new, cell, stop=None, **more)
