"""Every store and write rule at equal state bytes, on associative recall over real text; why routing pays or does not.

``python benchmarks/stores.py BOOKS`` (ten to twenty minutes on one core). BOOKS: a folder of texts (or several files);
keys are calibrated on the first by name and measured on the next four. Results go to runs/benchmarks/stores.json, plots
beside it, tables to the terminal.

A pair is a place in a book: its key is made of what SmolLM2-135M has at the input of layer 14 there, its value is the
token that follows. Of each 32 tokens the last 16 are pairs. Asked is with the key itself (*exact*) and with the key of
the same words read behind other words: their 32 tokens behind 32 of another book (*elsewhere*). A value is a fixed
random vector of length 1 for each token, centred on its mean over other text; an answer is right when the read's inner
product is largest with the right token, of all different tokens that were written. All states have as many floats,
within 2 %.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from senri.data.corpus import load_documents
from senri.evaluation.plots import draw
from senri.evaluation.report import Curves, Series
from senri.evaluation.statistics import Mean, mean
from senri.hf.base import base_directory, load_tokenizer, load_unconverted
from senri.hf.calibrate import set_addresses
from senri.layers import MemoryAttention
from senri.memory import (
    RULES,
    Banks,
    Hierarchical,
    MemoryState,
    Multi,
    Routed,
    Store,
    feature_dim,
    orthogonal_basis,
    read,
    scan,
)
from senri.memory.stores import Reading
from senri.memory.svd import svd_cleaning

LAYER = 14  # whose input keys are made of, as in config/model.yaml
BOOKS = 4  # measured
PASSAGE = 32  # tokens, the last half of them pairs
CALIBRATION = 16384  # tokens
PAIRS = (64, 128, 256, 512, 1024, 2048, 4096)
ABLATED = (256, 1024, 4096)  # pairs of the ablations
ASKED = 1024  # pairs asked for, at most
FLOATS = 64 * (64 * 64 + 64)  # of each state: what 64 memories of width 64 hold
CENTRED = "calibrated, ELU + 1, centred"  # keys that are what the feature map makes of them, without its mean
SEGMENT = 64  # pairs: delta's corrections, turns of banks and memories
FORGET = -1 / 1024  # log of gated_delta's gate, at each write
EXPAND = 0.5  # hierarchical's gate
FEATURES = ("elu_plus_one", "relu", "dpfp", "hedgehog", "identity")
TOP_K = (1, 2, 4, 8, 16, 32, 64)
CLEANED = (64, 256, 1024)  # pairs, before the cleaning
ENERGIES = (0.99, 0.95, 0.8, 0.5)
ROUNDS = 9  # of timing
OUT = Path("runs/benchmarks")


class Text(NamedTuple):
    """One book under one key map."""

    keys: dict[str, Tensor]  # exact and elsewhere: [pairs, hidden]
    tokens: Tensor  # [pairs]: the values


class Weighing(NamedTuple):
    """The selected memories' reads, mixed in another way than by ``Routed``'s softmax."""

    selected: Tensor  # [B, H, G, T, n], 0 or 1
    kind: str  # own: each divided by its own normaliser, equal shares; sum: divided by the sum of theirs

    def weights(self, d: Tensor, eps: float) -> Tensor:
        if self.kind == "own":
            return self.selected / self.selected.sum(-1, keepdim=True) / d.clamp(min=eps)
        return self.selected / (self.selected * d).sum(-1, keepdim=True).clamp(min=eps)

    def part(self, steps: slice) -> Weighing:
        return self._replace(selected=self.selected[:, :, :, steps])


@dataclass(frozen=True, eq=False)
class Remixed(Routed):
    """:class:`Routed`, its ``top_k_memories`` weighed by :class:`Weighing`."""

    kind: str = "sum"

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        shares = super().reading(q, segment, num_heads, expand).shares
        return Weighing(shares.gt(0).to(shares), self.kind)


@dataclass(frozen=True, eq=False)
class Given(Store):
    """Memories that are told and not found: ``memory`` ``[T]`` of each pair, ``selected`` ``[T, n]`` of each query."""

    name = "given"
    rules = ("linear",)

    memory: Tensor
    selected: Tensor

    @property
    def size(self) -> int:
        return self.selected.shape[-1]

    def assign(self, k: Tensor, segment: Tensor) -> Tensor:
        return self.memory[None, None]

    def reading(self, q: Tensor, segment: Tensor, num_heads: int, expand: Tensor | None) -> Reading:
        return Weighing(self.selected[None, None, None], "own")


# Of all keys [P, width] and those that are written now, or asked for: the store that does it.
Make = Callable[[Tensor, Tensor], Store | None]


@dataclass(frozen=True)
class Arm:
    """A memory of FLOATS floats, and the ways in which it is read."""

    name: str
    rule: str = "linear"
    num_memories: int | None = None
    feature_map: str | None = None
    store: Make = lambda keys, which: None
    reads: dict[str, Make] = field(default_factory=dict)  # by name; none: as the store has it
    slot_width: int = 128

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Width of keys and values, and number of slots: those that come nearest to FLOATS."""
        if self.rule == "slot":
            sizes = [(self.slot_width, n) for n in range(1, 4096)]
        else:
            sizes = [(width, 1) for width in range(1, 577)]
        return min(sizes, key=lambda size: abs(self._floats(*size) - FLOATS))

    @property
    def floats(self) -> float:
        """Of the state, all of it: bytes / 4."""
        return self._floats(*self.shape)

    def _floats(self, width: int, num_slots: int) -> float:
        features = feature_dim(self.feature_map or RULES[self.rule].feature_map, width)
        empty = MemoryState.zeros(
            1, 1, width, features, rule=self.rule, num_slots=num_slots, num_memories=self.num_memories, device="meta"
        )
        return empty.nbytes / 4

    def options(self, store: Store | None, steps: int) -> dict[str, Any]:
        """Keyword arguments that ``scan`` and ``read`` share."""
        expand = torch.full((1, steps, 1), EXPAND) if isinstance(store, Hierarchical) else None
        return {
            "rule": self.rule,
            "feature_map": self.feature_map,
            "store": store,
            "segment_size": SEGMENT,
            "expand": expand,
        }

    def write(self, keys: Tensor, values: Tensor, loads: tuple[int, ...]) -> Iterator[tuple[int, MemoryState]]:
        """The state after so many pairs; keys and values ``[P, width]``."""
        state, start = None, 0
        for stop in loads:
            which = torch.arange(start, stop)
            k, v = (x[None, start:stop, None] for x in (keys, values))
            gate = torch.full(k.shape[:3], FORGET) if self.rule == "gated_delta" else None
            options = self.options(self.store(keys, which), len(which))
            _, state = scan(k, k, v, state, num_slots=self.shape[1], log_alpha=gate, **options)
            yield stop, state
            start = stop

    def read(self, state: MemoryState, make: Make, keys: Tensor, queries: Tensor, asked: Tensor) -> Tensor:
        """Reads ``[asked, width]``; queries ``[P, width]``."""
        return read(queries[None, asked, None], state, **self.options(make(keys, asked), len(asked)))[0, :, 0]


