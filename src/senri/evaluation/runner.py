"""Runs recall tasks: every question with all its controls, each answer kept, an interrupted run continued."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from senri.data.samples import Context, Question
from senri.evaluation.readers import Reader
from senri.evaluation.scoring import exact, score

# Each question is answered by all of these.
MEMORY = "memory"  # the model as it is
MEMORY_OFF = "memory off"  # the same window, the memory empty at all times
OTHER_MEMORY = "other memory"  # the window read without memory, then the memory of another sample of the same task
QUESTION_ONLY = "question only"  # nothing read: what can be guessed
FULL_ATTENTION = "full attention"  # the base model with everything in sight, where it fits
ARMS = (MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY, FULL_ATTENTION)

AT_ONCE = 4  # questions that are answered side by side, each by three states
STRANGER = -1  # number of the sample whose memory is the "other" one
STRANGER_TOKENS = 65536  # read of it at most: what it might give away is known by then, and a million take half an hour


@dataclass(frozen=True)
class RecallTask:
    """A named maker of contexts. ``make(i)`` gives sample ``i``: every cell of the task once, always the same way.

    Sample number :data:`STRANGER` is one more: its memory is the "other" one.
    """

    name: str
    samples: int
    make: Callable[[int], Sequence[Context]]


class Log:
    """Records as JSON lines in a file; what an earlier run finished is there again.

    Raises:
        ValueError: the file is no log, naming the line (a last line cut short by a crash is dropped).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.records = read_records(path)
            whole = path.read_bytes()
            if not whole.endswith(b"\n") and whole:
                with open(path, "r+b") as file:
                    file.truncate(whole.rfind(b"\n") + 1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (kept open for the run)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, on disk at once."""
        self.records[record["key"]] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The whole records of a log, by key.

    Raises:
        ValueError: the file is no log, naming the line; a last line cut short is left out.
    """
    records = {}
    whole = path.read_bytes()
    for number, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is no record of an evaluation: remove the file") from None
    return records


def run_task(
    task: RecallTask,
    reader: Reader,
    full: Reader | None,
    log: Log,
    *,
    tokenizer: Any,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Ask every question of a task that ``log`` does not hold yet.

    Args:
        full: the full-attention control, used where a question fits it.
        progress: called with one line after each question.

    Raises:
        ValueError: the log holds other samples under the same names (it is of another run).
    """
    runner = _Runner(task, reader, full, log, tokenizer)
    total = done = 0
    for sample in range(task.samples):
        contexts = task.make(sample)
        total = total or task.samples * sum(len(c.questions) for c in contexts)
        for number, context in enumerate(contexts):
            for record in runner.context(sample, number, context):
                done += 1
                if record is not None:
                    log.add(record)
                    progress(f"{task.name}: question {done:,} of {total:,}, {_outcome(record)}")


class _Runner:
    def __init__(self, task: RecallTask, reader: Reader, full: Reader | None, log: Log, tokenizer: Any) -> None:
        self.task, self.reader, self.full, self.log, self.tokenizer = task, reader, full, log, tokenizer
        self._guesses: dict[tuple[int, ...], str] = {}
        self._strangers: dict[tuple[int, int], Any] | None = None

    def context(self, sample: int, number: int, context: Context) -> Iterator[dict[str, Any] | None]:
        """A record for each question, None where the log has it; in the order of ``at``, like prompts together."""
        alike: dict[tuple[int, int], list[int]] = {}
        for index, question in enumerate(context.questions):
            alike.setdefault((question.at, len(question.prompt)), []).append(index)
        for indices in alike.values():
            missing = []
            for index in indices:
                key = f"{self.task.name}/{sample}/{number}/{index}"
                digest = sample_digest(context, context.questions[index])
                known = self.log.records.get(key)
                if known is None:
                    missing.append((index, {"key": key, "prompt_sha256": digest}))
                elif known["prompt_sha256"] != digest:
                    raise ValueError(
                        f"{self.log.path} holds another sample as {key}: it was made by other code or data, name "
                        "another folder with -o"
                    )
                else:
                    yield None
            for start in range(0, len(missing), AT_ONCE):
                some = missing[start : start + AT_ONCE]
                records = self._ask(number, [index for index, _ in some], context)
                yield from ({**name, **record} for (_, name), record in zip(some, records, strict=True))

    def _ask(self, number: int, indices: Sequence[int], context: Context) -> list[dict[str, Any]]:
        """Questions with prompts of one length, at one place."""
        ids, questions = context.ids, [context.questions[index] for index in indices]
        at = questions[0].at
        others = [self._stranger(number, index) for index in indices]
        started = time.perf_counter()
        with_memory = self.reader.read(ids, at)
        without = self.reader.read(ids, at, memory=False)
        read = time.perf_counter()
        states = [[with_memory, without, self.reader.with_memory_of(without, other)] for other in others]
        answers = self.reader.answer([s for three in states for s in three], [q for q in questions for _ in range(3)])
        answered = time.perf_counter()
        guesses = self._guess(questions)
        records = []
        for place, question in enumerate(questions):
            texts = dict(zip((MEMORY, MEMORY_OFF, OTHER_MEMORY), answers[3 * place : 3 * place + 3], strict=True))
            texts[QUESTION_ONLY] = guesses[place]
            length = at + len(question.prompt) + question.max_new_tokens
            if self.full is not None and length <= (self.full.longest or length):
                texts[FULL_ATTENTION] = self.full.answer([self.full.read(ids, at)], [question])[0]
            records.append({
                "task": self.task.name,
                "cell": dict(question.cell),
                "tokens": at + len(question.prompt),
                "source": context.source,
                "question": self.tokenizer.decode(question.prompt),
                "expected": list(question.answers),
                "arms": {
                    arm: {"answer": t, "score": score(t, question), "exact": exact(t, question)}
                    for arm, t in texts.items()
                },
                **window_facts(context, question, self.reader.window, self.tokenizer),
                "read_seconds": (read - started) / len(questions),
                "answer_seconds": (answered - read) / len(questions),
            })  # fmt: skip
        return records

    def _guess(self, questions: Sequence[Question]) -> list[str]:
        """Answers to questions alone; prompts are of one length."""
        new = {q.prompt: q for q in questions if q.prompt not in self._guesses}
        if new:
            said = self.reader.answer([self.reader.blank()] * len(new), list(new.values()))
            self._guesses.update(zip(new, said, strict=True))
        return [self._guesses[question.prompt] for question in questions]

    def _stranger(self, number: int, index: int) -> Any:
        """The memory at the same place of the extra sample, or as it is after :data:`STRANGER_TOKENS`."""
        if self._strangers is None:
            self._strangers = {
                (n, i): self.reader.memory_of(self.reader.read(context.ids, min(question.at, STRANGER_TOKENS)))
                for n, context in enumerate(self.task.make(STRANGER))
                for i, question in enumerate(context.questions)
            }
        return self._strangers[number, index]


def sample_digest(context: Context, question: Question) -> str:
    """SHA-256 over all that decides the answer: the tokens read, the prompt, and what is expected."""
    digest = hashlib.sha256(np.ascontiguousarray(context.ids[: question.at], dtype=np.int32).tobytes())
    digest.update(np.array(question.prompt, dtype=np.int32).tobytes())
    digest.update(json.dumps([question.answers, question.max_new_tokens]).encode())
    return digest.hexdigest()


def window_facts(context: Context, question: Question, window: int | None, tokenizer: Any) -> dict[str, bool | None]:
    """What the window alone gives away when the answer begins.

    Returns:
        ``in_window``: all of the evidence is still in the window, by the sample's own account; None without evidence
        (words to be counted, say, are everywhere);
        ``leak``: an answer stands in the question, or in the window's text though no evidence does. Labels and common
        words stand there by chance, so only answers that are all asked for (metric ``all``) are looked for.
    """
    length = question.at + len(question.prompt)
    begins = 0 if window is None else max(length - window, 0)
    answers = [answer.lower() for answer in question.answers]
    leak = False
    if question.metric == "all" and question.evidence:
        visible = [*context.ids[: question.at].tolist(), *question.prompt][begins:]
        outside = all(end <= begins for _, end in question.evidence)
        places = [question.prompt, visible] if outside else [question.prompt]
        leak = any(answer in tokenizer.decode(ids).lower() for ids in places for answer in answers)
    inside = all(start >= begins for start, _ in question.evidence) if question.evidence else None
    return {"in_window": inside, "leak": leak}


def _outcome(record: dict[str, Any]) -> str:
    cell = [f"{name} {value}" for name, value in record["cell"].items() if name != "task" and value is not None]
    scores = [f"{arm} {result['score']:.0%}" for arm, result in record["arms"].items()]
    return f"{', '.join(cell)}: {', '.join(scores)}"
