"""FeedbackLM: a TransformerLM that is fed its own last hidden state, ``x_t = embed_t + W h_{t-1}``.

It is a recurrence through all layers, so its exact form goes token by token. A pass of :meth:`FeedbackLM.run_lagged`
handles all tokens at once instead: each is fed the state that an earlier pass left at the token before it. Position t
depends on the states before it only, so the n-th of such passes is exact in its first n positions, whatever it began
with: after T passes, all of T tokens are. Where a change of what is fed back dies out on its way, far fewer will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from senri.lm.base import Layer, ModelState
from senri.lm.model import INITIALIZER_RANGE, Output, TransformerLM


class Refined(NamedTuple):
    """What passes without gradient gave."""

    cache: Tensor  # [B, T, hidden], of the last pass
    changes: Tensor  # [passes, B]: how far each pass moved each row's states, see relative_gap


class FeedbackLM(TransformerLM):
    """Layers of any mix, fed the sum of a token's embedding and ``W h_{t-1}``; ``h`` is the final hidden state (behind
    the final norm), ``h_{-1}`` a learned start.

    As a :class:`TransformerLM` it runs sequentially: in ``forward``, ``read``, ``generate`` and sessions a token costs
    one step of the layers, whatever came before it (softmax attention still looks at its own keys and values).

    Args:
        feedback_scale: size of ``W h`` beside an embedding when training begins (ratio of root mean squares). Below
            ``1 / sqrt(3)`` a change of what is fed back dies out on its way through the residual stream of a fresh
            model (docs/lagged-cache.md). 0: a plain transformer that can learn to feed back.

    Other arguments and errors as of :class:`TransformerLM`.

    Raises:
        ValueError: a negative scale.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        vocab_size: int = 50304,
        layer_norm_eps: float = 1e-5,
        *,
        feedback_scale: float = 0.3,
    ) -> None:
        if not feedback_scale >= 0:
            raise ValueError(f"feedback_scale must be >= 0, not {feedback_scale}")
        self.feedback_scale = feedback_scale
        super().__init__(layers, vocab_size, layer_norm_eps)
        self.feedback = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.start = nn.Parameter(torch.zeros(self.hidden_size))
        self._reset_feedback()

    def reset_parameters(self) -> None:
        """As TransformerLM, and the feedback by its scale."""
        super().reset_parameters()
        if "feedback" in self._modules:  # not yet while the base is made
            self._reset_feedback()

    def _reset_feedback(self) -> None:
        # the entries of h have variance 1, those of an embedding INITIALIZER_RANGE ** 2
        nn.init.normal_(self.feedback.weight, std=self.feedback_scale * INITIALIZER_RANGE / self.hidden_size**0.5)
        nn.init.zeros_(self.start)

    @property
    def numbers(self) -> dict[str, Any]:
        """What the model was built from."""
        return {**super().numbers, "feedback_scale": self.feedback_scale}

    # sequential --------------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int = 1) -> ModelState:
        """The state before any text: the first token is fed the learned start."""
        return super().init_state(batch_size)._replace(fed_back=self.start.expand(batch_size, -1))

    def run_tokens(self, input_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Token by token, the ground truth."""
        fed = self._fed_back(state, len(input_ids))
        embedded = self.embed_in(input_ids)
        hidden = [embedded[:, :0]]
        for x in embedded.split(1, 1):
            out, state = self.run_layers(x + self.feedback(fed)[:, None], state)
            fed = out[:, 0]
            hidden.append(out)
        return torch.cat(hidden, 1), state._replace(fed_back=fed)

    @torch.no_grad()
    def sequential_states(self, input_ids: Tensor, segment_length: int) -> Tensor:
        """The true states ``[B, T, hidden]`` of a text from its start; softmax attention sees segments."""
        state, parts = self.init_state(len(input_ids)), []
        for part in input_ids.split(segment_length, 1):
            hidden, state = self.run_tokens(part, state.next_segment())
            parts.append(hidden)
        return torch.cat(parts, 1)

    # in parallel -------------------------------------------------------------------------------------------------

    def forward_with_cache(
        self,
        input_ids: Tensor,
        prev_cache: Tensor | None,
        state: ModelState | None = None,
        *,
        segment_length: int | None = None,
    ) -> tuple[Output, Tensor]:
        """Logits and the new states ``[B, T, hidden]`` of one pass over all tokens; see :meth:`run_lagged`.

        Whoever stores the new states detaches them: they are in the graph.
        """
        hidden, after = self.run_lagged(input_ids, prev_cache, state, segment_length=segment_length)
        return Output(self.lm_head(hidden), after), hidden

    def run_lagged(
        self,
        input_ids: Tensor,
        prev_cache: Tensor | None,
        state: ModelState | None = None,
        *,
        segment_length: int | None = None,
    ) -> tuple[Tensor, ModelState]:
        """One pass: token ``t`` is fed ``prev_cache[:, t - 1]``, the first one what ``state`` says.

        Args:
            input_ids: ``[B, T]``, T >= 1.
            prev_cache: ``[B, T, hidden]``, the states of an earlier pass over the same tokens. No gradient goes into
                it. None: the learned start, at every position.
            state: what came before. The one that is returned feeds the next token from ``prev_cache``, too, so that a
                pass in pieces is the same pass.
            segment_length: tokens that softmax attention sees at once; None: all.

        Returns:
            Final hidden states ``[B, T, hidden]``, and the state behind the last token.

        Raises:
            ValueError: no tokens, or a cache of another shape.
        """
        if input_ids.dim() != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids must be [batch, tokens], a token or more, not {list(input_ids.shape)}")
        if segment_length is not None and segment_length < 1:
            raise ValueError(f"segment_length must be >= 1, not {segment_length}")
        state = state or self.init_state(len(input_ids))
        first = self._fed_back(state, len(input_ids))[:, None]
        shape = [*input_ids.shape, self.hidden_size]
        if prev_cache is None:
            cache = self.start.expand(shape)
        elif list(prev_cache.shape) == shape:
            cache = prev_cache.detach()
        else:
            raise ValueError(
                f"prev_cache is {list(prev_cache.shape)}, these tokens need {shape}: the states of another batch?"
            )
        embedded = self.embed_in(input_ids) + self.feedback(torch.cat([first, cache[:, :-1]], 1))
        hidden = []
        for i, x in enumerate(embedded.split(segment_length or len(input_ids[0]), 1)):
            out, state = self.run_layers(x, state.next_segment() if i else state)
            hidden.append(out)
        return torch.cat(hidden, 1), state._replace(fed_back=cache[:, -1])

    @torch.no_grad()
    def refine(
        self,
        input_ids: Tensor,
        prev_cache: Tensor | None,
        passes: int | None = None,
        state: ModelState | None = None,
        *,
        tolerance: float = 0.0,
        segment_length: int | None = None,
    ) -> Refined:
        """Passes without gradient, each fed the states of the one before: towards the sequential states.

        Args:
            passes: at most; None: T, after which the states are exact.
            tolerance: stop after a pass that moved no row by more than this (relative; see :func:`relative_gap`).

        Other arguments as of :meth:`run_lagged`.

        Raises:
            ValueError: as :meth:`run_lagged`; or no states to give back: neither a cache nor a pass.
        """
        passes = input_ids.shape[-1] if passes is None else passes
        if passes < 0 or (passes == 0 and prev_cache is None):
            raise ValueError(f"passes must be >= {int(prev_cache is None)} here, not {passes}")
        cache, changes = prev_cache, []
        for _ in range(passes):
            hidden, _ = self.run_lagged(input_ids, cache, state, segment_length=segment_length)
            before = self.start.expand_as(hidden) if cache is None else cache
            cache = hidden
            changes.append(relative_gap(before, hidden))
            if tolerance and changes[-1].max() <= tolerance:
                break
        assert cache is not None
        return Refined(cache, torch.stack(changes) if changes else cache.new_zeros(0, len(input_ids)))

    def _fed_back(self, state: ModelState, rows: int) -> Tensor:
        if state.fed_back is None:
            raise ValueError("this state is of a model without feedback: begin with init_state()")
        if len(state.fed_back) != rows:
            raise ValueError(f"the state has {len(state.fed_back)} row(s), the input {rows}")
        return state.fed_back


def relative_gap(states: Tensor, reference: Tensor) -> Tensor:
    """``|states - reference| / |reference|`` of each row, over all its positions: ``[B]``."""
    difference = (states - reference).flatten(1)
    return difference.norm(dim=1) / reference.flatten(1).norm(dim=1)
