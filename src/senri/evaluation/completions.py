"""Completions in two directions, scored by any model: what the reversal curse is measured with (Berglund et al. 2023,
arXiv:2309.12288).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from senri.data.haystack import encode
from senri.data.reversal import Pair
from senri.evaluation.statistics import CONFIDENCE
from senri.hf.cache import SenriCache

Score = Callable[[str, str], tuple[float, int]]  # (prompt, completion) -> nats of the completion, its tokens
RESAMPLES = 2000


class Scored(NamedTuple):
    """One fact's completions: nats, and tokens they are the sum over."""

    forward_nll: float
    forward_tokens: int
    backward_nll: float
    backward_tokens: int


class Estimate(NamedTuple):
    """A figure and its 95 % bootstrap interval over facts; None what is not finite, or not known from one fact."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Reversal:
    """The figures of ``n`` facts. Perplexity: exp of the mean nats of a completion's token, over all facts."""

    n: int
    forward: Estimate
    backward: Estimate
    ratio: Estimate  # forward / backward perplexity: below 1, forward is known better
    gap: Estimate  # backward - forward perplexity


def completion_nll(model: Any, ids_prompt: Sequence[int], ids_completion: Sequence[int], cache: Any = None) -> float:
    """Nats of a completion after a prompt: the sum of its tokens' negative log-likelihoods.

    Args:
        model: any causal language model in ``eval()`` whose output has ``logits`` ``[B, T, vocabulary]``.
        cache: what was read before the prompt; it stays as it is.

    Raises:
        ValueError: nothing to score or to start from, a model in ``train()`` or in an open session, or scores that are
            not finite.
    """
    if not ids_prompt or not ids_completion:
        raise ValueError("a prompt and a completion take one token or more each")
    if model.training:
        raise ValueError("evaluation is for a model in eval(): call model.eval() first")
    if cache is None and getattr(model, "session", None) is not None:
        raise ValueError("the model would go on from its open session: call model.end_session() first")
    device = next(model.parameters()).device
    ids = torch.tensor([[*ids_prompt, *ids_completion[:-1]]], device=device)
    more = {} if cache is None else {"past_key_values": _fork(cache), "use_cache": True}
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits[0, -len(ids_completion) :]
    targets = torch.tensor(ids_completion, device=device)[:, None]
    nll = -float(logits.float().log_softmax(-1).gather(1, targets).sum())
    if not np.isfinite(nll):
        raise ValueError("the model's scores are not finite: it is broken, evaluate another one")
    return nll


def model_scorer(model: Any, tokenizer: Any, cache: Any = None, lead: str = "") -> Score:
    """:func:`completion_nll` on texts; ``lead`` goes before every prompt, no special token does."""

    def score(prompt: str, completion: str) -> tuple[float, int]:
        ids = encode(tokenizer, completion)
        return completion_nll(model, encode(tokenizer, lead + prompt), ids, cache), len(ids)

    return score


def evaluate_reversal(score: Score, pairs: Sequence[Pair]) -> list[Scored]:
    """Both completions of every fact, each after its prompt alone."""
    return [
        Scored(
            *score(pair.forward_prompt, pair.forward_completion), *score(pair.backward_prompt, pair.backward_completion)
        )
        for pair in pairs
    ]


def reversal_figures(scored: Sequence[Scored]) -> Reversal:
    """Perplexities, ratio and gap, and how sure they are.

    Raises:
        ValueError: no facts.
    """
    if not scored:
        raise ValueError("the reversal figures need one fact at least")

    def figures(sums: np.ndarray) -> np.ndarray:
        """[..., 4] sums over facts -> [..., 4] figures."""
        forward, backward = np.exp(sums[..., 0] / sums[..., 1]), np.exp(sums[..., 2] / sums[..., 3])
        return np.stack([forward, backward, forward / backward, backward - forward], axis=-1)

    return Reversal(len(scored), *_bootstrap(np.array(scored, dtype=np.float64), figures))


def saved(arm: Sequence[Scored], control: Sequence[Scored]) -> tuple[Estimate, Estimate]:
    """Nats a token that ``arm`` saves against ``control`` on the same facts: forward, and backward.

    Raises:
        ValueError: no facts, or not the same number of them.
    """
    if not arm or len(arm) != len(control):
        raise ValueError("a comparison needs the same facts in both arms")
    a, c = np.array(arm, dtype=np.float64), np.array(control, dtype=np.float64)
    table = np.stack([c[:, 0] - a[:, 0], a[:, 1], c[:, 2] - a[:, 2], a[:, 3]], axis=1)
    forward, backward = _bootstrap(table, lambda sums: sums[..., [0, 2]] / sums[..., [1, 3]])
    return forward, backward


def _bootstrap(table: np.ndarray, figures: Callable[[np.ndarray], np.ndarray]) -> list[Estimate]:
    """Figures of the column sums of ``table`` ``[facts, columns]``, with percentile intervals over drawn facts."""
    n = len(table)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(over="ignore", invalid="ignore"):  # a perplexity may be beyond all numbers: None
        values, drawn = figures(table.sum(axis=0)), figures(draws @ table)
        low, high = np.quantile(drawn, [tail, 1 - tail], axis=0) if n > 1 else np.full((2, len(values)), np.nan)
    return [Estimate(*map(_finite, triple)) for triple in zip(values, low, high, strict=True)]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _fork(cache: Any) -> Any:
    return cache.fork() if isinstance(cache, SenriCache) else copy.deepcopy(cache)
