"""Memories as algebra: what ``linear`` wrote can be added and subtracted, what the delta rules do can be composed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from senri.memory.feature_maps import feature_dim
from senri.memory.rules import RULES
from senri.memory.scan import scan
from senri.memory.state import MemoryState
from senri.memory.stores import Routed, Store


def merge(states: Sequence[MemoryState], weights: Sequence[float] | None = None) -> MemoryState:
    """The weighted sum of memories of rule ``linear``: that of the shards of a stream is the memory of the stream.

    Exactly so for memories without a forget gate; of a store, memory by memory (where ``banks``, ``multi`` and
    ``hierarchical`` take turns, each shard begins anew, so only the sum over the memories is that of the stream).

    Raises:
        ValueError: no states, other weights than states, another rule, shapes that differ, pairs that are pending.
    """
    weights = [1.0] * len(states) if weights is None else weights
    if not states or len(weights) != len(states):
        raise ValueError(f"merge needs at least one state and a weight for each, not {len(states)} and {len(weights)}")
    M = torch.zeros_like(states[0].M)
    z, written = torch.zeros_like(M[..., 0, :]), torch.zeros_like(states[0].written)
    for state, weight in zip(states, weights, strict=True):
        if state.z is None or state.M_segment is not None:
            raise ValueError("only memories of rule 'linear' can be added")
        if (state.M.shape, state.store) != (M.shape, states[0].store):
            both = " and ".join(f"{list(s.M.shape)} of store {s.store or 'single'!r}" for s in (states[0], state))
            raise ValueError(f"memories of shapes {both} cannot be added")
        if state.pending is not None:
            raise ValueError("pairs that are pending cannot be added: write them first (scan with delay=0)")
        M, z, written = M + weight * state.M, z + weight * state.z, written + state.written
    return MemoryState(M, z, None, None, written, store=states[0].store)


def forget(
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    feature_map: str | None = None,
    store: Store | None = None,
) -> MemoryState:
    """Take pairs back that rule ``linear`` wrote: exact if no forget gate has weakened them since.

    ``written`` stays: it is a position in the text, too.

    Args:
        k: keys ``[B, T, H, Dk]`` and v: values ``[B, T, H, Dv]``, as they were written.
        beta: their write gate ``[B, T, H]``; None: 1.
        feature_map: as in the scan.
        store: None or ``routed``; the key does not tell where the others wrote it.

    Raises:
        ValueError: a store that does not know its pairs by their keys; a state of another rule or store.
    """
    if not (store is None or isinstance(store, Routed)):
        raise ValueError(
            f"store {store.name!r} does not know where it wrote a key; forget works with single and routed"
        )
    gate = -(k.new_ones(k.shape[:3]) if beta is None else beta)
    _, after = scan(k, k, v, state._replace(pending=None), beta=gate, feature_map=feature_map, store=store)
    return after._replace(written=state.written, pending=state.pending)


class Transition(NamedTuple):
    """What a stretch of text does to any memory of a delta rule: ``M -> M A + B``."""

    A: Tensor  # [B, H, F, F]
    B: Tensor  # [B, H, Dv, F]
    written: Tensor  # [B] int64: pairs of the stretch


def transition(
    k: Tensor,
    v: Tensor,
    *,
    rule: str,
    beta: Tensor | None = None,
    log_alpha: Tensor | None = None,
    mask: Tensor | None = None,
    feature_map: str | None = None,
    chunk_size: int = 64,
) -> Transition:
    """The stretch's transition by ``delta_token`` or ``gated_delta``, without knowing the memory that it will meet.

    ``A`` is the product of ``alpha_t (I - beta_t k_t k_t')``, ``B`` what an empty memory holds afterwards. The rows of
    a memory never mix, so one scan gives both: of values ``[v, 0]`` from a memory ``[0; I]``.

    Args:
        k: keys ``[B, T, H, Dk]`` and v: values ``[B, T, H, Dv]``; the rest as in :func:`senri.memory.scan`.

    Raises:
        ValueError: another rule.
    """
    if rule not in ("delta_token", "gated_delta"):
        raise ValueError(f"rule {rule!r} has no affine transition; delta_token and gated_delta have")
    batch_size, _, num_heads, key_dim = k.shape
    width, value_dim = feature_dim(feature_map or RULES[rule].feature_map, key_dim), v.shape[-1]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    start = MemoryState.zeros(batch_size, num_heads, value_dim + width, width, rule=rule, dtype=dtype, device=k.device)
    identity = torch.eye(width, dtype=dtype, device=k.device).expand(batch_size, num_heads, width, width)
    start = start._replace(M=torch.cat([start.M[:, :, :value_dim], identity], -2))
    values = torch.cat([v, v.new_zeros(*v.shape[:3], width)], -1)
    _, end = scan(
        k,
        k,
        values,
        start,
        rule=rule,
        beta=beta,
        log_alpha=log_alpha,
        mask=mask,
        feature_map=feature_map,
        chunk_size=chunk_size,
    )
    B, A = end.M.split([value_dim, width], dim=-2)
    return Transition(A, B, end.written)


def compose(first: Transition, second: Transition) -> Transition:
    """What two stretches do, one after the other."""
    return Transition(first.A @ second.A, first.B @ second.A + second.B, first.written + second.written)


def apply(state: MemoryState, step: Transition) -> MemoryState:
    """The memory after a stretch: as if it had been scanned from ``state``."""
    return state._replace(M=state.M @ step.A + step.B, written=state.written + step.written)
