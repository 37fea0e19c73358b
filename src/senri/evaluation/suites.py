"""The suites: what ``senri eval`` can run, each made from the values of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Protocol

from senri.data.babilong import babilong_context, load_babi
from senri.data.haystack import BookHaystack
from senri.data.needle_tasks import NIAH, RULER_NIAH
from senri.data.needles import distance_context, needle_contexts, shared_context, together_contexts
from senri.data.ruler import common_words, frequent_words, load_squad, question_answering, variable_tracking
from senri.data.samples import Context
from senri.evaluation.readers import Reader
from senri.evaluation.recall import Record, distance_section, recall_section
from senri.evaluation.report import Section
from senri.evaluation.runner import Log, RecallTask, run_task

RULER_OTHERS = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
NIAH_TASKS = (*NIAH, "shared", "together", "together_chat", "together_reworded")
# One text for all of them. Not those that need a haystack of their own, nor two questions for the same fact.
TOGETHER = tuple(
    task for name, task in NIAH.items() if task.haystack == "books" and task.by_depth and name != "single_free"
)


@dataclass(frozen=True)
class Bench:
    """What a suite runs on."""

    reader: Reader
    full: Reader | None
    tokenizer: Any
    log: Log
    progress: Callable[[str], None] = lambda text: None


class Suite(Protocol):
    """A part of an evaluation. Its records' keys begin with its name and a slash."""

    name: str

    def run(self, bench: Bench) -> None:
        """Add the records that the log does not hold yet."""
        ...

    def check(self) -> None:
        """Complain at once of what would stop the run later: too little text, lengths too short."""
        ...

    def section(self, records: Sequence[Record], window: int | None) -> Section:
        """What its records show."""
        ...


@dataclass(frozen=True)
class RecallSuite:
    """Contexts and questions, answered by the model and all controls."""

    name: str
    title: str
    tasks: tuple[RecallTask, ...]
    text: str
    draw: Callable[..., Section] = recall_section

    def run(self, bench: Bench) -> None:
        """See :class:`Suite`."""
        for task in self.tasks:
            run_task(task, bench.reader, bench.full, bench.log, tokenizer=bench.tokenizer, progress=bench.progress)

    def check(self) -> None:
        """See :class:`Suite`."""
        for task in self.tasks:
            task.make(0)

    def section(self, records: Sequence[Record], window: int | None) -> Section:
        """See :class:`Suite`."""
        return self.draw(self.title, records, window, self.text)


@dataclass(frozen=True)
class Sources:
    """Where samples come from: the haystack of real text, the tokenizer, the seed of everything random."""

    books: BookHaystack
    tokenizer: Any
    seed: int


def niah(
    sources: Sources,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    shared_questions: int,
) -> RecallSuite:
    """Needles in books by length and depth.

    Args:
        tasks: of :data:`NIAH_TASKS`.
        shared_questions: facts a cell of the task ``shared``, which reads one context for all cells.
    """

    def make(name: str, sample: int) -> list[Context]:
        grid: dict[str, Any] = {"lengths": lengths, "depths": depths, "seed": sources.seed, "sample": sample}
        if name == "shared":
            return [shared_context(sources.books, sources.tokenizer, per_cell=shared_questions, **grid)]
        if name.startswith("together"):
            form = name.removeprefix("together_")
            return together_contexts(TOGETHER, sources.books, sources.tokenizer, **grid, form=form)
        return needle_contexts(NIAH[name], sources.books, sources.tokenizer, **grid)

    return RecallSuite(
        "niah",
        "Needle in a haystack",
        tuple(RecallTask(f"niah/{name}", samples, partial(make, name)) for name in tasks),
        "Facts hidden in held-out text. Length counts every token: the text, the question and the room for the answer. "
        "An answer counts when all that was asked for stands in it.",
    )


def ruler(
    sources: Sources, *, tasks: Sequence[str], lengths: Sequence[int], samples: int, qa_file: str | None
) -> RecallSuite:
    """RULER's synthetic tasks, and ``qa`` where ``qa_file`` (SQuAD's JSON) is given."""
    paragraphs = load_squad(Path(qa_file)) if qa_file else []

    def make(name: str, sample: int) -> list[Context]:
        if name in RULER_NIAH:
            return needle_contexts(
                RULER_NIAH[name],
                sources.books,
                sources.tokenizer,
                lengths=lengths,
                depths=(),
                seed=sources.seed,
                sample=sample,
            )
        rngs = [(n, Random(f"{sources.seed}/{name}/{sample}/{n}")) for n in lengths]
        if name == "qa":
            return [question_answering(sources.tokenizer, n, rng, paragraphs) for n, rng in rngs]
        return [RULER_OTHERS[name](sources.tokenizer, n, rng) for n, rng in rngs]

    names = (*tasks, *(("qa",) if paragraphs else ()))
    return RecallSuite(
        "ruler",
        "RULER",
        tuple(RecallTask(f"ruler/{name}", samples, partial(make, name)) for name in names),
        "RULER's synthetic tasks with the published parameters and scoring, in our own wording and with held-out books "
        "as the essay haystack. Its figure is the mean score; the intervals are those of fully right answers.",
    )


def babilong(
    sources: Sources, *, folder: str | None, tasks: Sequence[str], lengths: Sequence[int], samples: int
) -> RecallSuite:
    """bAbI's facts spread in books.

    Raises:
        ValueError: no folder with bAbI's files.
    """
    if folder is None:
        raise ValueError(
            "the suite babilong needs bAbI's files: set evaluation.babilong.folder in experiment.yaml to the folder "
            "with qa1_..._test.txt, or take babilong out of evaluation.suites"
        )
    stories = {name: load_babi(Path(folder), name, "test") for name in tasks}

    def make(name: str, sample: int) -> list[Context]:
        story = Random(f"{sources.seed}/{name}/{sample}").choice(stories[name])
        return [
            babilong_context(
                story, sources.books, sources.tokenizer, n, Random(f"{sources.seed}/{name}/{sample}/{n}"), name
            )
            for n in lengths
        ]

    return RecallSuite(
        "babilong",
        "BABILong",
        tuple(RecallTask(f"babilong/{name}", samples, partial(make, name)) for name in tasks),
        "bAbI's test questions with their facts spread over held-out books, in our own wording; an answer that names a "
        "wrong place beside the right one is wrong, as in BABILong.",
    )


def recall_by_writes(sources: Sources, *, distances: Sequence[int], facts: int, samples: int) -> RecallSuite:
    """The same facts asked for after more and more text."""

    def make(sample: int) -> list[Context]:
        return [
            distance_context(
                sources.books, sources.tokenizer, distances=distances, facts=facts, seed=sources.seed, sample=sample
            )
        ]

    return RecallSuite(
        "recall_by_writes",
        "Recall by writes",
        (RecallTask("recall_by_writes/facts", samples, make),),
        f"{facts} facts at the start of a text, asked for after more and more of it: what the memory forgets while it "
        "goes on writing. Beyond the window, every token read is one write (or less, under a write gate).",
        distance_section,
    )
