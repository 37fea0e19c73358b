"""Intervals: published values, closed formulas, and whether they hold what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from senri.evaluation.statistics import CONFIDENCE, Share, mean, separate, share

Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(correct, n):
    """Wilson 1927, written out."""
    p, z2 = correct / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17, table I, method 3)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_published_intervals(correct, n, low, high):
    found = share(correct, n)
    assert (found.correct, found.n) == (correct, n)
    assert found.value == correct / n
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_closed_formula(case):
    correct, n = case
    found = share(correct, n)
    assert found.low == pytest.approx(wilson(correct, n)[0], abs=1e-9)
    assert found.high == pytest.approx(wilson(correct, n)[1], abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = share(n - correct, n)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (1, 0), (-1, 10), (11, 10), (0, -1)])
def test_what_is_no_share(correct, n):
    with pytest.raises(ValueError, match=rf"^{correct} of {n} is no share: [^\n]*$"):
        share(correct, n)


def test_the_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(20260101)
    for n in (10, 40):
        intervals = [share(k, n) for k in range(n + 1)]
        truths = rng.uniform(0.02, 0.98, size=20_000)
        found = [intervals[k] for k in rng.binomial(n, truths)]
        covered = [i.low <= p <= i.high for i, p in zip(found, truths, strict=True)]
        assert 0.94 < np.mean(covered) < 0.965
        for p in (0.1, 0.5, 0.9):
            inside = [i.low <= p <= i.high for i in intervals]
            exact = float(np.dot(inside, stats.binom.pmf(range(n + 1), n, p)))
            assert 0.92 < exact < 0.99


def test_separate_needs_a_gap_between_the_intervals():
    assert separate(share(10, 10), share(0, 10)) == 1
    assert separate(share(0, 10), share(10, 10)) == -1
    assert separate(share(6, 10), share(5, 10)) == separate(share(5, 10), share(6, 10)) == 0
    assert separate(share(5, 10), share(5, 10)) == 0
    assert separate(share(55, 100), share(45, 100)) == 0
    assert separate(share(550, 1000), share(450, 1000)) == 1
    touching = Share(1, 2, 0.2, 0.5), Share(1, 2, 0.5, 0.9)
    assert separate(*touching) == separate(*touching[::-1]) == 0
    inside = Share(1, 2, 0.1, 0.9), Share(1, 2, 0.4, 0.5)
    assert separate(*inside) == separate(*inside[::-1]) == 0
    assert isinstance(separate(*inside), int)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_separate_is_antisymmetric_and_follows_the_shares(a, b):
    one, two = share(a, 30), share(b, 30)
    sign = separate(one, two)
    assert separate(two, one) == -sign
    assert sign in (0, (a > b) - (a < b))


def test_equal_shares_are_seldom_called_different():
    rng = np.random.default_rng(7)
    shares = [share(k, 50) for k in range(51)]
    signs = [separate(shares[a], shares[b]) for a, b in rng.binomial(50, 0.4, size=(4000, 2))]
    assert np.mean(np.abs(signs)) < 0.02  # gaps between intervals are stricter than 5 %


def test_the_mean_by_hand():
    found = mean([1, 2, 3, 4])
    # s = sqrt(5/3), t(3) = 3.182446
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert found.value == 2.5
    assert found.n == 4
    assert found.low == pytest.approx(2.5 - half, abs=1e-7)
    assert found.high == pytest.approx(2.5 + half, abs=1e-7)


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_the_mean_against_scipy(values):
    found = mean(values)
    assert found.n == len(values)
    assert found.value == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    spread = float(stats.sem(values))
    if spread > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    else:
        assert found.high - found.low < 1e-6


def test_the_means_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(11)
    found = [mean(row) for row in rng.normal(3.0, 2.0, size=(3000, 5))]
    assert 0.935 < np.mean([m.low <= 3.0 <= m.high for m in found]) < 0.965


def test_few_values():
    alone = mean([2.5])
    assert (alone.value, alone.n) == (2.5, 1)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert mean(np.array([4.0, 4.0])) == (4.0, 2, 4.0, 4.0)
    assert type(mean(np.array([1, 2], dtype=np.float32)).value) is float
    for nothing in ([], np.array([])):
        with pytest.raises(ValueError, match="a mean needs at least one value"):
            mean(nothing)


def test_the_confidence_is_the_documented_one():
    assert CONFIDENCE == 0.95
