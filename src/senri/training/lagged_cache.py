"""Lagged Cache Training: a FeedbackLM trained in parallel over the tokens, fed the states of the epoch before.

A step on a batch (docs/lagged-cache.md):

1. Take the states that the last epoch left for these samples; in the first epoch, those of one pass without gradient.
2. Refine them: ``passes - 1`` passes without gradient and without a change of weights, or fewer once a pass moves no
   sample by more than ``tolerance``.
3. One pass with gradient gives the loss and the new states, which are kept, detached.
4. The optimiser's step.

So the gradient is that of one step: each position learns how to use the state it was fed and how to attend to all
positions before it, and not how an earlier position should have made that state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from senri.data.packing import PackedTexts
from senri.identity import Identity
from senri.lm import FeedbackLM, relative_gap
from senri.training import checkpoint
from senri.training.lm import LMSettings, LMTrainer
from senri.training.log import Entry, read_log
from senri.training.state_cache import StateCache

_NOISE = 1e-3  # of a gap: below, rounding decides whether a pass makes it smaller


@dataclass(frozen=True)
class LCTSettings:
    """Names and meanings as in config/experiment.yaml, ``lagged_cache``."""

    passes: int
    tolerance: float
    gap_samples: int
    gap_warning: float
    cache_in_memory_gb: float


class LCTTrainer(LMTrainer):
    """One run of Lagged Cache Training in one folder; makes it or goes on with it, bit for bit.

    Its log has, each step, ``change``: how far the pass with gradient moved the states it was fed (relative, mean of
    the samples), ``lag``: how far the first pass moved those of the epoch before, ``passes``, and ``filled``: samples
    that had no states yet. The last step of an epoch has the figures of :meth:`probe`, too, and ``broken``: the states
    no longer follow the weights, for the gap is above ``gap_warning`` and grows, or a pass does not make it smaller.
    Then ``say`` gets a line that begins with WARNING.

    Arguments, errors as of :class:`~senri.training.lm.LMTrainer`.
    """

    model: FeedbackLM

    def __init__(
        self,
        model: FeedbackLM,
        data: PackedTexts,
        settings: LMSettings,
        lagged: LCTSettings,
        folder: Path,
        identity: Identity,
        *,
        show: Callable[[Entry], None] = lambda entry: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(model, data, settings, folder, identity, show=show, say=say)
        self.lagged = lagged
        self._seen: Entry = {}
        self._gap: float | None = None  # at the end of the epoch before

    # a step ----------------------------------------------------------------------------------------------------

    def loss(self, ids: Tensor, indices: Sequence[int]) -> Tensor:
        """Mean nats a token of samples ``ids`` ``[B, length + 1]``, one lagged pass; their states are kept."""
        tokens, size = ids[:, :-1], self.settings.segment_length
        epoch = self.step // self.steps_per_epoch
        states, there = self.cache.get(indices, epoch)
        states, there = states.to(ids.device), there.to(ids.device)
        if not there.all():
            filled = self.model.refine(tokens, None, 1, segment_length=size).cache
            states = torch.where(there[:, None, None], states, filled.to(states.dtype))
        settings = self.lagged
        fed, changes = self.model.refine(
            tokens, states, settings.passes - 1, tolerance=settings.tolerance, segment_length=size
        )
        out, hidden = self.model.forward_with_cache(tokens, fed, segment_length=size)
        self.cache.put(indices, epoch, hidden)
        last = relative_gap(fed, hidden.detach())
        lag = changes[0] if len(changes) else last
        self._seen = {
            "change": last.mean().item(),
            "lag": lag.mean().item(),
            "passes": len(changes) + 1,
            "filled": int((~there).sum()),
        }
        return _mean_nats(out.logits, ids[:, 1:])

    def _one_step(self) -> Entry:
        entry = super()._one_step() | self._seen
        if self.step % self.steps_per_epoch == 0:
            started = time.perf_counter()
            entry |= self.probe() | {"probe_seconds": time.perf_counter() - started}
            self._judge(entry)
        return entry

    # what tells whether it works -------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self) -> Entry:
        """The states that the next epoch would be fed, against the true ones of the weights as they are now.

        Of the first ``gap_samples`` samples, in the order of the data:

        - ``gap``: relative distance of the kept states from the sequential ones;
        - ``gap_after_pass``: the same after one more pass, and ``contraction``, the second over the first: below 1,
          passes lead to the sequential states;
        - ``lagged_loss`` of a pass that is fed the kept states, ``sequential_loss`` of the model as it will be used.
        """
        rows = range(min(self.lagged.gap_samples, len(self.data)))
        size = self.settings.segment_length
        ids = torch.stack([torch.from_numpy(self.data[i]).long() for i in rows]).to(self.device)
        kept, _ = self.cache.get(rows, self.step // self.steps_per_epoch)
        kept = kept.to(self.device)
        out, hidden = self.model.forward_with_cache(ids[:, :-1], kept, segment_length=size)
        true = self.model.sequential_states(ids[:, :-1], size)
        targets = ids[:, 1:]
        gap, after = relative_gap(kept, true).mean().item(), relative_gap(hidden, true).mean().item()
        return {
            "gap": gap,
            "gap_after_pass": after,
            "contraction": after / gap if gap else 0.0,
            "lagged_loss": _mean_nats(out.logits, targets).item(),
            "sequential_loss": _mean_nats(self.model.lm_head(true), targets).item(),
        }

    def _judge(self, entry: Entry) -> None:
        """Notes in ``entry`` whether the states still follow the weights, and warns if not."""
        gap, before = entry["gap"], self._gap
        grows = before is not None and gap > max(before, self.lagged.gap_warning)
        astray = gap > _NOISE and entry["contraction"] >= 1
        self._gap, entry["broken"] = gap, grows or astray
        if entry["broken"]:
            was = "" if before is None else f" ({before:.2f} an epoch before)"
            self.say(
                f"WARNING: step {self.step:,}: the states of an epoch before no longer follow the weights: they are "
                f"{gap:.2f} of their length from the true ones{was}, a pass leaves {entry['contraction']:.2f} of that; "
                f"loss {entry['sequential_loss']:.3f} as the model will be used, {entry['lagged_loss']:.3f} as it is "
                "trained: lower the learning rate, or raise passes"
            )

    # folder ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        super()._start()
        length, weight = self.settings.length, self.model.embed_in.weight
        in_memory = len(self.data) * length * weight.shape[1] * weight.element_size()
        mapped = in_memory > self.lagged.cache_in_memory_gb * 1e9
        self.cache = StateCache(len(self.data), length, weight.shape[1], weight.dtype, self.folder if mapped else None)
        if self.step:
            self.cache.load(checkpoint.checkpoints(self.folder)[-1])
            gaps = [entry["gap"] for entry in read_log(self.folder) if "gap" in entry and entry["step"] <= self.step]
            self._gap = gaps[-1] if gaps else None

    def _save_is_due(self) -> bool:
        return super()._save_is_due() or self.step % self.steps_per_epoch == 0  # see StateCache

    def _save(self) -> None:
        checkpoint.save(
            self.folder, self.step, self.parameters, self.optimizer, self.scheduler, main=True, more=self.cache.save
        )


def _mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Of ``[B, T, vocabulary]`` and ``[B, T]``, in float32 at least."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(precision), targets.flatten())
