"""What Lagged Cache Training is judged by, of a trained model: passes until the sequential states, loss of other text.

Shapes: ``B`` texts, ``N`` tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from senri.data.haystack import Stretch
from senri.evaluation.scratch import windowed_nll
from senri.lm import FeedbackLM, TransformerLM


@torch.no_grad()
def gaps_by_pass(model: FeedbackLM, input_ids: Tensor, segment_length: int, tolerance: float) -> list[float]:
    """How far each pass of ``[B, N]`` tokens ends from the sequential states, until it is ``tolerance`` or N are made.

    Of each position ``|h - true| / |true|``; the largest counts. Passes begin with the learned start at every position.
    """
    true = model.sequential_states(input_ids, segment_length)
    cache: Tensor | None = None
    gaps: list[float] = []
    while len(gaps) < input_ids.shape[1] and (not gaps or gaps[-1] > tolerance):
        cache = model.refine(input_ids, cache, 1, segment_length=segment_length).cache
        gaps.append(float(((cache - true).norm(dim=-1) / true.norm(dim=-1)).max()))
    return gaps


def validation(model: TransformerLM, texts: Sequence[Stretch], segment_length: int, batch_size: int) -> list[float]:
    """Mean nats a token of each text, read as the model is used: a :class:`FeedbackLM` sequentially."""
    device, found = model.embed_in.weight.device, list[float]()
    for start in range(0, len(texts), batch_size):
        ids = np.stack([text.ids for text in texts[start : start + batch_size]]).astype(np.int64)
        nll = windowed_nll(model, torch.from_numpy(ids).to(device), segment_length, segment_length, carry=True)
        found += nll.mean(1).tolist()
    return found
