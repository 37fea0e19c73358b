"""SVD cleaning: each memory matrix replaced by its best approximation of low rank, and when to do so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from senri.memory.inspect import effective_rank
from senri.memory.state import MemoryState


class SVDCleaningStats(NamedTuple):
    """What a cleaning found and left."""

    original_rank: int  # the largest of all memories
    retained_rank: int  # likewise
    energy_retained: float  # share of the squared singular values of all memories together
    singular_values_before: Tensor  # [B, H, (n,) min(Dv, F)], each memory's in descending order


@torch.no_grad()
def svd_cleaning(
    state: MemoryState, energy_threshold: float = 0.95, max_rank: int | None = None
) -> tuple[MemoryState, SVDCleaningStats]:
    """Keep of each matrix the fewest directions that hold ``energy_threshold`` of its energy (Eckart and Young 1936).

    The energy is the sum of the squared singular values. Memories are cleaned each for itself, of all rows, heads and
    of a store; ``z`` and the pairs still pending stay. Rule ``delta`` goes on as if a segment began here, or it would
    write what was cleaned away once more, negated.

    Args:
        state: see :func:`svd_cleaning_of_all` for those of several layers.
        energy_threshold: in (0, 1]; 1 removes rounding only.
        max_rank: most directions to keep, whatever their energy.

    Returns:
        the cleaned state, without a gradient, and the statistics. Costs ``O(min(Dv, F) Dv F)`` a memory.

    Raises:
        RuntimeError: nothing has been written yet.
        ValueError: impossible numbers; rule ``slot``, whose columns are single values.
    """
    (cleaned,), stats = svd_cleaning_of_all([state], energy_threshold, max_rank)
    return cleaned, stats._replace(singular_values_before=stats.singular_values_before[0])


@torch.no_grad()
def svd_cleaning_of_all(
    states: Sequence[MemoryState], energy_threshold: float = 0.95, max_rank: int | None = None
) -> tuple[list[MemoryState], SVDCleaningStats]:
    """:func:`svd_cleaning` of memories of one shape and rule, as those of a model's layers, which have one statistics:
    its ``singular_values_before`` have the states before their other axes. Only if all are empty it is an error.
    """
    if not 0 < energy_threshold <= 1 or (max_rank is not None and max_rank < 1):
        raise ValueError(f"energy_threshold {energy_threshold} must be in (0, 1] and max_rank {max_rank} >= 1")
    if any(state.slots is not None for state in states):
        raise ValueError("the memory of rule 'slot' holds pairs as they are: there is no sum to clean")
    before = torch.stack([state.M for state in states])
    if not before.any():
        raise RuntimeError("the memory is empty: there is nothing to clean")
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    noise = S[..., :1] * max(before.shape[-2:]) * torch.finfo(S.dtype).eps  # as in torch.linalg.matrix_rank
    rank = S.gt(noise).sum(-1)
    energy = S.double().square()
    held = energy.cumsum(-1)
    needed = (held < energy_threshold * held[..., -1:]).sum(-1) + 1
    retained = torch.minimum(rank, needed if max_rank is None else needed.clamp(max=max_rank))
    kept = torch.arange(S.shape[-1], device=S.device) < retained[..., None]
    after = (U * torch.where(kept, S, 0.0)[..., None, :]) @ Vh
    stats = SVDCleaningStats(int(rank.max()), int(retained.max()), float((energy * kept).sum() / energy.sum()), S)
    return [_replaced(state, M) for state, M in zip(states, after.unbind(), strict=True)], stats


def _replaced(state: MemoryState, M: Tensor) -> MemoryState:
    if state.M_segment is not None and state.z is not None:  # copies: a file must not find one tensor under two names
        state = state._replace(M_segment=M.clone(), z_segment=state.z.clone())
    return state._replace(M=M.clone()).detach()


# Whether to clean after a piece of text: of the state before the piece and the one after it.
Policy = Callable[[MemoryState, MemoryState], bool]


def never(before: MemoryState, after: MemoryState) -> bool:
    """Do not clean."""
    return False


def every(writes: int) -> Policy:
    """When some row has passed a multiple of so many pairs.

    Raises:
        ValueError: ``writes`` below 1.
    """
    if writes < 1:
        raise ValueError(f"every() needs a number of pairs of at least 1, not {writes}; for no cleaning take never")
    return lambda before, after: bool((after.written // writes > before.written // writes).any())


def when_rank_exceeds(threshold: float) -> Policy:
    """When the effective rank of some memory is larger."""
    return lambda before, after: bool((effective_rank(after.M) > threshold).any())


def when_idle(idle: Callable[[], bool]) -> Policy:
    """When ``idle()`` says that nobody waits."""
    return lambda before, after: idle()


class SVDCleaning(NamedTuple):
    """When to clean while a text is read, and how much."""

    when: Policy
    energy_threshold: float = 0.95
    max_rank: int | None = None

    def is_due(self, before: Sequence[MemoryState], after: Sequence[MemoryState]) -> bool:
        """Whether some of the memories, before and after a piece of text, hold something and are to be cleaned."""
        return any(bool(new.M.any()) and self.when(old, new) for old, new in zip(before, after, strict=True))
