"""How an answer is scored: RULER's string match, BABILong's labels, and the stricter exact match beside them."""

from __future__ import annotations

from senri.data.babilong import babilong_correct
from senri.data.samples import Question


def score(text: str, question: Question) -> float:
    """In [0, 1], case ignored, by the question's metric (see :class:`senri.data.samples.Question`)."""
    if question.metric == "label":
        return float(babilong_correct(text, question.answers, question.others))
    said = text.lower()
    found = [answer.lower() in said for answer in question.answers]
    return float(any(found)) if question.metric == "part" else sum(found) / len(found)


def exact(text: str, question: Question) -> bool | None:
    """Whether the text is the answer and nothing else, quotes and the full stop aside.

    None where that is not known: several answers, or no end of an answer (it is cut once it holds what was asked for).
    """
    if len(question.answers) != 1 or question.stop is None:
        return None
    return text.strip().strip("\"'. ") == question.answers[0]


def cut(text: str, stop: str | None) -> str:
    """The answer as far as it counts: up to ``stop`` where that comes after something was said."""
    if not stop:
        return text.strip()
    return text.lstrip().split(stop, 1)[0].strip()


def decided(text: str, question: Question) -> bool:
    """Whether nothing that the model could add would change the score."""
    if question.stop is not None:
        return bool(question.stop) and question.stop in text.lstrip()
    return question.metric != "label" and score(text, question) == 1.0
