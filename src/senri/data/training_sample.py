"""What training asks of its data: samples by number, so that the position in the data is one integer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TrainingSample:
    """One text to be read, which of its tokens are to be predicted, and which of them are worth remembering."""

    ids: np.ndarray  # [T] int32
    weight: np.ndarray  # [T] float32: weight of the loss of predicting token t; 0: not scored
    write: np.ndarray  # [T] int8: 1 = token that is asked for later, 0 = plain text, -1 = not labelled
    task: str  # which part of the mix it comes from
    source: str  # which text


class Mix(Protocol):
    """Samples of one length without end; the same number always gives the same sample."""

    def __getitem__(self, index: int) -> TrainingSample: ...

    def at_length(self, max_length: int) -> Mix:
        """The mix with samples of another length."""
        ...
