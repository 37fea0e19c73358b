"""The unigram cache as a module: what is learned of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from senri.memory.unigram import UnigramStream, rescale


class UnigramCache(nn.Module):
    """Adds to the logits what the tokens behind the window say (:mod:`senri.memory.unigram`). Silent at first.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.empty(1))
        self.log_rarity = nn.Parameter(torch.empty(vocab_size))  # -log(smoothing * probability) of each token
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values: silent, and all tokens equally rare."""
        nn.init.zeros_(self.strength)
        nn.init.zeros_(self.log_rarity)

    def forward(self, logits: Tensor, stream: UnigramStream, at: Tensor) -> Tensor:
        """Logits ``[B, n, V]`` of the steps ``at`` ``[n]`` of the call that ``stream`` belongs to."""
        return rescale(logits, stream, at, self.strength[0], self.log_rarity)
