"""Texts laid end to end and cut into samples of one length: nothing is padded, every token is text.

Sample ``i`` is the same tokens in every epoch and every process; only the order changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import numpy as np

from senri.data.corpus import Document
from senri.data.haystack import encode
from senri.data.reversal import Pair
from senri.data.samples import SampleError
from senri.data.text import TextError


class TokenStream(NamedTuple):
    """Texts laid end to end."""

    ids: np.ndarray  # [N] int32
    ends: np.ndarray  # [texts] where each one ends
    names: tuple[str, ...]


def token_stream(documents: Sequence[Document], tokenizer: Any) -> TokenStream:
    """The documents in the order given, each with the tokenizer's end-of-text token behind it.

    Raises:
        TextError: it has none.
    """
    texts = _pack(tokenizer, [document.text for document in documents])
    ends = np.cumsum([len(ids) for ids in texts])
    return TokenStream(np.concatenate(texts), ends, tuple(document.name for document in documents))


class PackedTexts:
    """Samples of ``length + 1`` tokens: ``length`` to read, and each one's successor.

    Args:
        stream: what they are cut from.
        length: tokens of a sample.
        samples: drawn from all there are.
        facts: further samples of this length, from :func:`pack_facts`.
        seed: of the draw, and of each epoch's order.

    Raises:
        SampleError: less text than samples.
    """

    def __init__(
        self, stream: TokenStream, length: int, samples: int, facts: Sequence[np.ndarray] = (), seed: int = 0
    ) -> None:
        self.stream, self.length, self.facts, self.seed = stream, length, facts, seed
        there = (len(stream.ids) - 1) // length
        if there < samples:
            raise SampleError(
                f"the texts have {len(stream.ids):,} tokens, room for {there:,} samples of {length:,}, and {samples:,} "
                "are wanted: give more text, or ask for fewer or shorter ones"
            )
        self.starts = [place * length for place in sorted(Random(f"{seed}/samples").sample(range(there), samples))]

    def __len__(self) -> int:
        return len(self.starts) + len(self.facts)

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids ``[length + 1]`` int32."""
        if index >= len(self.starts):
            return self.facts[index - len(self.starts)]
        start = self.starts[index]
        return self.stream.ids[start : start + self.length + 1]

    def source(self, index: int) -> str:
        """Where a sample is from, in words."""
        if index >= len(self.starts):
            return "the facts"
        return self.stream.names[int(np.searchsorted(self.stream.ends, self.starts[index], side="right"))]

    def order(self, epoch: int) -> list[int]:
        """All samples, shuffled anew in each epoch."""
        indices = list(range(len(self)))
        Random(f"{self.seed}/order/{epoch}").shuffle(indices)
        return indices


def forward_sentences(pairs: Sequence[Pair], repeats: int, seed: int) -> list[str]:
    """Each fact in its forward direction ``repeats`` times: all once before any comes again, in ever new order."""
    rng, sentences = Random(f"{seed}/facts"), []
    for _ in range(repeats):
        round_ = [pair.sentence for pair in pairs]
        rng.shuffle(round_)
        sentences += round_
    return sentences


def load_hub_documents(name: str, count: int) -> list[Document]:
    """The first texts of a data set, its split ``train`` and field ``text``, streamed by the package ``datasets``.

    Raises:
        TextError: no such package, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise TextError("a data set needs the package datasets: pip install 'senri[hub]', or name folders") from None
    try:
        rows: Iterable[dict[str, str]] = datasets.load_dataset(name, split="train", streaming=True)
        documents = [Document(f"{name}:{i}", row["text"]) for i, row in enumerate(islice(rows, count))]
    except Exception as error:  # no connection, no such set, no such field: each in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TextError(f"the data set {name} cannot be loaded ({reason}): name a folder of texts instead") from None
    return [document for document in documents if document.text.strip()]


def _pack(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text with the separator behind."""
    separator = tokenizer.eos_token_id
    if separator is None:
        raise TextError("the tokenizer has no end-of-text token to put between texts: name another one")
    return [np.array([*encode(tokenizer, text), separator], dtype=np.int32) for text in texts]


def pack_facts(facts: Sequence[str], tokenizer: Any, length: int) -> list[np.ndarray]:
    """Samples ``[length + 1]`` that hold all sentences, end to end; what the last one lacks is filled from the start.

    Raises:
        TextError: the tokenizer has no end-of-text token.
    """
    if not facts:
        return []
    ids = np.concatenate(_pack(tokenizer, facts))
    count = -(-len(ids) // length)
    ids = np.tile(ids, -(-(count * length + 1) // len(ids)))
    return [ids[start : start + length + 1] for start in range(0, count * length, length)]