def one(store: Store) -> Make:
    """The same store whatever the keys are."""
    return lambda keys, which: store


def oracle(basis: Tensor) -> Make:
    """The query is told in which of the routed memories its pair lies."""

    def make(keys: Tensor, which: Tensor) -> Store:
        memory = route(keys[which], basis)
        return Given(memory, F.one_hot(memory, len(basis)).float())

    return make


def dealt(size: int, top_k: int = 0, seed: int = 0) -> Make:
    """Memories that have nothing to do with the keys: dealt in turn and told to the query (``top_k`` 0), or drawn at
    random, and the query reads ``top_k`` random ones.
    """

    def make(keys: Tensor, which: Tensor) -> Store:
        if not top_k:
            return Given(which % size, F.one_hot(which % size, size).float())
        generator = torch.Generator().manual_seed(seed)
        memory = torch.randint(size, (len(keys),), generator=generator)[which]
        some = torch.rand(len(keys), size, generator=generator)[which].topk(top_k).indices
        return Given(memory, torch.zeros(len(which), size).scatter(-1, some, 1.0))

    return make


def route(x: Tensor, basis: Tensor) -> Tensor:
    """``argmax_i |x' b_i|`` of ``[T, width]``: ``[T]``."""
    return (x @ basis.T).abs().argmax(-1)


