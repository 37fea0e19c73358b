"""The memory of one layer: projections, gates and the associative memory behind the window.

Shapes: ``B`` batch, ``T`` new tokens, ``W`` window, ``K`` tokens that a key is made of (at least 1), ``H`` memory
heads, ``D`` head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.layers.append import append
from senri.layers.context_attention import ContextAttention
from senri.memory import Hierarchical, MemoryState, SlotParameters, Store, feature_dim, read, scan
from senri.memory.alibi import alibi_log_alpha, alibi_slopes
from senri.memory.rules import RULES

WRITE_GATE_WIDTH = 64  # hidden units
STRETCH = (-0.1, 1.1)  # of the write gate's sigmoid, before it is cut to [0, 1]
SHORTEST = 0.01  # a read shorter than this counts as that long
MATCH = 24.0  # how much a read of length 1 from an almost empty memory opens the read gate at first, as a logit
STRAY = 4  # queries that ask for nothing, beside each: itself with its features rolled round
NOTHING = 10.0  # the logit of finding nothing at first
CLOSED = -2.0  # the read gate's logit at first where nothing matches


def _full(x: Tensor) -> Tensor:
    """At least float32: gates and normalisation are not left to half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WriteGate(nn.Module):
    """How strongly each pair is written, in [0, 1] per memory: a two-layer perceptron of a token and the one after it.

    A pair is written W tokens after its token was read, so the next token, and the model's surprise, are known by then.
    The sigmoid is stretched beyond [0, 1] and cut, so that 0 (not written at all) and 1 are reached exactly: the hard
    concrete distribution without its noise (Louizos et al. 2018, arXiv:1712.01312, eq. 11).

    Args:
        hidden_size: width of the layer's input.
        num_memories: gates for each token.
        surprise: whether the token's surprise is an input.
    """

    def __init__(self, hidden_size: int, num_memories: int, *, surprise: bool) -> None:
        super().__init__()
        self.surprise = surprise
        self.in_proj = nn.Linear(2 * hidden_size + int(surprise), WRITE_GATE_WIDTH)
        self.out_proj = nn.Linear(WRITE_GATE_WIDTH, num_memories)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values: gates that can move, open to all tokens alike."""
        start = torch.empty(self.in_proj.weight.shape, device="cpu", dtype=torch.float32)
        nn.init.xavier_uniform_(start, generator=torch.Generator("cpu").manual_seed(0))
        self.in_proj.weight.copy_(start)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.constant_(self.out_proj.bias, 2.0)  # gate 0.96, slope 0.13

    def forward(self, hidden: Tensor, following: Tensor, surprise: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, memories]``, at least float32.

        Args:
            hidden: the layer's inputs ``[B, T, hidden]``; following: those of the token after each.
            surprise: ``[B, T]`` nats.
        """
        parts = [hidden, following]
        if self.surprise:
            assert surprise is not None
            parts.append(surprise[..., None].to(hidden.dtype))
        return _full(self.out_proj(F.gelu(self.in_proj(torch.cat(parts, -1)))))

    @staticmethod
    def shut() -> float:
        """The logit up to which nothing is written."""
        low, high = STRETCH
        return math.log(-low / high)

    @staticmethod
    def strength(logits: Tensor) -> Tensor:
        """Of logits the gates, in [0, 1]."""
        low, high = STRETCH
        return ((high - low) * logits.sigmoid() + low).clamp(0.0, 1.0)


