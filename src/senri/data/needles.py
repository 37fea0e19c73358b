"""Needle-in-a-haystack samples: facts hidden in text at known depths, and questions for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from senri.data.haystack import Haystack, Plant, RepeatedHaystack, SentenceHaystack, encode, plant
from senri.data.needle_tasks import KINDS, NIAH, NeedleTask, Wording
from senri.data.samples import Context, Question, SampleError

CROWDED = 0.15  # share of a length that a fact of `shared` may be moved by, for want of room
CHAT_TOKENS = 40  # of an answer in the chat format, which may be whole sentences
RULER_DEPTHS = 40  # RULER draws needle depths from this many, evenly spaced


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
    cells.sort(key=lambda cell: (-cell[0] * (cell[1] or 0.0), cell[0]))
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
        self.keys = keys = _distinct(KINDS[task.key], task.keys, rng)
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
        self.wording, self.whose = wording, _listed([keys[i] for i in chosen])
        self.question = wording.question.format(key=self.whose)

    def reworded(self, sample: int) -> str:
        """The question in other words, which samples take in turn."""
        others = self.wording.reworded
        return others[sample % len(others)].format(key=self.whose)

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
    cells = [(n, d) for n in lengths for d in depths for _ in range(per_cell)]
    names = _distinct(KINDS["person"], len(cells), rng)
    values = _distinct(KINDS["code"], len(cells), rng)
    questions = [tuple(encode(tokenizer, wording.question.format(key=name))) for name in names]
    facts = [
        tuple(encode(tokenizer, wording.fact.format(key=name, value=value)))
        for name, value in zip(names, values, strict=True)
    ]
    sizes = [
        length - len(question) - task.max_new_tokens for (length, _), question in zip(cells, questions, strict=True)
    ]
    positions = _in_time([depth * size for (_, depth), size in zip(cells, sizes, strict=True)], sizes, facts)
    plants = [Plant(position, fact) for position, fact in zip(positions, facts, strict=True)]
    stretch = books.stretch(max(lengths), rng)
    ids, spans = plant(stretch, plants, max(sizes))
    order = sorted(range(len(cells)), key=lambda i: sizes[i])
    return Context(
        ids,
        tuple(
            Question(
                sizes[i],
                questions[i],
                (values[i],),
                task.max_new_tokens,
                {"task": "shared", "length": cells[i][0], "depth": cells[i][1]},
                (spans[i],),
                stop=task.stop,
            )
            for i in order
        ),
        source=stretch.source,
    )


def together_contexts(
    tasks: Sequence[NeedleTask],
    books: Haystack,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    sample: int,
    form: str = "together",
) -> list[Context]:
    """For each length one context that holds the facts of all ``tasks``, read once for all their questions.

    All facts distract from each other: harder than a context for each task, and cheaper by their number. A task's
    asked fact takes the depths in turn, from sample to sample.

    Args:
        form: ``together``: the answer is begun. ``chat``: asked in the tokenizer's chat format and left open, as a user
            does; the text ends some tokens earlier. ``reworded``: so, and in other words than the fact's. The cell's
            task is ``FORM_NAME``.

    Raises:
        SampleError: see :func:`needle_contexts`; a tokenizer that has no chat format, where one is needed.
    """
    chat = form != "together"
    if chat and not tokenizer.chat_template:
        raise SampleError(f"the model has no chat format: leave the task together_{form} out")
    base = f"{seed}/together/{sample}"
    facts = _of_different_people(tasks, base, sample)
    asked_at = [depths[(sample + number) % len(depths)] if task.by_depth else None for number, task in enumerate(tasks)]
    asked = [made.reworded(sample) if form == "reworded" else made.question for made in facts]
    questions = [(_turn if chat else encode)(tokenizer, question) for question in asked]
    rooms = [CHAT_TOKENS if chat else task.max_new_tokens for task in tasks]
    longest = max(len(q) + room for q, room in zip(questions, rooms, strict=True))
    contexts = []
    for length in lengths:
        size = length - longest
        plants: list[Plant] = []
        first: list[int] = []
        for number, made in enumerate(facts):
            first.append(len(plants))
            made.rng.seed(f"{base}/{made.task.name}/{length}")
            plants += [
                Plant(place * size, tuple(encode(tokenizer, text))) for text, place in made.placed(asked_at[number])
            ]
        stretch = books.stretch(max(lengths), Random(base))
        ids, spans = plant(stretch, plants, size)
        contexts.append(
            Context(
                ids,
                tuple(
                    Question(
                        at=size,
                        prompt=tuple(question),
                        answers=tuple(made.answers),
                        max_new_tokens=rooms[number],
                        cell={
                            "task": f"{form}_{made.task.name}",
                            "length": length,
                            "depth": asked_at[number],
                        },
                        evidence=tuple(spans[first[number] + i] for i in made.asked),
                        stop="" if chat else made.task.stop,
                    )
                    for number, (made, question) in enumerate(zip(facts, questions, strict=True))
                ),
                source=stretch.source,
            )
        )
    return contexts


def _of_different_people(tasks: Sequence[NeedleTask], base: str, sample: int) -> list[_Facts]:
    """The facts of every task; no two tasks tell something of one person."""
    known: set[str] = set()
    facts = []
    for task in tasks:
        wording = task.wordings[sample % len(task.wordings)]
        for attempt in range(100):
            made = _Facts(task, wording, Random(f"{base}/{task.name}/{attempt}"))
            if not known & {*made.keys}:
                break
        known |= {*made.keys}
        facts.append(made)
    return facts


def _turn(tokenizer: Any, question: str) -> list[int]:
    """The question alone as a chat turn, up to where the answer begins."""
    asked = question.strip().removeprefix("Question: ").partition("\n")[0]
    turns = [{"role": "user", "content": asked}]
    return encode(tokenizer, tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _in_time(wanted: Sequence[float], sizes: Sequence[int], facts: Sequence[Sequence[int]]) -> list[float]:
    """Where facts must stand so that none ends behind its question or pushes another there: each at ``wanted`` or
    earlier.

    Raises:
        SampleError: there is no room for that, or some would stand far from where they should.
    """
    positions = list(wanted)
    limit = float(max(sizes))
    crowded = False
    for i in sorted(range(len(facts)), key=lambda i: wanted[i], reverse=True):
        positions[i] = limit = min(positions[i], min(limit, sizes[i]) - len(facts[i]))
        crowded |= wanted[i] - len(facts[i]) - limit > CROWDED * sizes[i]
    end = 0.0
    for i in sorted(range(len(facts)), key=lambda i: positions[i]):  # those before the start come back to it
        end = max(end, positions[i]) + len(facts[i])
        crowded |= end > sizes[i]
    if crowded:
        raise SampleError(
            f"{len(facts):,} facts in one text leave no room at the shortest length: ask for fewer a cell "
            "(shared_questions), or leave that length out"
        )
    return positions


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
