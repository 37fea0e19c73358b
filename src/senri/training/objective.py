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
from torch.autograd.function import once_differentiable
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
    frozen = not any(parameter.requires_grad for parameter in model.lm_head.parameters())
    for start in range(0, len(target), BLOCK):
        part = slice(start, start + BLOCK)
        theirs = None if teacher_hidden is None else teacher_hidden[part]
        block = (model, hidden[part], target[part], teacher, theirs)
        # [N, V] of all pieces would not fit: the backward pass makes logits again, or has what it needs of them
        losses = _FrozenHead.apply(*block) if frozen else checkpoint(_block, *block, use_reentrant=False)
        nll.append(losses[0])
        kl.append(losses[1])
    return torch.cat(nll), torch.cat(kl)


class _FrozenHead(torch.autograd.Function):
    """:func:`_block` for a head that is not trained; first derivatives only.

    A token's losses depend on no other token's hidden state, so their gradients by it, ``(p - onehot) W`` and
    ``(p - t) W``, are made while its logits exist, and only scaled in the backward pass.
    ``torch.nn.functional.linear_cross_entropy`` does so for a mean; for single losses it makes logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, model: Any, hidden: Tensor, target: Tensor, teacher: Any, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight = model.lm_head.weight
        nll, kl, log_p, log_t = _losses(model, hidden, target, teacher, teacher_hidden)
        by_kl = None
        if ctx.needs_input_grad[1]:
            p = log_p.exp_()
            if log_t is not None:
                by_kl = ((p - log_t.exp_()).to(weight.dtype) @ weight).to(hidden.dtype)
            p[torch.arange(len(target), device=target.device), target] -= 1
            ctx.save_for_backward((p.to(weight.dtype) @ weight).to(hidden.dtype), by_kl)
        return nll, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor, d_kl: Tensor) -> tuple[None, Tensor, None, None, None]:
        by_nll, by_kl = ctx.saved_tensors
        gradient = by_nll * d_nll[:, None]
        if by_kl is not None:
            gradient = gradient + by_kl * d_kl[:, None]
        return None, gradient.to(by_nll.dtype), None, None, None


def _block(*args: Any) -> tuple[Tensor, Tensor]:
    return _losses(*args)[:2]


def _losses(
    model: Any, hidden: Tensor, target: Tensor, teacher: Any, teacher_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of each token the two losses; and the log probabilities of model and teacher ``[N, V]``."""
    log_p = _log_probabilities(model, hidden)
    nll = -log_p.gather(-1, target[:, None])[:, 0]
    if teacher_hidden is None:
        return nll, torch.zeros_like(nll), log_p, None
    with torch.no_grad():
        log_t = _log_probabilities(teacher, teacher_hidden)
    return nll, (log_t.exp() * (log_t - log_p)).sum(-1), log_p, log_t


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