class ReadGate(nn.Module):
    """What each query head says: ``scale * sigmoid(w h + b + match (|read|^2 - chance |stray|^2)) * read / |read|``.

    Keys, queries and values are of unit length, so the read of a stored pair is long and that of an unknown query
    short: the gate opens where the memory knows something, and what it then says does not depend on how well the
    query fits. But any query reads the more the fuller the memory is: so the length counts from that of stray reads, of
    queries that ask for nothing. An empty memory says nothing.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, num_heads)
        self.match = nn.Parameter(torch.empty(num_heads))
        self.chance = nn.Parameter(torch.empty(num_heads))
        self.scale = nn.Parameter(torch.empty(num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values: silent."""
        nn.init.zeros_(self.proj.weight)
        nn.init.constant_(self.proj.bias, CLOSED)
        nn.init.constant_(self.match, MATCH)
        nn.init.ones_(self.chance)
        nn.init.zeros_(self.scale)

    def forward(self, hidden: Tensor, read: Tensor, stray: Tensor) -> Tensor:
        """What is said, ``[B, T, H, D]``, at least float32.

        Args:
            hidden: ``[B, T, hidden]``; read: ``[B, T, H, D]``; stray: mean square of the stray reads, ``[B, T, H]``.
        """
        read = _full(read)
        square = read.square().sum(-1).clamp(min=SHORTEST**2)  # the norm's gradient at 0 is no number
        found = square - _full(self.chance) * stray
        gate = _full(self.scale) * (_full(self.proj(hidden)) + _full(self.match) * found).sigmoid()
        return (gate * square.rsqrt())[..., None] * read


class ReadScale(nn.Module):
    """How loud the reads of rule ``slot`` are: they fade by themselves where nothing is found."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start value: silent."""
        nn.init.zeros_(self.scale)

    def forward(self, read: Tensor) -> Tensor:
        """``[B, T, H, D]``, at least float32."""
        return _full(self.scale)[:, None] * _full(read)


