"""Perplexity of held-out text by position: with memory, without it, and with full attention as far as it reaches.

Every token is scored once, given all that the model can see before it. Scoring each segment on its own, as much code
does, hides the context from its first tokens; it is here as the contrast that shows how much that costs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from senri.data.haystack import Stretch
from senri.evaluation.readers import FullAttentionReader, SenriReader, without_memory
from senri.evaluation.recall import Record, tokens
from senri.evaluation.report import Curves, Section, Series, Table
from senri.evaluation.runner import FULL_ATTENTION, MEMORY, MEMORY_OFF
from senri.evaluation.statistics import Mean, mean
from senri.evaluation.suites import Bench, Sources

SEGMENTS = "segments alone"
ARMS = (MEMORY, MEMORY_OFF, FULL_ATTENTION, SEGMENTS)
STRIDE = 512  # tokens scored anew by each window
BLOCK = 512  # tokens whose logits exist at once
FIRST_EDGE = 256


@torch.no_grad()
def streamed_nll(reader: SenriReader, ids: np.ndarray, *, memory: bool = True) -> np.ndarray:
    """Negative log likelihood in nats of ``ids[1:]``, read as one text: ``[N - 1]``."""
    model = reader.model
    size = reader.piece_size if memory else min(reader.piece_size, model.config.sliding_window_size)
    cache, parts = model.model.new_cache(), []
    for start in range(0, len(ids) - 1, size):
        piece = torch.from_numpy(ids[start : start + size].astype(np.int64))[None].to(model.device)
        logits = model(piece, past_key_values=cache).logits
        if not memory:
            cache = without_memory(cache)
        targets = torch.from_numpy(ids[start + 1 : start + 1 + size].astype(np.int64))[None]
        parts.append(token_nll(lambda given: given, logits, targets)[0])
    return np.concatenate(parts)


@torch.no_grad()
def sliding_window_nll(model: Any, ids: np.ndarray, window: int, stride: int = STRIDE) -> np.ndarray:
    """Negative log likelihood in nats of ``ids[1:]`` under a model with a limited context: ``[N - 1]``.

    Windows of ``window`` tokens, each ``stride`` further than the one before; only the tokens that no earlier window
    scored count. ``stride = window`` is segment-wise scoring.

    Args:
        model: a causal language model of transformers, or with the same ``.model`` and ``.lm_head``.
    """
    out = np.empty(len(ids) - 1)
    done = 0
    for start in range(0, max(len(ids) - window, 0) + stride, stride):
        part = torch.from_numpy(ids[start : start + window].astype(np.int64))[None]
        end = start + part.shape[1] - 1
        if end <= done:
            break
        hidden = model.model(part.to(model.device), use_cache=False).last_hidden_state
        fresh = done - start  # predictions of this window that an earlier one has made
        out[done:end] = token_nll(model.lm_head, hidden[:, fresh:-1], part[:, fresh + 1 :])[0]
        # the first token of a segment on its own has nothing before it: it is not scored but skipped
        done = end + (stride == window)
        if stride == window and end < len(out):
            out[end] = np.nan
    return out


def token_nll(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> np.ndarray:
    """Negative log likelihood in nats of ``targets`` ``[B, T']`` under the states ``[B, T, hidden]`` before them.

    Args:
        head: states -> logits; ``T' <= T``.
    """
    parts = [np.empty((len(targets), 0))]
    for start in range(0, targets.shape[1], BLOCK):
        goal = targets[:, start : start + BLOCK].to(hidden.device)
        logits = head(hidden[:, start : start + goal.shape[1]]).float()
        parts.append(F.cross_entropy(logits.mT, goal, reduction="none").cpu().double().numpy())
    return np.concatenate(parts, axis=1)


def reading(perplexity: float) -> str:
    """What a perplexity says at first sight (SPEC section 7)."""
    steps = ((5, "leak?"), (30, "suspiciously low: known text?"), (500, "normal for a small model"), (1000, "high"))
    return next((text for bound, text in steps if perplexity < bound), "untrained")


@dataclass(frozen=True)
class PerplexitySuite:
    """Stretches of held-out text, scored by all arms."""

    sources: Sources
    length: int
    samples: int
    name: str = "perplexity"

    def run(self, bench: Bench) -> None:
        """See :class:`senri.evaluation.suites.Suite`."""
        for sample, stretch in enumerate(self._texts()):
            key = f"{self.name}/{sample}"
            digest = hashlib.sha256(stretch.ids.tobytes()).hexdigest()
            if (known := bench.log.records.get(key)) is None:
                text = {"source": stretch.source, "text_sha256": digest}
                bench.log.add({"key": key, **text, **self._measure(bench, stretch.ids)})
                bench.progress(f"{self.name}: text {sample + 1} of {self.samples}, {stretch.source}")
            elif known["text_sha256"] != digest:
                raise ValueError(f"{bench.log.path} holds another text as {key}: name another folder with -o")

    def check(self) -> None:
        """See :class:`senri.evaluation.suites.Suite`."""
        self._texts()

    def _texts(self) -> list[Stretch]:
        """Without a token in common: only so are they as many as they are."""
        return self.sources.books.disjoint(self.length, self.samples, Random(f"{self.sources.seed}/perplexity"))

    def _measure(self, bench: Bench, ids: np.ndarray) -> dict[str, Any]:
        reader = bench.reader
        assert isinstance(reader, SenriReader)
        nll = {arm: streamed_nll(reader, ids, memory=arm == MEMORY) for arm in (MEMORY, MEMORY_OFF)}
        if isinstance(bench.full, FullAttentionReader):
            longest = bench.full.longest or len(ids)
            nll[FULL_ATTENTION] = sliding_window_nll(bench.full.model, ids[:longest], longest)
            window = reader.model.config.sliding_window_size
            nll[SEGMENTS] = sliding_window_nll(bench.full.model, ids, window, stride=window)
        edges = position_edges(self.length)
        return {"edges": edges, "arms": {arm: by_position(values, edges) for arm, values in nll.items()}}

    def section(self, records: Sequence[Record], window: int | None) -> Section:
        """See :class:`senri.evaluation.suites.Suite`."""
        edges = records[0]["edges"]
        arms = [arm for arm in ARMS if arm in records[0]["arms"]]
        buckets = range(len(edges) - 1)
        whole = {arm: [mean_nll(r, arm, buckets) for r in records] for arm in arms}
        positions = [(f"{tokens(low)} to {tokens(high)}", [b]) for b, (low, high) in enumerate(pairwise(edges))]
        lengths = [(tokens(high), range(b + 1)) for b, high in enumerate(edges[1:])]
        tables = (
            _overall_table(whole, records, arms),
            _table("Perplexity by position", "tokens before", records, positions),
            _table("Perplexity by length of the text", "length", records, lengths),
        )
        figure = Curves(
            "perplexity_by_position",
            f"Perplexity by position ({len(records)} texts" + (f", window {window:,})" if window else ")"),
            "tokens before, up to",
            "perplexity",
            tuple(_series(records, arm, edges) for arm in arms),
            log_x=True,
        )
        paired = Curves(
            "perplexity_difference",
            f"Difference from memory off, paired by text ({len(records)} texts)",
            "tokens before, up to",
            "nats a token (below 0: better)",
            tuple(_paired_series(records, arm, edges) for arm in arms if arm != MEMORY_OFF),
            log_x=True,
        )
        flags = [
            f"LEAK?: {arm}: perplexity {math.exp(np.mean(values)):.2f} is below 5: was the text trained on?"
            for arm, values in whole.items()
            if math.exp(np.mean(values)) < 5
        ]
        text = (
            f"{len(records)} stretches of {self.length:,} tokens of held-out text. Intervals (95 %) are over texts; "
            "the difference is paired, so it shows what the memory does, not how hard the texts are."
        )
        return Section("Perplexity", text, tuple(flags), tables, (figure, paired))


def position_edges(length: int) -> list[int]:
    """0, 256, 512, 1024, ... and ``length``: the numbers of tokens before, between which positions are pooled."""
    edges = [0]
    while (FIRST_EDGE << (len(edges) - 1)) < length - 1:
        edges.append(FIRST_EDGE << (len(edges) - 1))
    return [*edges, length]


def by_position(nll: np.ndarray, edges: Sequence[int]) -> list[list[float]]:
    """``[sum, count]`` of each bucket; the prediction of token ``i + 1`` has ``i + 1`` tokens before it."""
    out = []
    for low, high in pairwise(edges):
        part = nll[max(low - 1, 0) : high - 1]
        part = part[~np.isnan(part)]
        out.append([float(part.sum()), len(part)])
    return out


def mean_nll(record: Record, arm: str, buckets: Sequence[int]) -> float:
    """Nats a token of a text in some buckets."""
    parts = [record["arms"][arm][b] for b in buckets]
    return sum(p[0] for p in parts) / max(sum(p[1] for p in parts), 1)


def _measured(record: Record, arm: str, bucket: int) -> bool:
    """Whether the arm scored the bucket whole (full attention ends somewhere)."""
    return record["arms"][arm][bucket][1] >= record["arms"][MEMORY][bucket][1] * 0.9 > 0


def _table(title: str, axis: str, records: Sequence[Record], rows: Sequence[tuple[str, Sequence[int]]]) -> Table:
    """Each arm's perplexity and the paired difference, for buckets pooled as ``rows`` (label, buckets) says."""
    arms = [arm for arm in ARMS if arm in records[0]["arms"]]
    lines = []
    for label, buckets in rows:
        cells: list[str | float | None] = [label]
        for arm in arms:
            known = all(_measured(records[0], arm, bucket) for bucket in buckets)
            cells.append(math.exp(np.mean([mean_nll(r, arm, buckets) for r in records])) if known else None)
        cells += difference([mean_nll(r, MEMORY, buckets) - mean_nll(r, MEMORY_OFF, buckets) for r in records])
        lines.append(tuple(cells))
    columns = (axis, *arms, "memory − memory off (nats)", "verdict")
    return Table(title, columns, tuple(lines), dict.fromkeys(arms, ".2f"))


def difference(values: Sequence[float]) -> list[str | float | None]:
    """A mean difference in nats with its interval, and what it shows (below 0: better)."""
    found = mean(values)
    if found.n == 1:
        return [f"{found.value:+.4f}", "nothing shown: one text"]
    verdict = "better" if found.high < 0 else "worse" if found.low > 0 else "nothing shown"
    return [f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]", verdict]


def _overall_table(whole: dict[str, list[float]], records: Sequence[Record], arms: Sequence[str]) -> Table:
    rows = []
    for arm in arms:
        found: Mean = mean(whole[arm])
        scored = sum(int(b[1]) for r in records for b in r["arms"][arm])
        bounds = None if found.n == 1 else f"[{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"
        rows.append((arm, scored, math.exp(found.value), bounds, reading(math.exp(found.value))))
    return Table(
        "Perplexity of whole texts",
        ("arm", "tokens scored", "perplexity", "interval", "reading"),
        tuple(rows),
        {"perplexity": ".2f", "tokens scored": ",d"},
        f"{FULL_ATTENTION} covers only the beginning of each text, as far as the base's context reaches.",
    )


def _series(records: Sequence[Record], arm: str, edges: Sequence[int]) -> Series:
    """Perplexity; without intervals, for what differs between texts would hide what differs between arms."""
    known = [b for b in range(len(edges) - 1) if _measured(records[0], arm, b)]
    nll = [mean([mean_nll(r, arm, [b]) for r in records]).value for b in known]
    return Series(arm, tuple(float(edges[b + 1]) for b in known), tuple(map(math.exp, nll)))


def _paired_series(records: Sequence[Record], arm: str, edges: Sequence[int]) -> Series:
    """Difference from memory off in nats, text by text, with its interval."""
    known = [b for b in range(len(edges) - 1) if _measured(records[0], arm, b)]
    found = [mean([mean_nll(r, arm, [b]) - mean_nll(r, MEMORY_OFF, [b]) for r in records]) for b in known]
    bounded = len(records) > 1
    return Series(
        arm,
        tuple(float(edges[b + 1]) for b in known),
        tuple(m.value for m in found),
        tuple(m.low for m in found) if bounded else (),
        tuple(m.high for m in found) if bounded else (),
    )
