"""What a model in training recalls, on a few fixed samples: with its memory, and with the memory emptied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from senri.data.training_sample import TrainingSample
from senri.hf.cache import without_memory
from senri.hf.modeling_senri import SenriForCausalLM
from senri.training.objective import GateRecorder


@torch.no_grad()
def probe(model: SenriForCausalLM, samples: Iterable[TrainingSample], piece_length: int, *, bf16: bool = False) -> dict:
    """Read the samples in ``eval()`` and compare.

    Returns:
        ``write_plain``, ``write_asked``: mean write gate of plain tokens and of those that are asked for later, of the
        tokens that left the window; ``answers``, ``answers_off``: share of the answers (stretches of scored tokens) all
        of whose tokens are the most probable one, with memory and with the memory emptied; ``tokens``, ``tokens_off``:
        the same by token. None where there is nothing to count.
    """
    training = model.training
    model.eval()
    gates: dict[str, list[float]] = {"plain": [], "asked": []}
    right: dict[str, list[np.ndarray]] = {"": [], "_off": []}
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            for sample in samples:
                spans = answers(sample)
                for suffix, memory in (("", True), ("_off", False)):
                    if spans or memory:
                        hits = _read(model, sample, piece_length, memory, gates)
                        right[suffix] += [hits[start:end] for start, end in spans]
    finally:
        model.train(training)
    result: dict[str, Any] = {f"write_{name}": _mean(values) for name, values in gates.items()}
    for suffix, found in right.items():
        result[f"answers{suffix}"] = _mean([bool(hits.all()) for hits in found])
        result[f"tokens{suffix}"] = _mean(np.concatenate(found).tolist() if found else [])
    return result


def answers(sample: TrainingSample) -> list[tuple[int, int]]:
    """``[start, end)`` of the stretches to be recalled; none in a sample without tokens that are asked for later.

    Tokens around them may be scored too, with less weight.
    """
    if not (sample.write == 1).any():
        return []
    weight = sample.weight.copy()
    weight[0] = 0
    scored = (weight > 0) & (weight == weight.max())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], scored.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _read(
    model: SenriForCausalLM, sample: TrainingSample, piece_length: int, memory: bool, gates: dict[str, list[float]]
) -> np.ndarray:
    """``[T]`` bool: scored tokens that are the most probable one after those before them."""
    window = model.config.sliding_window_size
    labels = np.concatenate([np.full(window, -1, np.int8), sample.write])
    cache = model.model.new_cache()
    ids = torch.from_numpy(sample.ids.astype(np.int64)).to(model.device)
    scored = torch.from_numpy(sample.weight > 0).to(model.device)
    hits = np.zeros(len(ids), bool)
    # without memory, nothing of a piece may be written before the piece's end
    size = piece_length if memory else min(piece_length, window)
    with GateRecorder(model) as recorder:
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            with recorder.piece():
                hidden = model.model(piece[None], past_key_values=cache).last_hidden_state[0]
            wanted = scored[start + 1 : start + 1 + len(piece)].nonzero()[:, 0]
            if len(wanted):
                predicted = model.lm_head(hidden[wanted]).argmax(-1)
                where = wanted + start + 1
                hits[where.cpu().numpy()] = (predicted == ids[where]).cpu().numpy()
            if not memory:
                cache = without_memory(cache)
                continue
            beta = recorder.write_gates()
            if beta is not None:
                left = labels[start : start + len(piece)]
                gates["plain"] += beta[0].cpu().numpy()[left == 0].tolist()
                gates["asked"] += beta[0].cpu().numpy()[left == 1].tolist()
    return hits


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None
