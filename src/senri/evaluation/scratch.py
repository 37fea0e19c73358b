"""A model from scratch, measured: perplexity of long texts with its memory and with the memory emptied, the reversal
curse, speed and state.

Shapes: ``B`` texts, ``N`` tokens of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senri.data.haystack import Stretch
from senri.data.reversal import Pair
from senri.evaluation.completions import evaluate_reversal, model_scorer
from senri.evaluation.perplexity import by_position, position_edges, token_nll
from senri.lm import ModelState, TransformerLM

# How a long text is read. Each token is scored once by each.
CARRIED = "segments, memory carried"
EMPTIED = "segments, memory emptied"
SLIDING_CARRIED = "sliding window, memory carried"
SLIDING_EMPTIED = "sliding window, memory emptied"
ONE_CALL = "one call"
READINGS = (CARRIED, EMPTIED, SLIDING_CARRIED, SLIDING_EMPTIED, ONE_CALL)
PAIRED = ((CARRIED, EMPTIED), (SLIDING_CARRIED, SLIDING_EMPTIED))
RIGHT, CROSSED = "its own prompt", "another fact's prompt"


@dataclass(frozen=True)
class LMEvaluation:
    """Names and meanings as in config/experiment.yaml, ``transformer_lm.evaluation``."""

    length: int
    samples: int
    stride: int
    batch_size: int


@torch.no_grad()
def windowed_nll(model: TransformerLM, ids: Tensor, window: int, stride: int, *, carry: bool) -> np.ndarray:
    """Negative log likelihood in nats of ``ids[:, 1:]``: ``[B, N - 1]``.

    Softmax attention sees windows of ``window`` tokens, each ``stride`` further than the one before; a token counts in
    the first window that can predict it. ``stride = window``: segments, as in training.

    Args:
        ids: ``[B, N]``.
        carry: the memories hold all that stands before the window; else each window begins with empty ones.

    Raises:
        ValueError: a stride beyond the window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride ({stride}) must be 1 to the window ({window})")
    out = np.empty((ids.shape[0], ids.shape[1] - 1))
    state, done = model.init_state(len(ids)), 0
    for start in range(0, ids.shape[1], stride):
        part = ids[:, start : start + window]
        end = min(start + part.shape[1], out.shape[1])
        hidden, after = model.read(part, state)
        fresh = done - start  # predictions of this window that an earlier one has made
        out[:, done:end] = token_nll(model.lm_head, hidden[:, fresh:], ids[:, done + 1 : end + 1])
        done = end
        if done == out.shape[1]:
            break
        if carry:
            state = _advance(model, part, state, after, stride)
    return out


def _advance(model: TransformerLM, part: Tensor, state: ModelState, after: ModelState, stride: int) -> ModelState:
    """The memories once the first ``stride`` tokens of a window have been read; ``after`` all of it."""
    if stride < part.shape[1]:
        _, after = model.read(part[:, :stride], state)
    return after.next_segment()


def readings(model: TransformerLM, ids: Tensor, window: int, stride: int) -> dict[str, np.ndarray]:
    """:func:`windowed_nll` by name; a model without memory has nothing to carry."""
    found = {
        EMPTIED: windowed_nll(model, ids, window, window, carry=False),
        SLIDING_EMPTIED: windowed_nll(model, ids, window, stride, carry=False),
        ONE_CALL: windowed_nll(model, ids, ids.shape[1], ids.shape[1], carry=False),
    }
    if model.has_memory:
        found[CARRIED] = windowed_nll(model, ids, window, window, carry=True)
        found[SLIDING_CARRIED] = windowed_nll(model, ids, window, stride, carry=True)
    return {name: found[name] for name in READINGS if name in found}


def crossed(pairs: Sequence[Pair]) -> list[Pair]:
    """The completions of each fact after the prompts of the next one of the same kind (in a circle).

    Of the same kind: of the same source, and turned alike where :func:`senri.data.reversal.fact_sets` turned every
    second.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    count: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        count[pair.source] = count.get(pair.source, 0) + 1
        groups.setdefault((pair.source, count[pair.source] % 2), []).append(index)
    following = {a: b for group in groups.values() for a, b in zip(group, [*group[1:], group[0]], strict=True)}
    return [
        replace(
            pair,
            forward_prompt=pairs[following[i]].forward_prompt,
            backward_prompt=pairs[following[i]].backward_prompt,
        )
        for i, pair in enumerate(pairs)
    ]


def measure(
    model: TransformerLM,
    tokenizer: Any,
    texts: Sequence[Stretch],
    facts: Mapping[str, Sequence[Pair]],
    window: int,
    settings: LMEvaluation,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All figures of a trained model as JSON values.

    Args:
        model: in ``eval()``, without an open session.
        texts: of ``settings.length`` tokens.
        facts: by name of the set; of each the forward direction was trained on.
        window: tokens that softmax attention was trained on.
    """
    device = model.embed_in.weight.device
    edges = position_edges(settings.length)
    records: list[dict[str, Any]] = []
    for start in range(0, len(texts), settings.batch_size):
        part = texts[start : start + settings.batch_size]
        ids = torch.from_numpy(np.stack([text.ids for text in part]).astype(np.int64)).to(device)
        by_reading = readings(model, ids, window, settings.stride)
        for row, text in enumerate(part):
            arms = {name: by_position(nll[row], edges) for name, nll in by_reading.items()}
            records.append({"source": text.source, "arms": arms})
        progress(f"read {len(records)} of {len(texts)} texts")
    reversal = measure_reversal(model, tokenizer, facts, progress)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory_bytes": model.init_state().nbytes,
        "segment_bytes": _segment_bytes(model, window),
        "reading_tokens_per_second": reading_speed(model, texts[0].ids, window),
        "edges": edges,
        "texts": records,
        "reversal": reversal,
    }


def measure_reversal(
    model: TransformerLM,
    tokenizer: Any,
    facts: Mapping[str, Sequence[Pair]],
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The completions of each set of facts, scored behind their own prompts and behind those of other facts."""
    reversal = {}
    for name, pairs in facts.items():
        score = model_scorer(model, tokenizer, lead=tokenizer.eos_token)
        asked = {RIGHT: pairs, CROSSED: crossed(pairs)}
        reversal[name] = {arm: [s._asdict() for s in evaluate_reversal(score, ps)] for arm, ps in asked.items()}
        progress(f"asked {len(pairs)} facts: {name}")
    return reversal


@torch.no_grad()
def _segment_bytes(model: TransformerLM, window: int) -> int:
    """Bytes of the whole state at the end of a segment, keys and values included."""
    ids = torch.zeros(1, window, dtype=torch.long, device=model.embed_in.weight.device)
    return model.read(ids)[1].nbytes


@torch.no_grad()
def reading_speed(model: TransformerLM, ids: np.ndarray, window: int) -> float:
    """Tokens a second while a text ``[N]`` is read segment by segment, without predicting anything."""
    text = torch.from_numpy(ids.astype(np.int64))[None].to(model.embed_in.weight.device)
    model.read(text[:, :window])  # the first call is slower
    started, state = time.perf_counter(), model.init_state()
    for start in range(0, text.shape[1], window):
        _, state = model.read(text[:, start : start + window], state)
        state = state.next_segment()
    if text.is_cuda:
        torch.cuda.synchronize()
    return text.shape[1] / (time.perf_counter() - started)
