"""TransformerLM: token embedding, layers of any mix, final LayerNorm, LM head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from senri.lm.base import Layer, ModelState
from senri.memory.state import MemoryState, named_tensors

INITIALIZER_RANGE = 0.02  # GPT-NeoX


class Output(NamedTuple):
    """What a forward call gives."""

    logits: Tensor  # [B, T, vocabulary]
    state: ModelState  # after the call; with update_memory=False that before it


class TransformerLM(nn.Module):
    """A causal language model. The weights of a stack of PythiaLayer are named as in transformers' GPTNeoX.

    State is an argument and a result: ``forward(ids, state)`` goes on exactly where ``state`` ends. Without one, a call
    begins a text: nothing is remembered. On top of that a caller may open a session, ``reset_memory()``: from then on
    each call in ``eval()`` is a segment of one text. Softmax attention sees the segment, as it was trained; the
    memories go on from call to call. In ``train()`` the session is left alone.

    Args:
        layers: at least one, all of one width.
        vocab_size: tokens.

    Raises:
        ValueError: no layers, something else than a layer, or different widths.
    """

    session: ModelState | None

    def __init__(self, layers: Sequence[Layer], vocab_size: int = 50304, layer_norm_eps: float = 1e-5) -> None:
        super().__init__()
        if not layers or not all(isinstance(layer, Layer) for layer in layers):
            raise ValueError("layers must be a list of one PythiaLayer, InfiniLayer, ... or more")
        widths = sorted({layer.hidden_size for layer in layers})
        if len(widths) > 1:
            raise ValueError(f"all layers must have one hidden_size, not {', '.join(map(str, widths))}")
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("a layer stands in the list twice: make one for each place")
        self.hidden_size, self.vocab_size = widths[0], vocab_size
        self.embed_in = nn.Embedding(vocab_size, self.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(self.hidden_size, eps=layer_norm_eps)
        self.lm_head = nn.Linear(self.hidden_size, vocab_size, bias=False)
        self.session = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices from a normal distribution, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def numbers(self) -> dict[str, Any]:
        """What the model was built from."""
        return {"vocab_size": self.vocab_size, "layers": [layer.numbers for layer in self._layers()]}

    @property
    def has_memory(self) -> bool:
        """Whether any layer has one."""
        return any(isinstance(layer, MemoryState) for layer in self.init_state().layers)

    # forward ---------------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int = 1) -> ModelState:
        """The state before any text."""
        weight = self.embed_in.weight
        return ModelState(tuple(x.init_state(batch_size, weight.dtype, weight.device) for x in self._layers()))

    def forward(self, input_ids: Tensor, state: ModelState | None = None, *, update_memory: bool = True) -> Output:
        """Logits of the tokens after ``input_ids`` ``[B, T]``.

        Args:
            state: goes on from it, within its segment. None: from the session if one is open and the model is in
                ``eval()``, else from nothing.
            update_memory: False leaves the session (or returns the state given) as it was before the call; the logits
                are the same.

        Raises:
            ValueError: ids of another shape, or another number of rows than the state has.
        """
        hidden, after, before = self._run(input_ids, state, update_memory)
        return Output(self.lm_head(hidden), after if update_memory else before)

    def read(
        self, input_ids: Tensor, state: ModelState | None = None, *, update_memory: bool = True
    ) -> tuple[Tensor, ModelState]:
        """As :meth:`forward` without logits: final hidden states ``[B, T, hidden]``, to be given to ``lm_head``."""
        hidden, after, before = self._run(input_ids, state, update_memory)
        return hidden, after if update_memory else before

    def run_tokens(self, input_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Final hidden states of ``[B, T]`` tokens, and the state behind them; a session is not looked at."""
        return self.run_layers(self.embed_in(input_ids), state)

    def run_layers(self, embedded: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """All layers and the final norm on ``[B, T, hidden]``; for models that feed something else than tokens."""
        states = []
        for layer, before in zip(self._layers(), state.layers, strict=True):
            embedded, after = layer(embedded, before)
            states.append(after)
        return self.final_layer_norm(embedded), ModelState(tuple(states))

    def _run(
        self, input_ids: Tensor, state: ModelState | None, update_memory: bool
    ) -> tuple[Tensor, ModelState, ModelState]:
        """Hidden states, the state after the call and that before."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, tokens], not {list(input_ids.shape)}")
        in_session = state is None and self.session is not None and not self.training
        before = state or (self.session if in_session and self.session else self.init_state(len(input_ids)))
        hidden, after = self.run_tokens(input_ids, before)
        if in_session and update_memory:
            self.session = after.next_segment().detach()
        return hidden, after, before

    # session ---------------------------------------------------------------------------------------------------

    def reset_memory(self, batch_size: int = 1) -> None:
        """Start a session with empty memories (and end the one before)."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.session = self.init_state(batch_size)

    def end_session(self) -> None:
        """Forget the session; later calls begin with nothing."""
        self.session = None

    def get_memory_state(self) -> ModelState:
        """The session's memories. Later calls replace them and leave what was given out as it is.

        Raises:
            RuntimeError: no session is open.
        """
        if self.session is None:
            raise RuntimeError("no memory to give: call reset_memory() and let the model read something first")
        return self.session

    def set_memory_state(self, state: ModelState) -> None:
        """Go on from the memories of ``state``, opening a session.

        Raises:
            ValueError: they are not of this model's layers.
        """
        state = state.next_segment().detach()
        rows = next((len(layer.written) for layer in state.layers if isinstance(layer, MemoryState)), 1)
        empty = self.init_state(rows)
        if _shapes(state) != _shapes(empty):
            raise ValueError(f"this memory state is of another model: {_differing(_shapes(state), _shapes(empty))}")
        self.session = state.to(self.embed_in.weight.device)

    # generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        state: ModelState | None = None,
        *,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """``input_ids`` ``[B, T]`` and what follows, ``[B, T + new]``, a token a step.

        The whole text, the last token included, is written to an open session.

        Args:
            state: as of :meth:`forward`.
            temperature: 0: always the most probable token; else what is drawn becomes the more varied the higher.
            eos_token_id: a row is filled with it once it came, and the text ends when all rows have.

        Raises:
            ValueError: nothing to go on from, or the model is in ``train()``.
        """
        if self.training:
            raise ValueError("generation is for a model in eval(): call model.eval() first")
        if not input_ids.shape[1]:
            raise ValueError("generation needs a token at least to go on from")
        in_session = state is None and self.session is not None
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        state, text = state or self.session, input_ids
        new = input_ids
        for _ in range(max_new_tokens):
            hidden, state = self.read(new, state or self.init_state(len(input_ids)))
            new = _choose(self.lm_head(hidden[:, -1]), temperature)
            if eos_token_id is not None:
                new = new.masked_fill(ended[:, None], eos_token_id)
                ended |= new[:, 0] == eos_token_id
            text = torch.cat([text, new], 1)
            if ended.all():
                break
        if in_session:
            _, state = self.read(new, state)
            self.session = state.next_segment()
        return text

    def _layers(self) -> Iterator[Layer]:
        yield from self.layers  # type: ignore[misc]


def _choose(logits: Tensor, temperature: float) -> Tensor:
    """The next token of ``[B, vocabulary]``: ``[B, 1]``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)


def _shapes(state: ModelState) -> dict[str, str]:
    return {name: f"{list(t.shape)} {t.dtype}".replace("torch.", "") for name, t in named_tensors(state).items()}


def _differing(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """The first difference in words."""
    name = next(n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n))
    return f"its {name} is {theirs.get(name, 'missing')}, here {ours.get(name, 'missing')}"
