"""What every recall task is made of: a context that is read once, and questions that are asked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Cell = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Question:
    """One question to a context.

    ``at + len(prompt) + max_new_tokens`` is the sample's length: the room for the answer counts, as in RULER.
    """

    at: int  # tokens of the context that are read before it is asked
    prompt: tuple[int, ...]  # token ids that follow them, up to where the answer begins
    answers: tuple[str, ...]  # the strings to be found in what the model writes
    max_new_tokens: int
    cell: Cell  # where it stands in the tables: task, length, depth (None: spread), ...
    evidence: tuple[tuple[int, int], ...] = ()  # [start, end) in the context of every stretch the answer rests on
    # all: the share of the answers that is found; part: one of them is enough (RULER's string_match);
    # label: all of them and none of the others (BABILong)
    metric: str = "all"
    others: tuple[str, ...] = ()  # labels that are wrong answers, for the metric label
    # the answer ends before this string, once it is not empty; "": where the model ends it; None: once nothing that is
    # said could change the score
    stop: str | None = "\n"


@dataclass(frozen=True)
class Context:
    """A text to be read, as token ids, and what is asked about it, in the order of ``at``."""

    ids: np.ndarray  # [N] int32
    questions: tuple[Question, ...]
    source: str = ""  # where its text comes from


class SampleError(ValueError):
    """A sample that cannot be made as asked for; the message says why and how to mend it, in one line."""