def main_arms() -> list[Arm]:
    """All stores and rules, as designed; with bounds of routing."""
    basis = orthogonal_basis("identity", 64)
    reads = {"": one(Routed(basis)), "oracle": oracle(basis)}
    turns = {"banks": Banks(4, 1), "multi": Multi(4), "hierarchical": Hierarchical(4)}
    few = orthogonal_basis("hadamard", 128)[:16]
    free = {"top 2, sum": one(Remixed(few, 2)), "oracle": oracle(few)}
    return [
        *(Arm("single", rule) for rule in RULES),
        Arm("routed", num_memories=64, store=one(Routed(basis)), reads=reads),
        Arm("random routing", num_memories=64, store=dealt(64, 64)),
        Arm("dealt", num_memories=64, store=dealt(64), reads={"oracle": dealt(64)}),
        *(
            Arm(name, rule, 4, store=one(store))
            for name, store in turns.items()
            for rule in RULES
            if rule in store.rules
        ),
        Arm("single", feature_map="identity"),
        Arm("routed, 16", num_memories=16, feature_map="identity", store=one(Routed(few)), reads=free),
        Arm("dealt", num_memories=64, feature_map="identity", store=dealt(64), reads={"oracle": dealt(64)}),
    ]


def routing_arms(features: tuple[str, ...] = FEATURES) -> list[Arm]:
    """Feature map, weighting and number of memories read, for as many memories as they are wide."""
    arms = []
    for name in features:
        n = 64 if feature_dim(name, 1) == 1 else 51
        basis = orthogonal_basis("identity", n)
        some = sorted({min(k, n) for k in TOP_K})
        reads = {
            **{f"softmax {k}": one(Routed(basis, k)) for k in some},
            **{f"own {k}": one(Remixed(basis, k, kind="own")) for k in (4, n)},
            **{f"sum {k}": one(Remixed(basis, k)) for k in some},
            "oracle": oracle(basis),
        }
        arms += [
            Arm("single", feature_map=name),
            Arm("routed", num_memories=n, feature_map=name, store=one(Routed(basis)), reads=reads),
            Arm("dealt", num_memories=n, feature_map=name, store=dealt(n), reads={"oracle": dealt(n)}),
            *(Arm(f"random {k}", num_memories=n, feature_map=name, store=dealt(n, k)) for k in (1, n)),
        ]
    return arms


def basis_arms() -> list[Arm]:
    """Which basis, and how many memories."""
    arms = []
    for n, width, kinds in (
        (4, 257, ("identity", "random")),
        (16, 128, ("identity", "hadamard", "random")),
        (64, 64, ("identity", "hadamard", "random")),
    ):
        for kind in kinds:
            basis = orthogonal_basis(kind, width)[:n]
            for name in ("elu_plus_one", "identity"):
                reads = {f"sum {k}": one(Remixed(basis, k)) for k in (1, 2, 4)}
                if name == "elu_plus_one":
                    reads[f"softmax {n}"] = one(Routed(basis, n))
                reads["oracle"] = oracle(basis)
                arms.append(Arm(f"{kind} {n}", "linear", n, name, one(Routed(basis)), reads))
    return arms


