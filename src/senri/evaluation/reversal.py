"""The reversal curse: is a fact known, or recalled, in the direction too in which it was not said? The suite of
``senri eval``; its measure, for any model, is in ``completions.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from senri.data.haystack import Plant, encode, plant
from senri.data.reversal import Pair, load_new_pairs, load_pairs
from senri.evaluation.completions import (
    Estimate,
    Score,
    Scored,
    evaluate_reversal,
    model_scorer,
    reversal_figures,
    saved,
)
from senri.evaluation.recall import Record
from senri.evaluation.report import Section, Table
from senri.evaluation.runner import ARMS, FULL_ATTENTION, MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY

if TYPE_CHECKING:
    from senri.evaluation.suites import Bench, Sources

KNOWN, READ = "reversal/known", "reversal/read"
MODEL = "model"  # the arm of known facts beside FULL_ATTENTION
# The right completions after another fact's prompts: a memory that does as well there knows the words, not the fact.
MEMORY_CROSSED, OFF_CROSSED = f"{MEMORY}, crossed prompts", f"{MEMORY_OFF}, crossed prompts"
BEFORE = 64  # tokens of text before a fact, about: the first token of all is special to attention
BEYOND = 512  # tokens read after a fact beyond the window
ROOM = 128  # tokens that a prompt and its completion take at most


@dataclass(frozen=True)
class ReversalSuite:
    """Known facts asked for in both directions, and new facts that were read in one.

    The last of ``new`` is never asked for: its reading gives the "other memory".
    """

    sources: Sources
    known: tuple[Pair, ...]
    new: tuple[Pair, ...]
    name: str = "reversal"

    def run(self, bench: Bench) -> None:
        """See :class:`senri.evaluation.suites.Suite`.

        Raises:
            ValueError: the log holds other facts under the same names (it is of another run).
        """
        readings = _Readings(self.sources, self.new, bench)
        for number, pair in enumerate(self.known):
            _add(bench, KNOWN, number, pair, np.empty(0, dtype=np.int32), partial(_known_arms, bench, pair))
        for number, pair in enumerate(self.new[:-1]):
            ids = readings.context(number)
            _add(bench, READ, number, pair, ids, partial(readings.arms, number, ids))

    def check(self) -> None:
        """See :class:`senri.evaluation.suites.Suite`: its facts were made with the suite."""

    def section(self, records: Sequence[Record], window: int | None) -> Section:
        """See :class:`senri.evaluation.suites.Suite`."""
        known, read = _by_arm(records, KNOWN), _by_arm(records, READ)
        tables = [figures_table("Known facts, nothing read", "arm", _all_scored(known))] if known else []
        if read:
            away = (window or 0) + BEYOND
            read_table = figures_table(f"New facts, read {away:,} tokens before", "arm", _all_scored(read))
            tables += [read_table, _saved_table(read)]
        return Section("Reversal curse", _TEXT, tables=tuple(tables))


def reversal(sources: Sources, *, folder: str | None, facts: int) -> ReversalSuite:
    """The suite, with all known facts.

    Args:
        folder: the published data of Berglund et al.; None: our own facts.
        facts: new facts to be read, each about ``window + 600`` tokens, by every control anew; 0: none.

    Raises:
        TextError: the folder does not hold the data; SampleError: fewer new facts than ``facts + 1``.
    """
    new = load_new_pairs(folder, facts + 1, Random(f"{sources.seed}/reversal")) if facts else []
    return ReversalSuite(sources, tuple(load_pairs(folder)), tuple(new))


def _add(
    bench: Bench,
    task: str,
    number: int,
    pair: Pair,
    ids: np.ndarray,
    arms: Callable[[], Iterator[tuple[str, Score, Pair]]],
) -> None:
    """Score a fact after the text ``ids`` by all ``arms`` (name, score, what is asked), unless the log has it."""
    key = f"{task}/{number}"
    digest = hashlib.sha256(ids.tobytes() + json.dumps(astuple(pair)).encode()).hexdigest()
    known = bench.log.records.get(key)
    if known is None:
        found = {arm: evaluate_reversal(score, [asked])[0]._asdict() for arm, score, asked in arms()}
        bench.log.add({"key": key, "task": task, "prompt_sha256": digest, "fact": pair.sentence, "arms": found})
        bench.progress(f"{task}: fact {number + 1:,}: {pair.sentence}")
    elif known["prompt_sha256"] != digest:
        raise ValueError(f"{bench.log.path} holds another sample as {key}: it is of another run, name another folder")


def _known_arms(bench: Bench, pair: Pair) -> Iterator[tuple[str, Score, Pair]]:
    """Nothing is read before."""
    reader: Any = bench.reader
    yield MODEL, model_scorer(reader.model, bench.tokenizer, reader.blank()), pair
    if bench.full is not None:
        full: Any = bench.full
        yield FULL_ATTENTION, model_scorer(full.model, bench.tokenizer), pair


class _Readings:
    """Facts read in their forward direction, so long ago that they have left the window."""

    def __init__(self, sources: Sources, pairs: Sequence[Pair], bench: Bench) -> None:
        self.sources, self.pairs, self.bench = sources, pairs, bench

    def context(self, number: int) -> np.ndarray:
        """A fact in held-out text, token ids ``[N]``."""
        fact = encode(self.bench.tokenizer, " " + self.pairs[number].sentence)
        length = BEFORE + len(fact) + (self.bench.reader.window or 0) + BEYOND
        stretch = self.sources.books.stretch(length, Random(f"{self.sources.seed}/reversal/{number}"))
        return plant(stretch, [Plant(BEFORE, tuple(fact))], length)[0]

    def arms(self, number: int, ids: np.ndarray) -> Iterator[tuple[str, Score, Pair]]:
        """Each arm's score of a fact after ``ids``, its context."""
        reader: Any = self.bench.reader
        pair, crossed = self.pairs[number], _crossed(self.pairs[number], self.pairs[number + 1])
        with_memory, without = reader.read(ids, len(ids)), reader.read(ids, len(ids), memory=False)
        for arm, state, asked in (
            (MEMORY, with_memory, pair),
            (MEMORY_OFF, without, pair),
            (OTHER_MEMORY, reader.with_memory_of(without, self._other), pair),
            (QUESTION_ONLY, reader.blank(), pair),
            (MEMORY_CROSSED, with_memory, crossed),
            (OFF_CROSSED, without, crossed),
        ):
            yield arm, model_scorer(reader.model, self.bench.tokenizer, state, "\n"), asked
        full: Any = self.bench.full
        if full is not None and (full.longest is None or len(ids) + ROOM <= full.longest):
            cache = _read_in_full(full.model, ids)
            yield FULL_ATTENTION, model_scorer(full.model, self.bench.tokenizer, cache, "\n"), pair

    @cached_property
    def _other(self) -> Any:
        """The memory after the last fact."""
        ids = self.context(len(self.pairs) - 1)
        return self.bench.reader.memory_of(self.bench.reader.read(ids, len(ids)))