class SlotGate(nn.Module):
    """What rule ``slot`` learns beside keys and values (:class:`senri.memory.SlotParameters`).

    And each query's logit of finding nothing: a token that asks for nothing can be told from its hidden state. What
    only reads a memory has nothing to learn of its writing.

    Args:
        tokens: values are tokens, so that a run of them is read in its order.
        end_width: width of the queries by which a memory knows that an answer is at its end; 0: it knows no end.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_memories: int,
        *,
        writes: bool = True,
        tokens: bool = False,
        end_width: int = 0,
    ) -> None:
        super().__init__()
        self.writes, self.tokens, self.ends = writes, tokens, end_width > 0
        self.null_proj = nn.Linear(hidden_size, num_heads)
        self.log_sharpness = nn.Parameter(torch.empty(num_memories))
        if writes:
            self.same_at = nn.Parameter(torch.empty(num_memories))
            self.log_slope = nn.Parameter(torch.empty(num_memories))
        if tokens:
            self.jump_cost = nn.Parameter(torch.empty(num_memories))
        if self.ends:
            self.end_key = nn.Parameter(torch.empty(num_memories, end_width))
            self.end_bias = nn.Parameter(torch.empty(num_memories))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values."""
        if self.ends:
            nn.init.zeros_(self.end_key)
            nn.init.zeros_(self.end_bias)
        start = SlotParameters.default(len(self.log_sharpness), torch.float32, self.log_sharpness.device)
        self.log_sharpness.copy_(start.sharpness.log())
        if self.tokens and start.jump_cost is not None:
            self.jump_cost.copy_(start.jump_cost)
        if self.writes:
            self.same_at.copy_(start.same_at)
            self.log_slope.copy_(start.slope.log())
        nn.init.zeros_(self.null_proj.weight)
        nn.init.constant_(self.null_proj.bias, NOTHING)

    def parameters_of_rule(
        self, writer: SlotParameters | None = None, end_value: Tensor | None = None
    ) -> SlotParameters:
        """For :func:`senri.memory.scan`; ``writer``: those of the layer that writes, if this one does not.

        Args:
            end_value: ``[H, D]``, what is read at the end of an answer; None: nothing, or the writer's.
        """
        own = {"sharpness": _full(self.log_sharpness).exp()}
        if self.tokens:
            own["jump_cost"] = _full(self.jump_cost)
        if end_value is None and writer is not None:
            end_value = writer.end_value
        if self.ends and end_value is not None:
            own |= {"end_key": _full(self.end_key), "end_bias": _full(self.end_bias), "end_value": _full(end_value)}
        if writer is not None:
            return writer._replace(**own)
        return SlotParameters(same_at=_full(self.same_at), slope=_full(self.log_slope).exp(), **own)

    def null(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., H]``, at least float32."""
        return _full(self.null_proj(hidden))


class MemoryStream(NamedTuple):
    """What one piece brings to every memory layer, aligned with ``[recent | new]`` tokens."""

    valid: Tensor  # [B, W + K - 1 + T] bool; False: before the text, or padding
    ids: Tensor | None  # [B, W + K - 1 + T]; only the head read-out needs them
    surprise: Tensor | None  # [B, W + K - 1 + T] nats; only the surprise write gate needs it
    written: Tensor | None = None  # [B, W + K - 1 + T] bool: pairs that the memory has already; None: of these none


class Leaving(NamedTuple):
    """The pairs that leave the window during one piece."""

    k: Tensor  # [B, T, H * D]
    v: Tensor  # [B, T, H * D]
    beta: Tensor | None  # [B, T, H]
    importance: Tensor | None  # [B, T, H], of rule slot
    log_alpha: Tensor | None  # [B, T, H]
    valid: Tensor  # [B, T] bool


class Writing(NamedTuple):
    """What a layer writes during one piece: all that the layers that share its memory need, to read it too."""

    pairs: Leaving
    memory: MemoryState  # before the piece
    slot: SlotParameters | None  # of rule slot
    said: Tensor | None  # [B, T, H, D]: the piece's own tokens as values; of rule slot with the head read-out


class MemoryLayerState(NamedTuple):
    """State of one memory layer: what was written, and the layer inputs that are still in the window."""

    memory: MemoryState | None  # None: the layer reads another one's
    recent: Tensor  # [B, W + K - 1, hidden], the model's dtype; [B, K - 1, hidden] where the layer does not write


def taps_of(conv_size: int, context_size: int) -> int:
    """K: tokens that a key or a query is made of, its own included."""
    return max(conv_size, context_size + 1, 1)


class MemoryAttention(nn.Module):
    """Reads an associative memory of everything that left the window of the last ``window`` tokens.

    The pair written at step ``t`` is that of token ``t - window``, projected when it leaves: so the write gate may use
    what became known meanwhile (the model's surprise at the token).

    Args:
        hidden_size: width of the layer's input.
        num_heads, num_key_value_heads, head_dim: query heads, memories, width of both keys and values.
        window: W, in tokens.
        rule, feature_map, chunk_size, segment_size, num_slots, store: see :func:`senri.memory.scan`. The gate of store
            ``hierarchical`` is a linear map of the layer's input.
        trained_as_one: whether there is no store in ``train()``.
        alibi_scale: of the slopes by which pairs fade (:mod:`senri.memory.alibi`); None: they do not.
        writes: False for a layer that reads the memory of another one (see :class:`Writing`), as layers share keys and
            values in cross-layer attention (Brandon et al. 2024, arXiv:2405.12981).
        conv_size: taps of a causal depthwise convolution on q, k and v; 0 for none (Gated DeltaNet, section 3.3).
        context_size: tokens whose attention makes each key and query, instead of the convolution; 0 for none
            (:class:`ContextAttention`). A key is made of the tokens before its pair, a query of the last ones.
        context_heads: heads of that attention; they divide both ``num_heads`` and ``num_key_value_heads`` times
            ``head_dim``.
        write_gate: ``none`` | ``hidden`` (see :class:`WriteGate`) | ``surprise`` (and the token's negative log
            likelihood under the window-only model).
        readout: ``layer``: values from the layer's input, read into the residual through a zero-init projection;
            ``head``: values are token embeddings, read added to the final hidden state under a zero-init gate
            (:class:`ReadGate`), so that the tied embedding turns it into logits;
            ``mix``: as ``layer``, but returned per head for Infini-attention's gate.
        end_token: of rule ``slot`` with readout ``head``, the token that ends an answer. A memory that holds anything
            says it, too, where it has learned to: no text that is read tells how an answer ends. None: it does not.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int,
        *,
        rule: str = "linear",
        feature_map: str | None = None,
        chunk_size: int = 64,
        segment_size: int = 2048,
        num_slots: int = 64,
        conv_size: int = 0,
        context_size: int = 0,
        context_heads: int = 1,
        write_gate: str = "none",
        readout: str = "layer",
        store: Store | None = None,
        trained_as_one: bool = False,
        alibi_scale: float | None = None,
        writes: bool = True,
        end_token: int | None = None,
    ) -> None:
        super().__init__()
        self.end_token = end_token if rule == "slot" and readout == "head" else None
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.conv_size, self.context_size = window, conv_size, context_size
        self.taps = taps_of(conv_size, context_size)
        self.rule, self.selective, self.readout = rule, writes and write_gate != "none", readout
        self.store, self.trained_as_one, self.alibi_scale, self.writes = store, trained_as_one, alibi_scale, writes
        self.feature_map = feature_map or RULES[rule].feature_map
        self.chunk_size, self.segment_size, self.num_slots = chunk_size, segment_size, num_slots
        query_size, key_size = num_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_size)
        if writes:
            self.k_proj = nn.Linear(hidden_size, key_size)
            self.v_proj = nn.Linear(hidden_size, key_size)
        if readout != "mix":  # a mix goes through the attention's own output projection
            self.o_proj = nn.Linear(query_size, hidden_size, bias=False)
        if conv_size:
            self.q_conv = nn.Parameter(torch.empty(query_size, conv_size))
            if writes:
                self.k_conv = nn.Parameter(torch.empty(key_size, conv_size))
            if writes and readout != "head":  # the values of the head read-out are single tokens
                self.v_conv = nn.Parameter(torch.empty(key_size, conv_size))
        if context_size:
            self.context = ContextAttention(hidden_size, context_heads, context_size)
        if self.selective:
            self.write_gate = WriteGate(hidden_size, num_key_value_heads, surprise=write_gate == "surprise")
        if rule == "gated_delta" and writes:
            self.forget_gate_proj = nn.Linear(hidden_size, num_key_value_heads)
        if rule == "slot":
            self.slot_gate = SlotGate(
                hidden_size, num_heads, num_key_value_heads, writes=writes, tokens=readout == "head",
                end_width=0 if self.end_token is None else head_dim,
            )  # fmt: skip
        if isinstance(store, Hierarchical):
            self.expand_gate_proj = nn.Linear(hidden_size, num_heads)
        if readout == "head":
            self.read_gate = ReadScale(num_heads) if rule == "slot" else ReadGate(hidden_size, num_heads)
        if readout == "mix":
            self.mix_gate = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values: identity-like projections, a branch that adds nothing, gates that can move."""
        # one matrix for all: equal states give equal keys and queries, and every process the same model
        rows = self.num_key_value_heads * self.head_dim
        start = torch.empty(rows, self.q_proj.in_features, device="cpu", dtype=torch.float32)  # QR knows no half
        if start.shape[0] == start.shape[1]:
            start = torch.eye(rows, device="cpu")
        else:
            nn.init.orthogonal_(start, generator=torch.Generator("cpu").manual_seed(0))
        for linear in (self.k_proj, self.v_proj) if self.writes else ():
            linear.weight.copy_(start)
            nn.init.zeros_(linear.bias)
        self.q_proj.weight.copy_(self.for_query_heads(start))
        nn.init.zeros_(self.q_proj.bias)
        if self.context_size:
            self.context.reset_parameters()
        if self.conv_size:
            # A key is made of the tokens before its pair: asking with the present finds what followed in the past.
            # The nearest counts most; the ones before it tell apart what ends alike.
            nn.init.zeros_(self.q_conv)
            for back in range(self.taps - 1):
                self.q_conv[:, -1 - back] = 0.5**back
            if self.writes:
                nn.init.zeros_(self.k_conv)
                self.k_conv[:, :-1] = self.q_conv[: len(self.k_conv), 1:]
            if self.writes and self.readout != "head":
                nn.init.zeros_(self.v_conv)
                self.v_conv[:, -1] = 1.0
        if self.readout == "layer":
            nn.init.zeros_(self.o_proj.weight)
        if self.readout == "head":
            # the transpose of v_proj: what was put in as an embedding comes out as one
            self.o_proj.weight.copy_(self.for_query_heads(start).T / self._groups)
            self.read_gate.reset_parameters()
        if self.rule == "slot":
            self.slot_gate.reset_parameters()
        if self.selective:
            self.write_gate.reset_parameters()
        if self.rule == "gated_delta" and self.writes:
            nn.init.zeros_(self.forget_gate_proj.weight)
            nn.init.constant_(self.forget_gate_proj.bias, -8.0)  # half-life of about 2000 tokens
        if self.readout == "mix":
            nn.init.constant_(self.mix_gate, -4.0)  # sigmoid 0.018, slope 0.018
        if isinstance(self.store, Hierarchical):  # half coarse, half fine: where the gate moves most easily
            nn.init.zeros_(self.expand_gate_proj.weight)
            nn.init.zeros_(self.expand_gate_proj.bias)

    @property
    def _groups(self) -> int:
        return self.num_heads // self.num_key_value_heads

    def for_query_heads(self, weight: Tensor) -> Tensor:
        """Rows of the memory heads ``[H * D, ...]`` for the query heads that read them: head ``h`` reads ``h // G``."""
        return weight.unflatten(0, (-1, self.head_dim)).repeat_interleave(self._groups, 0).flatten(0, 1)

    def store_in(self, training: bool) -> Store | None:
        """The store in ``train()``, or in ``eval()``."""
        return None if training and self.trained_as_one else self.store

    def empty_memory(
        self,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        num_slots: int | None = None,
        training: bool = False,
    ) -> MemoryState:
        """A memory that nothing was written to; ``training``: as :meth:`store_in` says."""
        store = self.store_in(training)
        return MemoryState.zeros(
            batch_size, self.num_key_value_heads, self.head_dim, feature_dim(self.feature_map, self.head_dim),
            rule=self.rule, num_slots=num_slots or self.num_slots,
            num_memories=None if store is None else store.size, store=None if store is None else store.name,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device,
        )  # fmt: skip

    def init_state(
        self, batch_size: int, dtype: torch.dtype, device: torch.device, *, training: bool = False
    ) -> MemoryLayerState:
        """An empty state: nothing written, nothing in the window."""
        memory = self.empty_memory(batch_size, dtype, device, training=training) if self.writes else None
        slots = self.window * self.writes + self.taps - 1
        recent = torch.zeros(batch_size, slots, self.q_proj.in_features, dtype=dtype, device=device)
        return MemoryLayerState(memory, recent)

    def forward(
        self,
        hidden: Tensor,
        stream: MemoryStream,
        state: MemoryLayerState,
        embedding: Tensor | None = None,
        writing: Writing | None = None,
    ) -> tuple[Tensor, MemoryLayerState]:
        """Write what leaves the window while ``hidden`` comes in, and read at each of its positions.

        Args:
            hidden: the layer's (normalised) inputs ``[B, T, hidden]``.
            stream: flags, ids and surprise of recent and new tokens.
            state: from the last call, or :meth:`init_state`.
            embedding: token embeddings ``[vocabulary, hidden]``, for the ``head`` read-out.
            writing: from :meth:`writing`, of the layer whose memory is read; None: found here.

        Returns:
            what to add: ``[B, T, hidden]`` (``mix``: the read itself, ``[B, T, H, D]``), and the new state.
        """
        steps = hidden.shape[1]
        inputs, recent = append(state.recent, hidden, state.recent.shape[1])
        past = steps + self.taps - 1
        if writing is None:
            assert state.memory is not None
            pairs = self._leaving(inputs, stream, steps, state.memory, embedding)
            writing = self._writing(pairs, stream, steps, state.memory, embedding)
        pairs = writing.pairs
        out, memory = self.write_and_read(
            self.over("q", inputs[:, -past:], stream.valid[:, -past:]), pairs.k, pairs.v, writing.memory,
            beta=pairs.beta, importance=pairs.importance, log_alpha=pairs.log_alpha, mask=pairs.valid,
            null=self._null(hidden), said=writing.said, expand=self._expand(hidden), slot=writing.slot,
        )  # fmt: skip
        new_state = MemoryLayerState(memory if self.writes else None, recent)
        if self.readout == "mix":
            return out.to(hidden.dtype), new_state
        return self.read_out(hidden, out), new_state

    def writing(
        self, hidden: Tensor, stream: MemoryStream, state: MemoryLayerState, embedding: Tensor | None = None
    ) -> Writing:
        """What :meth:`forward` will write, which other layers may read too: arguments as there."""
        assert state.memory is not None
        inputs = torch.cat([state.recent, hidden], dim=1)
        pairs = self._leaving(inputs, stream, hidden.shape[1], state.memory, embedding)
        return self._writing(pairs, stream, hidden.shape[1], state.memory, embedding)

    def _writing(
        self, pairs: Leaving, stream: MemoryStream, steps: int, memory: MemoryState, embedding: Tensor | None
    ) -> Writing:
        slot = self._slot_of(end_value=self.end_value(embedding))
        return Writing(pairs, memory, slot, self._said(stream, steps, embedding))

    def write(
        self, hidden: Tensor, stream: MemoryStream, state: MemoryLayerState, embedding: Tensor | None = None
    ) -> MemoryLayerState:
        """The new state of :meth:`forward`, without reading: arguments as there."""
        steps = hidden.shape[1]
        inputs = torch.cat([state.recent, hidden], dim=1)
        if state.memory is None:
            return MemoryLayerState(None, inputs[:, steps:])
        pairs = self._leaving(inputs, stream, steps, state.memory, embedding)
        count = pairs.valid.sum(1)
        store = self.store_in(self.training)
        segmented = RULES[self.rule].segmented or (store is not None and store.segmented)
        if pairs.beta is not None and pairs.log_alpha is None and not segmented:
            # What is not written changes nothing but the count, and ends a run of what is: one of it shows that.
            some = ((pairs.beta > 0).any(-1) & pairs.valid).any(0)
            some[1:] |= some[:-1].clone()
            some[:1] = True
            some = some.nonzero()[:, 0]
            pairs = Leaving(*(None if x is None else x[:, some] for x in pairs))  # type: ignore[arg-type]
        _, memory = self.write_and_read(
            pairs.k.new_zeros(*pairs.k.shape[:2], 0), pairs.k, pairs.v, state.memory,
            beta=pairs.beta, importance=pairs.importance, log_alpha=pairs.log_alpha, mask=pairs.valid,
        )  # fmt: skip
        memory = memory._replace(written=state.memory.written + count)
        return MemoryLayerState(memory, inputs[:, steps:])

    def _leaving(
        self, inputs: Tensor, stream: MemoryStream, steps: int, memory: MemoryState, embedding: Tensor | None
    ) -> Leaving:
        """What leaves the window while the last ``steps`` of ``inputs`` ``[B, W + K - 1 + T, hidden]`` come in."""
        past = slice(0, steps + self.taps - 1)  # of what leaves, and before
        part = slice(self.taps - 1, past.stop)
        valid = stream.valid[:, part]
        if stream.written is not None:
            valid = valid & ~stream.written[:, part]
        logits = self._write_logits(inputs, stream, steps)
        beta = None if logits is None else self.write_gate.strength(logits)
        if beta is not None and not torch.is_grad_enabled() and not beta.any():  # as for most tokens of a text
            k = v = _full(inputs.new_zeros(())).expand(*valid.shape, self.num_key_value_heads * self.head_dim)
        else:
            k = self.over("k", inputs[:, past], stream.valid[:, past], None if beta is None else beta > 0)
            v = self._values(inputs[:, past], stream, embedding)
        return Leaving(
            k,
            v,
            beta,
            logits if self.rule == "slot" else None,  # the odds tell pairs apart whose gates are 1
            self._log_forget(inputs[:, part], valid, memory.written),
            valid,
        )

    def write_and_read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MemoryState | None = None,
        *,
        beta: Tensor | None = None,
        importance: Tensor | None = None,
        log_alpha: Tensor | None = None,
        mask: Tensor | None = None,
        null: Tensor | None = None,
        said: Tensor | None = None,
        expand: Tensor | None = None,
        slot: SlotParameters | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """:func:`senri.memory.scan` of keys, queries and values ``[B, T, H * D]``, for :meth:`read_out`.

        Args:
            slot: of the layer that writes; None: this one.

        Returns:
            reads ``[B, T, H, D]``, for the :class:`ReadGate` ``[B, T, H * (1 + STRAY), D]``: each head's own and the
            stray ones behind it; and the new state.
        """
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        q = self._with_strays(q)
        if isinstance(self.store, Hierarchical) and expand is None:  # nobody listens
            expand = q.new_zeros(q.shape[:3])
        return scan(
            q, k, v, state, rule=self.rule, feature_map=self.feature_map,
            chunk_size=self.chunk_size, segment_size=self.segment_size, num_slots=self.num_slots,
            slot=self._slot_of(slot), beta=beta, importance=importance, log_alpha=log_alpha, mask=mask,
            null=null, said=said, store=self.store_in(self.training), expand=expand,
        )  # fmt: skip

    def read_all(
        self,
        q: Tensor,
        hidden: Tensor,
        state: MemoryState,
        said: Tensor | None = None,
        end_value: Tensor | None = None,
    ) -> Tensor:
        """The reads of :meth:`write_and_read` at the inputs ``hidden``, where nothing more is written; ``said``
        ``[B, T, H, D]`` as there, ``end_value``: see :meth:`end_value`.
        """
        slot = self._slot_of(end_value=end_value)
        return read(
            self._with_strays(q), state, rule=self.rule, feature_map=self.feature_map, slot=slot,
            null=self._null(hidden), said=said, store=self.store_in(self.training), expand=self._expand(hidden),
            segment_size=self.segment_size,
        )  # fmt: skip

    def end_value(self, embedding: Tensor | None) -> Tensor | None:
        """The end's token as a value, ``[H, D]``; None where there is none. ``embedding`` ``[vocabulary, hidden]``."""
        if self.end_token is None or embedding is None:
            return None
        return self._as_values(embedding[self.end_token]).view(self.num_key_value_heads, self.head_dim)

    def _slot_of(self, writer: SlotParameters | None = None, end_value: Tensor | None = None) -> SlotParameters | None:
        return self.slot_gate.parameters_of_rule(writer, end_value) if self.rule == "slot" else None

    def _expand(self, hidden: Tensor) -> Tensor | None:
        """The gate of store ``hierarchical`` for each query, the stray ones as its own: ``[B, T, Hq]``."""
        if not isinstance(self.store, Hierarchical):
            return None
        gate = _full(self.expand_gate_proj(hidden)).sigmoid()
        return gate.repeat_interleave(1 + STRAY, -1) if self.readout == "head" else gate

    def _said(self, stream: MemoryStream, steps: int, embedding: Tensor | None) -> Tensor | None:
        """The values of the last ``steps`` tokens ``[B, T, H, D]``, for rule ``slot`` with the head read-out."""
        if self.rule != "slot" or self.readout != "head":
            return None
        assert stream.ids is not None
        assert embedding is not None
        return self.embedded(stream.ids[:, stream.ids.shape[1] - steps :], embedding).unflatten(-1, (-1, self.head_dim))

    def _null(self, hidden: Tensor) -> Tensor | None:
        return self.slot_gate.null(hidden) if self.rule == "slot" else None

    def _with_strays(self, q: Tensor) -> Tensor:
        q = q.unflatten(-1, (-1, self.head_dim))
        if self.readout != "head" or self.rule == "slot":
            return q
        strays = [q.roll(self.head_dim * i // (STRAY + 1), -1) for i in range(STRAY + 1)]
        return torch.stack(strays, -2).flatten(-3, -2)

    @staticmethod
    def read_mask(writing: Writing) -> Tensor:
        """``[B, T]``: whether anything was written when each position reads."""
        return writing.memory.written[:, None] + writing.pairs.valid.cumsum(1) > 0

    def address(self, name: str, rows: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        """Keys or queries of ``n`` positions, each made of its own token and those before it.

        Args:
            name: ``k`` or ``q`` (or ``v``, which a convolution makes in the same way).
            rows: layer inputs ``[rows, hidden]``.
            at: for each position the rows of its last K tokens, newest first, ``[n, K]``.
            valid: ``[n, K]``, False where there is no such token: padding, or before the text.

        Returns:
            ``[n, H * D]``.
        """
        x = getattr(self, f"{name}_proj")(rows)
        if self.context_size and name != "v":
            seen = slice(1, None) if name == "k" else slice(0, -1)
            return self.context(rows, x, at[:, seen], valid[:, seen])
        if not self.conv_size:
            return x[at[:, 0]]
        weight = getattr(self, f"{name}_conv")
        return sum(x[at[:, back]] * valid[:, back, None] * weight[:, -1 - back] for back in range(self.taps))  # type: ignore[return-value]

    def embedded(self, ids: Tensor, embedding: Tensor) -> Tensor:
        """Values of the ``head`` read-out: ``ids`` ``[B, T]`` -> ``[B, T, H * D]`` of length 1."""
        return self._as_values(F.embedding(ids, embedding))

    def _as_values(self, embeddings: Tensor) -> Tensor:
        return F.normalize(_full(self.v_proj(embeddings)), dim=-1)

    def read_out(self, hidden: Tensor, read: Tensor) -> Tensor:
        """What the reads of :meth:`write_and_read` at the inputs ``hidden`` add: ``[B, T, hidden]``."""
        if self.readout == "head" and self.rule == "slot":
            read = self.read_gate(read)
        elif self.readout == "head":
            found, *strays = read.unflatten(-2, (self.num_heads, 1 + STRAY)).unbind(-2)
            stray = sum(_full(s).square().sum(-1) for s in strays) / STRAY
            read = self.read_gate(hidden, found, stray)
        return self.o_proj(read.to(hidden.dtype).flatten(2))

    def over(self, name: str, inputs: Tensor, valid: Tensor, needed: Tensor | None = None) -> Tensor:
        """:meth:`address` of the last T of ``inputs`` ``[B, T + K - 1, hidden]``: ``[B, T, H * D]``; zeros where none
        of ``needed`` ``[B, T, H]`` is set.
        """
        batch, size = valid.shape
        steps = size - self.taps + 1
        # not for a single position, whose block would be as much work as all that it sees
        if needed is None and self.context_size and name != "v" and steps != 1:
            seen = slice(0, -1) if name == "k" else slice(1, None)  # oldest first
            rows = inputs[:, seen]
            return self.context.of_piece(rows, getattr(self, f"{name}_proj")(rows), valid[:, seen])
        newest = torch.arange(self.taps - 1, size, device=valid.device)
        at = newest[:, None] - torch.arange(self.taps, device=valid.device)  # [T, K]
        at = at + size * torch.arange(batch, device=valid.device)[:, None, None]
        at = at.flatten(0, 1)
        rows, there = inputs.flatten(0, 1), valid.flatten()
        if needed is None:
            return self.address(name, rows, at, there[at]).unflatten(0, (batch, steps))
        some = needed.any(-1).flatten().nonzero()[:, 0]
        at, places = at[some].unique(return_inverse=True)  # of a million tokens some hundred are written
        made = self.address(name, rows[at], places, there[at][places])
        return made.new_zeros(batch * steps, made.shape[-1]).index_copy(0, some, made).unflatten(0, (batch, steps))

    def _values(self, past: Tensor, stream: MemoryStream, embedding: Tensor | None) -> Tensor:
        """Of the tokens that leave, the last T of ``past`` ``[B, T + K - 1, hidden]``."""
        part = slice(self.taps - 1, past.shape[1])
        if self.readout != "head":
            return self.over("v", past, stream.valid[:, : past.shape[1]])
        assert embedding is not None
        assert stream.ids is not None
        return self.embedded(stream.ids[:, part], embedding)

    def _write_logits(self, inputs: Tensor, stream: MemoryStream, steps: int) -> Tensor | None:
        """Of the gates, ``[B, T, H]``, of the leaving tokens; ``inputs`` ``[B, W + K - 1 + T, hidden]``."""
        if not self.selective:
            return None
        part = slice(self.taps - 1, self.taps - 1 + steps)
        after = slice(self.taps, self.taps + steps)
        following = inputs[:, after] * stream.valid[:, after, None]  # nothing follows a text's last token
        surprise = None if stream.surprise is None else stream.surprise[:, part]
        return self.write_gate(inputs[:, part], following, surprise)

    def _log_forget(self, leaving: Tensor, valid: Tensor, written: Tensor) -> Tensor | None:
        """``[B, T, H]`` of the leaving tokens ``[B, T, hidden]``; ``written`` ``[B]`` pairs came before them."""
        learned = -F.softplus(_full(self.forget_gate_proj(leaving))) if self.rule == "gated_delta" else None
        if self.alibi_scale is None:
            return learned
        positions = written[:, None] + valid.cumsum(1) - 1
        slopes = self.alibi_scale * alibi_slopes(self.num_key_value_heads)
        faded = alibi_log_alpha(positions, slopes, self.segment_size)
        return faded if learned is None else learned + faded