@torch.no_grad()
def collect(paths: list[str]) -> tuple[Callable[[str, Tensor], Tensor], Tensor, dict[str, tuple[Tensor, ...]]]:
    """The key maps, the calibration text's tokens, and of each book keys' and queries' hidden states and tokens."""
    documents = load_documents(paths)
    if len(documents) < 1 + BOOKS:
        sys.exit(f"{len(documents)} text(s) in {' '.join(paths)}: it takes {1 + BOOKS}, one of them to calibrate on")
    tokenizer = load_tokenizer(base_directory())
    model = load_unconverted().model
    # nothing above is needed: what is left gives the inputs of the layer, as its attention sees them
    model.norm, model.layers = model.layers[LAYER].input_layernorm, model.layers[:LAYER]

    def hidden(ids: Tensor) -> Tensor:
        rows = ids.split(4096 // ids.shape[1])
        return torch.cat([model(row, use_cache=False).last_hidden_state.float() for row in rows])

    def tokens(text: str, count: int) -> Tensor:
        body = text[len(text) // 4 :]  # behind title and contents
        ids = tokenizer(body[: 8 * count], add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids[:count])

    other = tokens(documents[0].text, CALIBRATION)
    states = hidden(other.view(-1, 1024)).flatten(0, 1)
    calibrated = MemoryAttention(states.shape[1], 1, 1, states.shape[1], window=0)
    set_addresses(calibrated, states)
    raw = orthogonal_basis("random", states.shape[1])
    loud = (states @ raw.T).square().mean().sqrt()  # as large as the calibrated ones

    common = (F.elu(calibrated.k_proj(states)) + 1).mean(0)

    def project(kind: str, x: Tensor) -> Tensor:
        if kind == "raw":
            return x @ raw.T / loud
        keys = calibrated.k_proj(x)
        return F.elu(keys) + 1 - common if kind == CENTRED else keys

    texts = {}
    for document in documents[1 : 1 + BOOKS]:
        ids = tokens(document.text, 2 * PAIRS[-1] + 1)
        passages = ids[:-1].view(-1, PASSAGE)
        strange = other.view(-1, PASSAGE)[torch.arange(len(passages)) % (len(other) // PASSAGE)]
        elsewhere = hidden(torch.cat([strange, passages], 1))[:, PASSAGE:]
        here = hidden(ids[:-1].view(-1, 1024)).view_as(elsewhere)
        pairs = (here, elsewhere, ids[1:].view_as(passages))
        texts[document.name] = tuple(x[:, PASSAGE // 2 :].flatten(0, 1) for x in pairs)
    return project, other, texts


class Codes:
    """The value of each token: a random vector of length 1, centred on other text."""

    def __init__(self, other: Tensor, vocabulary: int) -> None:
        self.vectors = torch.randn(vocabulary, 576, generator=torch.Generator().manual_seed(0))
        self.other, self.means = other, {}

    def __call__(self, tokens: Tensor, width: int) -> Tensor:
        if width not in self.means:
            self.means[width] = F.normalize(self.vectors[self.other, :width], dim=-1).mean(0)
        return F.normalize(self.vectors[tokens, :width], dim=-1) - self.means[width]


def recalled_bits(right: Tensor, frequency: Tensor) -> float:
    """Least mutual information, in bits, of a pair's value and the answer (Barber and Agakov 2003, the IM algorithm).

    It is ``E log2 q(x | answer) / p(x)`` for any ``q``; here the answer is believed with ``a``, and else nothing is
    known: ``q = a [x = answer] + (1 - a) p(x)``, with the best ``a``. With even frequencies that is Fano's inequality
    with errors spread evenly; who always answers the commonest value gets 0.

    Args:
        right: ``[asked]`` bool; frequency: ``[asked]``, ``p`` of the right values among those written.
    """
    a = torch.linspace(0, 1, 257, dtype=torch.float64)[:, None]
    gain = torch.where(right, a / frequency + 1 - a, 1 - a).log2()
    return max(0.0, float(gain.mean(-1).max()))


@torch.no_grad()
def measure(
    arms: list[Arm], text: Text, codes: Codes, loads: tuple[int, ...], kinds: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of what each arm recalls of one book."""
    generator = torch.Generator().manual_seed(0)
    asked = {pairs: torch.randperm(pairs, generator=generator)[:ASKED] for pairs in loads}
    for arm in arms:
        width = arm.shape[0]
        keys = {kind: text.keys[kind][:, :width].contiguous() for kind in ("exact", *kinds)}
        for pairs, state in arm.write(keys["exact"], codes(text.tokens, width), loads):
            if abs(state.nbytes / 4 / FLOATS - 1) > 0.02:
                raise AssertionError(f"{arm.name}: {state.nbytes / 4:,.0f} floats and not {FLOATS:,}")
            for name, make in (arm.reads or {"": arm.store}).items():
                for kind in kinds:
                    reads = arm.read(state, make, keys["exact"], keys[kind], asked[pairs])
                    yield {
                        "arm": arm.name, "rule": arm.rule, "feature_map": arm.feature_map, "read": name, "asked": kind,
                        "pairs": pairs, "floats": state.nbytes / 4, "width": width,
                    } | score(reads, text.tokens[:pairs], asked[pairs], codes, pairs / (state.nbytes / 4))  # fmt: skip


def score(reads: Tensor, tokens: Tensor, asked: Tensor, codes: Codes, pairs_a_float: float) -> dict[str, float]:
    """Top-1 and bits a float of ``reads`` ``[asked, width]`` among the different of ``tokens`` ``[pairs]``."""
    candidates, counts = tokens.unique(return_counts=True)
    right = candidates[(reads @ codes(candidates, reads.shape[1]).T).argmax(-1)] == tokens[asked]
    frequency = counts[torch.searchsorted(candidates, tokens[asked])] / len(tokens)
    bits = recalled_bits(right, frequency.double())
    return {"top1": float(right.double().mean()), "bits": bits, "bits_a_float": bits * pairs_a_float}


@torch.no_grad()
def references(text: Text, loads: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """What no memory of this size is: the nearest of all keys, kept as they are; and the commonest token."""
    keys = {kind: F.normalize(x, dim=-1) for kind, x in text.keys.items()}
    for pairs in loads:
        tokens = text.tokens[:pairs]
        for kind, queries in keys.items():
            nearest = (queries[:pairs] @ keys["exact"][:pairs].T).argmax(-1)
            top1 = float((tokens[nearest] == tokens).double().mean())
            yield {"arm": "nearest of all keys", "asked": kind, "pairs": pairs, "top1": top1}
            common = float((tokens == tokens.mode().values).double().mean())
            yield {"arm": "commonest token", "asked": kind, "pairs": pairs, "top1": common}


@torch.no_grad()
def geometry(text: Text) -> Iterator[dict[str, Any]]:
    """How alike keys are before and after the feature map, and how routing sees them, for 64 memories of width 64."""
    keys, queries = (text.keys[kind][:, :64] for kind in ("exact", "elsewhere"))
    apart = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    for basis_kind in ("identity", "hadamard", "random"):
        basis = orthogonal_basis(basis_kind, 64)
        scores = (queries @ basis.T).abs()
        memory = route(keys, basis)
        load = memory.bincount(minlength=64) / len(memory)
        hits = {
            f"found_{k}": float((scores.topk(k).indices == memory[:, None]).any(-1).double().mean()) for k in (1, 4, 16)
        }
        yield {
            "basis": basis_kind,
            "query_key_cosine": float(F.cosine_similarity(keys, queries).mean()),
            "other_key_cosine": float(F.cosine_similarity(keys, keys[apart]).mean()),
            "other_feature_cosine": float(F.cosine_similarity(F.elu(keys) + 1, F.elu(keys[apart]) + 1).mean()),
            "memories_used": float(torch.special.entr(load).sum().exp()),
            "largest_memory": float(load.max()),
            "softmax_top": float(scores.softmax(-1).amax(-1).mean()),
            **hits,
        }


@torch.no_grad()
def cleaning(text: Text, codes: Codes) -> Iterator[dict[str, Any]]:
    """Recall after SVD cleaning, by load and energy."""
    basis = orthogonal_basis("identity", 64)
    top = one(Routed(basis, 1))
    arms = [
        Arm("single"),
        Arm("single", feature_map="identity"),
        Arm("single", "delta_token"),
        Arm("routed, top 1", num_memories=64, store=top),
        Arm("routed, top 1", num_memories=64, feature_map="identity", store=top),
    ]
    for arm in arms:
        width = arm.shape[0]
        keys, queries = (text.keys[kind][:, :width].contiguous() for kind in ("exact", "elsewhere"))
        for pairs, state in arm.write(keys, codes(text.tokens, width), CLEANED):
            asked = torch.arange(pairs)
            for energy in (None, *ENERGIES):
                cleaned, stats = (state, None) if energy is None else svd_cleaning(state, energy)
                reads = arm.read(cleaned, arm.store, keys, queries, asked)
                yield {
                    "arm": arm.name, "rule": arm.rule, "feature_map": arm.feature_map, "pairs": pairs, "energy": energy,
                    "rank": None if stats is None else stats.retained_rank,
                } | score(reads, text.tokens[:pairs], asked, codes, pairs / (state.nbytes / 4))  # fmt: skip


@torch.no_grad()
def timing(text: Text, codes: Codes) -> list[dict[str, Any]]:
    """Microseconds a token of ``scan`` and of ``read`` over 1,024; ratios to the single linear memory, round by round.

    All in turn in each round, so that the machine's moods meet all alike.
    """
    basis = orthogonal_basis("identity", 64)
    few = orthogonal_basis("hadamard", 128)[:16]
    arms = [
        Arm("single"),
        Arm("routed, top 64", num_memories=64, store=one(Routed(basis, 64))),
        Arm("routed, top 1", num_memories=64, store=one(Routed(basis, 1))),
        Arm("routed, 16, top 2, sum", num_memories=16, store=one(Remixed(few, 2))),
        Arm("banks", num_memories=4, store=one(Banks(4, 1))),
        Arm("multi", num_memories=4, store=one(Multi(4))),
        Arm("hierarchical", num_memories=4, store=one(Hierarchical(4))),
        Arm("single", "delta"),
        Arm("banks", "delta", 4, store=one(Banks(4, 1))),
        Arm("single", "delta_token"),
        Arm("banks", "delta_token", 4, store=one(Banks(4, 1))),
        Arm("single", "slot"),
    ]
    which = torch.arange(1024)
    took: dict[tuple[str, str], list[tuple[float | None, float]]] = {}
    for _ in range(ROUNDS):
        for arm in arms:
            keys = text.keys["exact"][:1024, : arm.shape[0]].contiguous()
            values = codes(text.tokens[:1024], arm.shape[0])
            start = time.perf_counter()
            ((_, state),) = arm.write(keys, values, (1024,))
            written = time.perf_counter()
            reads = arm.read(state, arm.store, keys, keys, which)
            took.setdefault((arm.name, arm.rule), []).append((written - start, time.perf_counter() - written))
            if arm.name == "routed, top 1":  # as the core does it, and by reading the selected memory alone
                start = time.perf_counter()
                alone = read_selected(state, keys, basis)
                took.setdefault((f"{arm.name}, gathered", arm.rule), []).append((None, time.perf_counter() - start))
                torch.testing.assert_close(alone, reads, rtol=1e-3, atol=1e-5)
        small = text.keys["exact"][None, :1024, None, :64].contiguous()
        start = time.perf_counter()
        _, state = scan(small, small, small)
        written = time.perf_counter()
        read(small, state)
        row = (written - start, time.perf_counter() - written)
        took.setdefault(("single of width 64 (1/64 of the state)", "linear"), []).append(row)
    out = []
    for (name, rule), rounds in took.items():
        row = {"arm": name, "rule": rule}
        for what, times in zip(("scan", "read"), zip(*rounds, strict=True), strict=True):
            if None in times:
                continue
            single = [r[what == "read"] for r in took[next(iter(took))]]
            row[f"{what}_us"] = median(times) / 1024 * 1e6
            row[f"{what}_ratio"] = median(mine / other for mine, other in zip(times, single, strict=True))
        out.append(row)
    return out


def read_selected(state: MemoryState, queries: Tensor, basis: Tensor) -> Tensor:
    """What ``Routed(basis, 1)`` reads for ``queries`` ``[T, width]``, without computing the other memories' reads."""
    memory = route(queries, basis)
    q = F.elu(queries) + 1
    out = (state.M[0, 0, memory] @ q[..., None])[..., 0]
    return out / (state.z[0, 0, memory] * q).sum(-1, keepdim=True).clamp(min=1e-6)


Key = tuple[Any, ...]


def over_books(rows: list[dict[str, Any]], by: tuple[str, ...], value: str) -> dict[Key, Mean]:
    """Means over the books, by what the rows say under ``by``."""
    groups: dict[Key, list[float]] = {}
    for row in rows:
        if row.get(value) is not None:
            groups.setdefault(tuple(row.get(name) for name in by), []).append(row[value])
    return {key: mean(values) for key, values in groups.items()}


def table(title: str, rows: list[dict[str, Any]], by: tuple[str, ...], columns: str, value: str, unit: float) -> None:
    """Print the mean of ``value`` times ``unit`` and half its 95 % interval, a row for each ``by``."""
    cells = over_books(rows, (*by, columns), value)
    heads = sorted({key[-1] for key in cells}, key=lambda x: (x is not None, x))
    print(f"\n{title}\n\n| {' | '.join(by)} | {' | '.join(str(head) for head in heads)} |")
    print("|" + "---|" * len(by) + "---:|" * len(heads))
    for key in dict.fromkeys(key[:-1] for key in cells):
        found = [cells.get((*key, head)) for head in heads]
        shown = ["" if m is None else f"{m.value * unit:.1f} ± {(m.high - m.value) * unit:.1f}" for m in found]
        print(f"| {' | '.join('' if x is None else str(x) for x in key)} | {' | '.join(shown)} |", flush=True)


def paired(rows: list[dict[str, Any]], one_arm: Key, other_arm: Key) -> list[dict[str, Any]]:
    """Recall with calibrated keys, book by book, of one arm less that of another: (arm, rule, feature map, read)."""
    recall = {
        (*(r.get(name) for name in ("arm", "rule", "feature_map", "read")), r["asked"], r["pairs"], r["book"]): r[
            "top1"
        ]
        for r in rows
        if r["keys"] == "calibrated"
    }
    what = " less ".join(", ".join(str(x) for x in arm if x) for arm in (one_arm, other_arm))
    return [
        {"difference": what, "asked": key[4], "pairs": key[5], "top1": value - recall[(*other_arm, *key[4:])]}
        for key, value in recall.items()
        if key[:4] == one_arm
    ]


def curve(name: str, points: dict[float, Mean], dashed: bool = False) -> Series:
    """A series of the report's plots; bounds cut to [0, 1]."""
    x = tuple(sorted(points))
    low, high = (tuple(min(1.0, max(0.0, getattr(points[p], end))) for p in x) for end in ("low", "high"))
    return Series(name, x, tuple(points[p].value for p in x), low, high, dashed)


def plots(main_rows: list[dict[str, Any]], routing_rows: list[dict[str, Any]]) -> None:
    """Recall by store and number of pairs; recall by feature map, weighting and number of memories read."""
    by = ("keys", "asked", "arm", "rule", "feature_map", "read", "pairs")
    cells = over_books(main_rows, by, "top1")

    def by_pairs(name: str, *key: Any, dashed: bool = False) -> Series:
        mine = {k[-1]: m for k, m in cells.items() if k[:-1] == ("calibrated", "elsewhere", *key)}
        return curve(name, mine, dashed)

    figure = Curves(
        "recall-by-store",
        f"Recall of real text at equal state bytes ({FLOATS * 4 / 1e6:.2f} MB)",
        "pairs written",
        "right tokens (top-1)",
        (
            by_pairs("slots", "single", "slot", None, ""),
            by_pairs("single, delta_token", "single", "delta_token", None, ""),
            by_pairs("single, linear, identity", "single", "linear", "identity", ""),
            by_pairs("16 routed, top 2, sum, identity", "routed, 16", "linear", "identity", "top 2, sum"),
            by_pairs("single, linear, ELU + 1", "single", "linear", None, ""),
            by_pairs("64 routed, as designed, ELU + 1", "routed", "linear", None, ""),
            by_pairs("upper: 64, told where, identity", "dealt", "linear", "identity", "oracle", dashed=True),
            by_pairs("upper: 64, told where, ELU + 1", "dealt", "linear", None, "oracle", dashed=True),
            by_pairs("lower: random routing, ELU + 1", "random routing", "linear", None, "", dashed=True),
        ),
        log_x=True,
        y_range=(0.0, 1.0),
    )  # fmt: skip
    draw(figure, OUT / "recall-by-store.png")
    cells = over_books(routing_rows, by, "top1")

    def by_top_k(name: str, feature_map: str, weighing: str) -> Series:
        mine = {
            int(k[5].split()[1]): m
            for k, m in cells.items()
            if (k[0], *k[2:5], k[6]) == ("calibrated", "routed", "linear", feature_map, ABLATED[0])
            and k[5].startswith(weighing)
        }
        return curve(name, mine)

    def level(name: str, arm: str, feature_map: str, reading: str = "") -> Series:
        key = ("calibrated", "elsewhere", arm, "linear", feature_map, reading, ABLATED[0])
        return curve(name, {1: cells[key]}, dashed=True)

    figure = Curves(
        "recall-by-routing",
        f"64 routed memories of width 64, {ABLATED[0]} pairs: what σ and the weighting do",
        "memories that a query reads (top_k_memories)",
        "right tokens (top-1)",
        (
            by_top_k("identity, sum", "identity", "sum"),
            by_top_k("ReLU, sum", "relu", "sum"),
            by_top_k("ELU + 1, sum", "elu_plus_one", "sum"),
            by_top_k("ELU + 1, softmax (as designed)", "elu_plus_one", "softmax"),
            by_top_k("identity, softmax", "identity", "softmax"),
            level("one memory of width 515, identity", "single", "identity"),
            level("told where, identity", "routed", "identity", "oracle"),
            level("one at random, identity", "random 1", "identity"),
        ),
        log_x=True,
        y_range=(0.0, 1.0),
    )
    draw(figure, OUT / "recall-by-routing.png")


def main() -> None:
    """All tables and plots."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    project, other, books = collect(sys.argv[1:])
    codes = Codes(other, int(max(other.max(), *(tokens.max() for *_, tokens in books.values()))) + 1)
    out: dict[str, list[dict[str, Any]]] = {"main": [], "routing": [], "bases": [], "geometry": [], "cleaning": []}
    both, main, routing, bases = ("exact", "elsewhere"), main_arms(), routing_arms(), basis_arms()
    some = [arm for arm in routing if arm.feature_map in ("elu_plus_one", "identity")]
    for book, (here, elsewhere, tokens) in books.items():
        for kind, arms in (("raw", some), (CENTRED, main[-3:]), ("calibrated", routing)):
            text = Text({"exact": project(kind, here), "elsewhere": project(kind, elsewhere)}, tokens)
            of = {"book": book, "keys": kind}
            out["routing"] += [of | row for row in measure(arms, text, codes, ABLATED, both[1:])]
            if kind != CENTRED:
                out["main"] += [of | row for row in measure(main, text, codes, PAIRS, both)]
                out["main"] += [of | row for row in references(text, PAIRS)]
                out["geometry"] += [of | row for row in geometry(text)]
        out["bases"] += [of | row for row in measure(bases, text, codes, ABLATED, both[1:])]
        out["cleaning"] += [of | row for row in cleaning(text, codes)]
        print(f"{book}: after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    times = timing(text, codes)
    OUT.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch.__version__, "floats": FLOATS, **out, "timing": times}
    (OUT / "stores.json").write_text(json.dumps(result, indent=1))
    report(out, times)
    plots(out["main"], out["routing"])


def report(out: dict[str, list[dict[str, Any]]], times: list[dict[str, Any]]) -> None:
    """All tables: means over the books and half their 95 % intervals."""
    row = ("arm", "rule", "feature_map", "read")
    for keys in ("calibrated", "raw"):
        for asked in ("elsewhere", "exact"):
            mine = [r for r in out["main"] if (r["keys"], r["asked"]) == (keys, asked)]
            table(f"Recall, top-1 in %: {keys} keys, asked {asked}, by pairs written", mine, row, "pairs", "top1", 100)
            title = f"Bits recalled per 1,000 floats of state: {keys} keys, asked {asked}, by pairs written"
            table(title, mine, row, "pairs", "bits_a_float", 1000)
    routed, single = ("routed, 16", "linear", "identity", "top 2, sum"), ("single", "linear", "identity", "")
    differences = [
        *paired(out["main"], routed, single),
        *paired([*out["bases"], *out["routing"]], ("hadamard 16", "linear", "identity", "sum 1"), single),
        *paired(out["main"], routed, ("single", "delta_token", None, "")),
        *paired(out["main"], ("routed", "linear", None, ""), ("single", "linear", None, "")),
    ]
    table("Differences in points, paired by book", differences, ("difference", "asked"), "pairs", "top1", 100)
    for keys in ("calibrated", CENTRED, "raw"):
        mine = [r for r in out["routing"] if r["keys"] == keys]
        table(
            f"Routing, top-1 in %: {keys} keys, by pairs written",
            mine,
            (*row[2:3], "arm", "read"),
            "pairs",
            "top1",
            100,
        )
    table(
        "Bases, top-1 in %: calibrated keys, by pairs written",
        out["bases"],
        (*row[2:3], "arm", "read"),
        "pairs",
        "top1",
        100,
    )
    names = [name for name in out["geometry"][0] if name not in ("book", "keys", "basis")]
    means = {name: over_books(out["geometry"], ("keys", "basis"), name) for name in names}
    print(f"\nKeys of width 64\n\n| keys | basis | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}")
    for keys, basis in means[names[0]]:
        print(f"| {keys} | {basis} | {' | '.join(f'{means[name][keys, basis].value:.3f}' for name in names)} |")
    for energy_of, unit in (("top1", 100), ("rank", 1)):
        by = ("arm", "rule", "feature_map", "pairs")
        table(
            f"SVD cleaning, {energy_of}: calibrated keys, by energy kept",
            out["cleaning"],
            by,
            "energy",
            energy_of,
            unit,
        )
    print("\n| store | rule | scan, µs a token | read, µs | scan, of single | read, of single |")
    print("|---|---|---:|---:|---:|---:|")
    for t in times:
        shown = (t.get("scan_us"), t["read_us"], t.get("scan_ratio"), t["read_ratio"])
        figures = " | ".join("" if x is None else f"{x:.{d}f}" for x, d in zip(shown, (1, 1, 2, 2), strict=True))
        print(f"| {t['arm']} | {t['rule']} | {figures} |")


if __name__ == "__main__":
    main()
