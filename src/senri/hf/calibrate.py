"""Calibration: set the memory's projections from real text, without one gradient step.

The inputs of a memory layer share a large common component, so raw keys hardly tell tokens apart. Centring and
whitening them on some text makes keys near-orthogonal, which is what an associative memory needs (docs/calibration.md
has the measurements).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.data import iter_pieces, iter_tokens
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers import MemoryAttention

RIDGE = 1e-3  # of the mean variance, added to every direction: keeps unseen directions from being blown up
REPEAT_BEYOND = 1024  # tokens beyond the window that the passage read twice has
BLOCK = 8192  # rows whose statistics are taken at once
HEIGHT = 20.0  # nats that a perfect recall adds to its token's logit where the read gate's scale is 1
BOOSTS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # read gates tried, in such nats
CHANCES = (0.0, 1.0)  # of the read gate


class CalibrationReport(NamedTuple):
    """What calibration set and what it saw."""

    tokens: int  # used for the statistics
    read_gate: dict[int, float]  # memory layer -> chosen gate (head read-out only)
    loss_without: float  # nats a token on text that comes twice, memory silent
    loss_with: float  # the same under the chosen gates


@torch.no_grad()
def calibrate(
    model: SenriForCausalLM,
    texts: str | list[int] | Tensor | Iterable[str],
    tokenizer: Any = None,
    *,
    num_tokens: int = 16384,
    repeat_tokens: int | None = None,
) -> CalibrationReport:
    """Set the memory layers' projections from ``texts``.

    Keys and queries: one whitening map for both (so that equal states match), from the mean and covariance of the
    layer's inputs. Values of the ``head`` read-out: see :func:`set_values`. Its read gate: the one of a few that
    predicts best on text of which half is new and half is repeated from beyond the window. The ``layer`` read-out
    keeps its zero-init output: it needs training to speak.

    Args:
        texts: real text (with ``tokenizer``) or token ids; not the text that will be read.
        num_tokens: for the statistics.
        repeat_tokens: length of the passage that is read twice to choose the read gate; by default
            1024 beyond the window: a memory that is fuller than it can hold, as it is while a book is read.

    Raises:
        ValueError: too little text, or memory heads wider than the hidden size.
    """
    if not model.config.num_memory_layers:
        raise ValueError("num_memory_layers is 0: there is no memory to calibrate")
    if repeat_tokens is None:
        repeat_tokens = model.config.sliding_window_size + REPEAT_BEYOND
    ids = _token_ids(texts, tokenizer, num_tokens + repeat_tokens)
    hidden_size = model.config.hidden_size
    if ids.numel() < 4 * hidden_size:
        raise ValueError(f"calibration needs at least {4 * hidden_size} tokens of text, not {ids.numel()}")
    passage = min(repeat_tokens, ids.numel() // 4)
    statistics, repeated = ids[:-passage], ids[-passage:]
    training = model.training
    model.eval()
    try:
        return _calibrate(model, statistics, repeated)
    finally:
        model.train(training)


def _calibrate(model: SenriForCausalLM, statistics: Tensor, repeated: Tensor) -> CalibrationReport:
    inputs = _layer_inputs(model, statistics)
    memories = model.model.memories
    for index, hidden in inputs.items():
        if memories[index].writes:
            set_addresses(memories[index], hidden)
            writer = index
        else:
            _match(memories[index], hidden, memories[writer], inputs[writer])
    if model.config.memory_readout == "head":
        set_values(model)
    gates: dict[int, float] = {}
    loss_without, loss_with = float("nan"), float("nan")
    if model.config.memory_readout == "head":
        gates, loss_without, loss_with = _choose_read_gates(model, repeated)
    return CalibrationReport(statistics.numel(), gates, loss_without, loss_with)


@torch.no_grad()
def set_addresses(memory: MemoryAttention, hidden: Tensor) -> None:
    """q_proj = k_proj = the whitening map of the layer's inputs ``hidden`` ``[tokens, hidden]``.

    Raises:
        ValueError: memory heads together wider than the hidden size.
    """
    weight, mean = _whitening(hidden, memory)
    for linear, rows in ((memory.k_proj, weight), (memory.q_proj, memory.for_query_heads(weight))):
        linear.weight.copy_(rows)
        linear.bias.copy_(-rows @ mean)


@torch.no_grad()
def set_values(model: SenriForCausalLM) -> None:
    """v_proj = the whitening map of all token embeddings, o_proj = its transpose: the way of a token through the
    memories of the ``head`` read-out and back.

    Embeddings are far from round: read as they are, a few that stand apart from all others gain from whatever is
    recalled. Whitened, ``E_t C^-1 (E_s - mean)`` is large for ``t = s`` alone; memory heads that together are narrower
    than the embeddings keep the directions of most variance.

    Raises:
        ValueError: memory heads together wider than the hidden size.
    """
    embeddings, memories = model.model.embed_tokens.weight, list(model.model.memories.values())
    writer = memories[0]  # all have its shape
    weight, mean = _whitening(embeddings, writer)
    length = 0.0  # of what a perfect recall is made of, on average
    for rows in embeddings.split(BLOCK):
        values = ((rows.double() - mean) @ weight.mT).unflatten(-1, (writer.num_key_value_heads, -1))
        # a value has length 1 as a whole; the gate of other rules than slot makes it 1 in each head
        lengths = values.flatten(1).norm(dim=-1) if writer.rule == "slot" else values.norm(dim=-1).sum(-1)
        length += lengths.sum().item() / len(embeddings)
    groups = writer.num_heads // writer.num_key_value_heads
    for memory in memories:
        if memory.writes:
            memory.v_proj.weight.copy_(weight)
            memory.v_proj.bias.copy_(-weight @ mean)
        memory.o_proj.weight.copy_(memory.for_query_heads(weight).mT * (HEIGHT / length / groups))


def _token_ids(texts: Any, tokenizer: Any, limit: int) -> Tensor:
    if isinstance(texts, Tensor):
        return texts.flatten()[:limit]
    if isinstance(texts, list) and texts and isinstance(texts[0], int):
        return torch.tensor(texts[:limit])
    if tokenizer is None:
        raise ValueError("calibrating on text needs its tokenizer: calibrate(model, texts, tokenizer)")
    blocks = [texts] if isinstance(texts, str) else texts
    return torch.tensor(next(iter_pieces(iter_tokens(blocks, tokenizer), limit), []))


def _layer_inputs(model: SenriForCausalLM, ids: Tensor) -> dict[int, Tensor]:
    """Normalised inputs ``[tokens, hidden]`` of every memory layer while ``ids`` is read."""
    seen: dict[int, list[Tensor]] = {index: [] for index in model.config.memory_layers}
    hooks = [
        cast(nn.Module, model.model.layers[index].input_layernorm).register_forward_hook(
            lambda _module, _args, output, index=index: seen[index].append(output[0].double())
        )
        for index in seen
    ]
    try:
        model.model(ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts) for index, parts in seen.items()}


def _whitening(x: Tensor, memory: MemoryAttention) -> tuple[Tensor, Tensor]:
    """Of the rows of ``x`` ``[N, hidden]`` the map to the memory's keys or values ``[H * D, hidden]``, and the mean;
    float64.
    """
    width = memory.num_key_value_heads * memory.head_dim
    if width > x.shape[1]:
        raise ValueError(f"memory heads of {width} together are wider than the hidden size {x.shape[1]}")
    mean = x.mean(0, dtype=torch.float64)
    parts = (rows.double() - mean for rows in x.split(BLOCK))  # a vocabulary in float64 would be a gigabyte
    variance, directions = torch.linalg.eigh(sum(rows.mT @ rows for rows in parts) / len(x))
    variance, directions = variance.flip(0), directions.flip(1)  # largest first
    scale = (variance + RIDGE * variance.mean()).rsqrt()
    rows = (directions * scale).mT[:width]
    # every head gets directions of all sizes, not one head the largest ones
    rows = rows.unflatten(0, (memory.head_dim, memory.num_key_value_heads)).transpose(0, 1)  # [H, D, hidden]
    return rows.flatten(0, 1), mean


def _match(memory: MemoryAttention, hidden: Tensor, writer: MemoryAttention, written: Tensor) -> None:
    """q_proj of a layer that reads another one's memory: the ridge regression, from the layer's inputs ``[tokens,
    hidden]``, of what the queries of the layer that writes are made of, from its own inputs ``written``.
    """
    mean = hidden.mean(0)
    centred = hidden - mean
    wanted = written @ writer.q_proj.weight.double().T + writer.q_proj.bias.double()
    covariance = centred.mT @ centred / len(hidden)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, centred.mT @ (wanted - wanted.mean(0)) / len(hidden)).T
    memory.q_proj.weight.copy_(weight)
    memory.q_proj.bias.copy_(wanted.mean(0) - weight @ mean)


def _choose_read_gates(model: SenriForCausalLM, ids: Tensor) -> tuple[dict[int, float], float, float]:
    """Read ``ids`` twice in a row and take, layer by layer, the gate with the least loss over both readings.

    Tried are loudness, and whether a read counts from stray ones: where every token is written all reads are long.
    """
    twice = torch.cat([ids, ids]).to(model.device)
    target = twice[1:]
    memories = model.model.memories
    for memory in memories.values():
        memory.read_gate.reset_parameters()
    trunk = model.model(twice[None], use_cache=False).last_hidden_state[0, :-1]
    for memory in memories.values():
        memory.read_gate.scale.fill_(1.0)
    chances = (None,) if model.config.update_rule == "slot" else CHANCES  # a slot's read has no strays to count from
    reads = {chance: _reads_of(model, twice, chance) for chance in chances}
    chosen: dict[int, float] = {}
    loss_without = best = _loss(model, trunk, target)
    for index, memory in memories.items():
        chosen[index], said = 0.0, torch.zeros_like(trunk)
        for chance in chances:
            for boost in BOOSTS:
                gate = boost / HEIGHT
                loss = _loss(model, trunk + gate * reads[chance][index], target)
                if loss < best:
                    best, chosen[index], said = loss, gate, gate * reads[chance][index]
                    _set_chance(memory, chance)
        trunk = trunk + said
        memory.read_gate.scale.fill_(chosen[index])
    return chosen, loss_without, best


def _set_chance(memory: MemoryAttention, chance: float | None) -> None:
    if chance is not None:
        cast(Tensor, memory.read_gate.chance).fill_(chance)


def _reads_of(model: SenriForCausalLM, ids: Tensor, chance: float | None) -> dict[int, Tensor]:
    """What each memory adds ``[tokens - 1, hidden]`` while ``ids`` is read."""
    memories = model.model.memories
    reads: dict[int, list[Tensor]] = {}
    for memory in memories.values():
        _set_chance(memory, chance)
    hooks = [
        memory.register_forward_hook(
            lambda _module, _args, output, index=index: reads.setdefault(index, []).append(output[0][0])
        )
        for index, memory in memories.items()
    ]
    try:
        model.model(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts)[:-1] for index, parts in reads.items()}


def _loss(model: SenriForCausalLM, hidden: Tensor, target: Tensor, block: int = 512) -> float:
    """Mean negative log likelihood of ``target``, in blocks of tokens."""
    total = 0.0
    for h, t in zip(hidden.split(block), target.split(block), strict=True):
        total += float(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum"))
    return total / len(target)
