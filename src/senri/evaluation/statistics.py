"""Intervals and verdicts: how sure a share is, and when two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Share(NamedTuple):
    """``correct`` of ``n``, with its Wilson score interval (Wilson 1927; no continuity correction)."""

    correct: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.correct / self.n


def share(correct: int, n: int) -> Share:
    """A share with its 95 % Wilson interval.

    Raises:
        ValueError: no samples, or more correct than there are.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no share: it takes one sample or more, none correct twice")
    interval = stats.binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return Share(correct, n, float(interval.low), float(interval.high))


def separate(a: Share, b: Share) -> int:
    """1 where ``a`` is above ``b`` with separated intervals, -1 where below, 0 where nothing is shown."""
    return int(a.low > b.high) - int(a.high < b.low)


class Mean(NamedTuple):
    """A mean over independent samples, with its 95 % t interval; NaN bounds for a single sample."""

    value: float
    n: int
    low: float
    high: float


def mean(values: Sequence[float] | np.ndarray) -> Mean:
    """Mean and t interval of independent values, e.g. of one number a document.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("a mean needs at least one value")
    if x.size == 1:
        return Mean(float(x[0]), 1, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Mean(float(x.mean()), int(x.size), float(x.mean()) - half, float(x.mean()) + half)