def _crossed(pair: Pair, following: Pair) -> Pair:
    """The completions of a fact after the prompts of the one that follows, which has its sides in the other order."""
    prompts = following.turned
    return replace(pair, forward_prompt=prompts.forward_prompt, backward_prompt=prompts.backward_prompt)


def _read_in_full(model: Any, ids: np.ndarray) -> DynamicCache:
    """Keys and values of a whole text, as the base model keeps them."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(
            torch.from_numpy(ids.astype(np.int64))[None].to(model.device), past_key_values=cache, use_cache=True
        )
    return cache


def _by_arm(records: Sequence[Record], task: str) -> dict[str, list[Record]]:
    """Records of a task by the arms that they have, in the order of all tables."""
    mine = [r for r in records if r["task"] == task]
    found = {arm: [r for r in mine if arm in r["arms"]] for arm in (MODEL, *ARMS, MEMORY_CROSSED, OFF_CROSSED)}
    return {arm: rs for arm, rs in found.items() if rs}


def _scored(records: Sequence[Record], arm: str) -> list[Scored]:
    return [Scored(**r["arms"][arm]) for r in records]


def _all_scored(by_arm: Mapping[str, Sequence[Record]]) -> dict[str, list[Scored]]:
    return {arm: _scored(records, arm) for arm, records in by_arm.items()}


def figures_table(title: str, axis: str, scored: Mapping[str, Sequence[Scored]]) -> Table:
    """Perplexities, ratio and gap, a row for each name in ``scored``; ``axis`` says what they name."""
    columns = (axis, "facts", "forward perplexity", "backward perplexity", "ratio", "gap")
    rows = []
    for name, facts in scored.items():
        figures = reversal_figures(facts)
        cells = (figures.forward, ".1f"), (figures.backward, ".1f"), (figures.ratio, ".2f"), (figures.gap, "+.1f")
        rows.append((name, figures.n, *(shown(value, spec) for value, spec in cells)))
    note = "ratio = forward / backward; gap = backward − forward; in brackets 95 % bootstrap intervals over facts."
    return Table(title, columns, tuple(rows), note=note)


def _saved_table(by_arm: Mapping[str, Sequence[Record]]) -> Table:
    """The memory against each other arm, on the facts that have both."""
    rows = []
    for other in (*ARMS, OFF_CROSSED):
        arm = MEMORY_CROSSED if other == OFF_CROSSED else MEMORY
        if other != MEMORY and (records := by_arm.get(other, [])):
            forward, backward = saved(_scored(records, arm), _scored(records, other))
            rows.append((arm, other, len(records), shown(forward, "+.3f"), shown(backward, "+.3f")))
    return Table(
        "What the memory saves, in nats a token",
        ("arm", "against", "facts", "forward (as read)", "backward (reversed)"),
        tuple(rows),
        note="Above 0: the completion is more likely with the memory. An interval that holds 0 shows nothing. Crossed "
        "prompts are another fact's: what is saved there too is for the words alone, and shows no fact recalled.",
    )


def shown(estimate: Estimate, spec: str) -> str | None:
    """An estimate and its interval; None: not finite."""
    if estimate.value is None:
        return None
    value = format(estimate.value, spec)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


_TEXT = (
    "A fact has two directions, and a model that completes one often cannot complete the other (Berglund et al. "
    "2023). Perplexity is that of the completion's tokens alone. The two completions of a fact are different words, so "
    "no ratio is a mark of its own: compare it between models and arms. Known facts test the weights. New facts, about "
    "persons who do not exist, were read in the forward direction only, as often with the name first as with the "
    "description, and had left the window when both directions were asked for."
)
