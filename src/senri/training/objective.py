"""What a piece of text costs: its tokens, the write gate's decisions, the distance to the full-attention base.

Shapes: ``B`` samples, ``T`` tokens of a piece, ``N`` scored tokens, ``V`` vocabulary, ``H`` memory heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from senri.hf.modeling_senri import SenriForCausalLM

BLOCK = 1024  # scored tokens whose logits exist at once


def token_losses(
    model: Any, hidden: Tensor, target: Tensor, teacher: Any = None, teacher_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each token, and KL(teacher || model) (0 without a teacher): ``[N]`` each, in nats.

    Args:
        model, teacher: with an ``lm_head``.
        hidden: the last hidden state before each token ``[N, hidden]``; ``teacher_hidden`` likewise.
        target: ``[N]`` ids.
    """
    nll, kl = [], []
    for start in range(0, len(target), BLOCK):
        part = slice(start, start + BLOCK)
        theirs = None if teacher_hidden is None else teacher_hidden[part]
        # logits are made again in the backward pass rather than kept: [N, V] of all pieces would not fit
        losses = checkpoint(_block, model, hidden[part], target[part], teacher, theirs, use_reentrant=False)
        nll.append(losses[0])
        kl.append(losses[1])
    return torch.cat(nll), torch.cat(kl)


def _block(
    model: Any, hidden: Tensor, target: Tensor, teacher: Any, teacher_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_p = _log_probabilities(model, hidden)
    nll = -log_p.gather(-1, target[:, None])[:, 0]
    if teacher_hidden is None:
        return nll, torch.zeros_like(nll)
    with torch.no_grad():
        log_t = _log_probabilities(teacher, teacher_hidden)
    return nll, (log_t.exp() * (log_t - log_p)).sum(-1)


def _log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def write_gate_loss(logits: list[Tensor], write: Tensor) -> Tensor:
    """Binary cross entropy of the write gates against labels, summed over tokens: ``[B]``.

    Args:
        logits: of each memory layer, ``[B, T, H]``.
        write: ``[B, T]``: 1 write, 0 do not, -1 not labelled.
    """
    labelled = write >= 0
    loss = write.new_zeros(len(write), dtype=logits[0].dtype)
    for layer in logits:
        target = write[..., None].clamp(min=0).to(layer.dtype).expand_as(layer)
        bce = F.binary_cross_entropy_with_logits(layer, target, reduction="none").mean(-1)
        loss = loss + torch.where(labelled, bce, 0).sum(1) / len(logits)
    return loss


class GateRecorder:
    """What the gates of all memory layers said, taken by hooks while a piece is read.

    Use as a context manager around the training of a batch, and :meth:`piece` around each forward call.
    """

    def __init__(self, model: SenriForCausalLM) -> None:
        self.memories = list(model.model.memories.values())
        # by layer: of the tokens that left the window, [B, T, H]
        self.logits: dict[int, list[Tensor]] = {}
        self.writes: dict[int, list[Tensor]] = {}
        # by layer: of the tokens that came in, [B, T, H, 1]
        self.reads: dict[int, list[Tensor]] = {}
        self._on = False
        self._hooks: list[RemovableHandle] = []

    @property
    def has_write_gate(self) -> bool:
        """Whether there is a write gate at all."""
        return any(memory.selective for memory in self.memories)

    def __enter__(self) -> GateRecorder:
        for i, memory in enumerate(self.memories):
            if memory.selective:
                self._hooks.append(memory.write_gate.register_forward_hook(self._write_hook(i)))
            if memory.readout == "head":
                self._hooks.append(memory.read_gate.register_forward_hook(self._read_hook(i)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Record from here on, and nothing of what was before."""
        for taken in (self.logits, self.writes, self.reads):
            taken.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def write_logits(self) -> list[Tensor]:
        """Of each memory layer ``[B, T, H]``; T are the tokens that left the window."""
        return [torch.cat(parts, 1) for parts in self.logits.values()]

    def write_gates(self) -> Tensor | None:
        """Mean over layers and heads ``[B, T]`` of the write gates of tokens that left; None where there are none."""
        layers = [torch.cat(parts, 1).mean(-1) for parts in self.writes.values()]
        return torch.stack(layers).mean(0) if layers else None

    def read_gates(self) -> Tensor | None:
        """Mean over layers and heads ``[B, T]`` of the new tokens' read gates; None where there are none."""
        layers = [torch.cat(parts, 1).mean((-1, -2)) for parts in self.reads.values()]
        return torch.stack(layers).mean(0) if layers else None

    def _write_hook(self, layer: int) -> Any:
        def hook(gate: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if self._on:
                self.logits.setdefault(layer, []).append(output)
                self.writes.setdefault(layer, []).append(gate.strength(output.detach()))

        return hook

    def _read_hook(self, layer: int) -> Any:
        def hook(gate: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._on:
                self.reads.setdefault(layer, []).append(output.detach())

        return hook
