"""Fits the unigram cache (:mod:`senri.memory.unigram`): two numbers, on texts that are read as they will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.data import iter_tokens
from senri.data.corpus import Document, beginnings
from senri.data.haystack import BookHaystack
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers import UnigramCache
from senri.memory import UnigramStream
from senri.memory.unigram import rescale
from senri.training.settings import TrainingError

CHARACTERS = 4.3  # to a token, about
UNSEEN = 0.5  # what every token of the vocabulary is counted on top
STRENGTH, SMOOTHING = 0.2, 1000.0  # where the fit starts
STEPS = 12  # of L-BFGS, enough for two numbers


@dataclass(frozen=True)
class UnigramSettings:
    """Names and meanings as in config/training.yaml, section unigram."""

    texts: int
    length: int
    every: int
    background_tokens: int


class UnigramReport(NamedTuple):
    """What was fitted, and what it gives on the texts that it was fitted on."""

    strength: float
    smoothing: float  # occurrences that count as much as having seen nothing
    predictions: int
    loss_without: float  # nats a token
    loss_with: float


class _Piece(NamedTuple):
    """Some predictions of one piece, of one text."""

    hidden: Tensor  # [1, n, hidden]
    stream: UnigramStream
    at: Tensor  # [n]
    target: Tensor  # [n]


@torch.no_grad()
def background(documents: Sequence[Document], tokenizer: Any, tokens: int, vocab_size: int) -> Tensor:
    """Log frequency of each token of the vocabulary in the texts' beginnings, about ``tokens`` tokens: ``[V]``."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for document in beginnings(documents, round(CHARACTERS * tokens)):
        for ids in iter_tokens([document.text], tokenizer):
            counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
    counts += UNSEEN
    return (counts / counts.sum()).log().float()


def fit_unigram_cache(
    model: SenriForCausalLM,
    documents: Sequence[Document],
    tokenizer: Any,
    settings: UnigramSettings,
    seed: int,
    *,
    piece_size: int = 1024,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> UnigramReport:
    """Give ``model`` a unigram cache, fitted on ``documents``; in place. Nothing else of the model changes.

    Args:
        settings: of each text the predictions behind two windows count, one in ``every``.
        show: called with the tokens read so far, and all there are to read.

    Raises:
        TrainingError: texts that are not longer than two windows.
    """
    if settings.length <= 2 * model.config.sliding_window_size + 1:
        raise TrainingError(
            f"unigram.length is {settings.length} and must be more than two windows "
            f"({2 * model.config.sliding_window_size}): before that hardly anything has left the window"
        )
    model.eval().requires_grad_(False)
    if model.unigram_cache is None:
        model.config.unigram_cache, model.unigram_cache = True, UnigramCache(model.config.vocab_size)
    model.unigram_cache.reset_parameters()
    model.unigram_cache.to(model.device, torch.float32).requires_grad_(False)
    frequency = background(documents, tokenizer, settings.background_tokens, model.config.vocab_size).to(model.device)
    rng, haystack, pieces = Random(seed), BookHaystack(documents, tokenizer), []
    for number in range(settings.texts):
        ids = torch.from_numpy(haystack.stretch(settings.length, rng).ids).long().to(model.device)
        for done, piece in _read(model, ids, settings.every, piece_size):
            pieces.extend(piece)
            show(number * settings.length + done, settings.texts * settings.length)
    strength, smoothing, without, fitted = _fit(model, pieces, frequency)
    model.unigram_cache.strength.fill_(strength)
    model.unigram_cache.log_rarity.copy_(-frequency - math.log(smoothing))
    return UnigramReport(strength, smoothing, sum(len(p.target) for p in pieces), without, fitted)


@torch.no_grad()
def _read(model: SenriForCausalLM, ids: Tensor, every: int, piece_size: int) -> Iterator[tuple[int, list[_Piece]]]:
    """The predictions that count of one text, piece by piece, with the tokens read so far."""
    cache, ignored = model.model.new_cache(), 2 * model.config.sliding_window_size
    for start in range(0, len(ids) - 1, piece_size):
        piece = ids[start : min(start + piece_size, len(ids) - 1)]
        out = model.model(piece[None], past_key_values=cache)
        places = torch.arange(start, start + len(piece), device=ids.device)
        at = ((places >= ignored) & ((places - ignored) % every == 0)).nonzero()[:, 0]
        kept = [_Piece(out.last_hidden_state[:, at], out.unigram, at, ids[start + 1 + at])] if len(at) else []
        yield start + len(piece), kept


def _fit(model: SenriForCausalLM, pieces: list[_Piece], frequency: Tensor) -> tuple[float, float, float, float]:
    """Strength and smoothing that predict best, and the loss without and with them."""
    total = sum(len(piece.target) for piece in pieces)

    def loss(learned: Tensor) -> float:
        """Adds its gradient; piece by piece, for their logits together would not fit."""
        nats = 0.0
        for piece in pieces:
            logits = model.lm_head(piece.hidden).float()
            scaled = rescale(logits, piece.stream, piece.at, learned[0].exp(), -frequency - learned[1])
            part = F.cross_entropy(scaled[0], piece.target, reduction="sum") / total
            if part.requires_grad:
                part.backward()
            nats += part.item()
        return nats

    learned = nn.Parameter(torch.tensor([STRENGTH, SMOOTHING], device=frequency.device).log())
    optimizer = torch.optim.LBFGS([learned], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        return loss(learned)

    optimizer.step(closure)
    with torch.no_grad():
        strength, smoothing = learned.exp().tolist()
        silent = torch.stack([learned.new_tensor(-torch.inf), learned[1]])
        return strength, smoothing, loss(silent), loss(learned)
