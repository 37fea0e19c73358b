"""How much the memory holds: associations told one after another, then asked for (MQAR; Arora et al. 2023,
arXiv:2312.04927), here in sentences. Reported as recall, and as bits recalled per number of the memory's state.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from senri.data.haystack import encode
from senri.data.needle_tasks import KINDS
from senri.data.samples import SampleError
from senri.data.words import words_of
from senri.evaluation.readers import SenriReader
from senri.evaluation.recall import Record, share_series
from senri.evaluation.report import Curves, Section, Series, Table
from senri.evaluation.runner import MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY, STRANGER
from senri.evaluation.statistics import Share, separate, share
from senri.evaluation.suites import Bench, Sources
from senri.hf.cache import SenriCache
from senri.memory.state import named_tensors

ARMS = (MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY)
FACT = " The word of {key} is {value}."
ASK = " The word of {key} is"
Told = tuple[np.ndarray, list[str], list[int], int]  # ids to read, names, index of each one's word, tokens of the pairs
CHOICES = 256  # different values: a right answer is worth 8 bits
ROWS = 16  # questions asked at once


def recalled_bits(p: float, choices: int) -> float:
    """Least mutual information, in bits, between the value told and the value answered when a share ``p`` is right
    (Fano's inequality with errors spread evenly); 0 at chance and below.
    """
    if p <= 1 / choices:
        return 0.0
    wrong = (1 - p) * math.log2((1 - p) / (choices - 1)) if p < 1 else 0.0
    return math.log2(choices) + p * math.log2(p) + wrong


@dataclass(frozen=True)
class CapacitySuite:
    """``pairs`` associations, a window of other text, then ``questions`` of them asked."""

    sources: Sources
    pairs: tuple[int, ...]
    questions: int
    samples: int
    name: str = "capacity"

    def run(self, bench: Bench) -> None:
        """See :class:`senri.evaluation.suites.Suite`."""
        for pairs in self.pairs:
            for sample in range(self.samples):
                key = f"{self.name}/{pairs}/{sample}"
                told = self._told(pairs, sample, bench.reader.window or 1)
                digest = hashlib.sha256(told[0].tobytes()).hexdigest()
                if (known := bench.log.records.get(key)) is not None:
                    if known["prompt_sha256"] != digest:
                        raise ValueError(f"{bench.log.path} holds another text as {key}: name another folder with -o")
                else:
                    record = {"key": key, "pairs": pairs, "prompt_sha256": digest}
                    bench.log.add({**record, **self._measure(bench, pairs, sample, told)})
                    bench.progress(f"{self.name}: {pairs} pairs, sample {sample + 1} of {self.samples}")

    def check(self) -> None:
        """See :class:`senri.evaluation.suites.Suite`."""
        for pairs in self.pairs:
            self._told(pairs, 0, 1)

    def _told(self, pairs: int, sample: int, window: int) -> Told:
        rng = Random(f"{self.sources.seed}/capacity/{pairs}/{sample}")
        values = single_token_words(self.sources.tokenizer)
        keys = list(dict.fromkeys(KINDS["person"](rng) for _ in range(6 * pairs)))[:pairs]
        if len(keys) < pairs:
            raise SampleError(f"there are names for {len(keys):,} pairs, not for {pairs:,}: ask for fewer")
        told = [rng.randrange(CHOICES) for _ in keys]
        text = "".join(FACT.format(key=k, value=values[v][0]) for k, v in zip(keys, told, strict=True))
        facts = np.array(encode(self.sources.tokenizer, text), dtype=np.int32)
        # a window of other text: every pair is in the memory and none in sight
        return np.concatenate([facts, self.sources.books.stretch(window, rng).ids]), keys, told, len(facts)

    def _measure(self, bench: Bench, pairs: int, sample: int, made: Told) -> dict[str, Any]:
        reader = bench.reader
        assert isinstance(reader, SenriReader)
        ids, keys, told, size = made
        other_ids = self._told(pairs, STRANGER, reader.window or 1)[0]
        rng = Random(f"{self.sources.seed}/capacity/asked/{pairs}/{sample}")
        asked = sorted(rng.sample(range(pairs), min(self.questions, pairs)))
        prompts = [encode(self.sources.tokenizer, ASK.format(key=keys[i])) for i in asked]
        other = reader.memory_of(reader.read(other_ids, len(other_ids)))
        without = reader.read(ids, len(ids), memory=False)
        states = {
            MEMORY: reader.read(ids, len(ids)),
            MEMORY_OFF: without,
            OTHER_MEMORY: reader.with_memory_of(without, other),
            QUESTION_ONLY: reader.blank(),
        }
        candidates = [token for _, token in single_token_words(self.sources.tokenizer)]
        said = {arm: choose(reader, state, prompts, candidates) for arm, state in states.items()}
        right = [told[i] for i in asked]
        return {
            "n": len(asked),
            "tokens": size,
            "expected": right,
            "said": said,
            "arms": {arm: sum(a == b for a, b in zip(answers, right, strict=True)) for arm, answers in said.items()},
            "floats": memory_floats(reader),
        }

    def section(self, records: Sequence[Record], window: int | None) -> Section:
        """See :class:`senri.evaluation.suites.Suite`."""
        floats = records[0]["floats"]
        rows = []
        shares: dict[str, list[tuple[int, Share]]] = {arm: [] for arm in ARMS}
        for pairs in sorted({r["pairs"] for r in records}):
            mine = [r for r in records if r["pairs"] == pairs]
            n = sum(r["n"] for r in mine)
            found = {arm: share(sum(r["arms"][arm] for r in mine), n) for arm in ARMS}
            for arm in ARMS:
                shares[arm].append((pairs, found[arm]))
            on = found[MEMORY]
            bits = [pairs * recalled_bits(p, CHOICES) for p in (on.value, on.low, on.high)]
            # one that knows which words were told, and not whose, is right once in as many
            beats = all(separate(on, found[arm]) > 0 for arm in ARMS[1:]) and on.low > 1 / min(pairs, CHOICES)
            rows.append(
                (
                    pairs,
                    n,
                    len(mine),
                    *(f"{s.value:.0%} [{s.low:.0%}, {s.high:.0%}]" for s in found.values()),
                    bits[0],
                    f"{bits[0] / floats:.5f} [{bits[1] / floats:.5f}, {bits[2] / floats:.5f}]" if floats else None,
                    "recalls" if beats else "nothing shown",
                )
            )
        columns = ("pairs", "asked", "texts", *ARMS, "bits recalled", "bits per state number", "verdict")
        table = Table("Capacity", columns, tuple(rows), {"bits recalled": ",.0f"})
        chance = Series(
            "knows the words, not whose",
            tuple(float(p) for p, _ in shares[MEMORY]),
            tuple(1 / min(p, CHOICES) for p, _ in shares[MEMORY]),
            dashed=True,
        )
        figure = Curves(
            "capacity",
            f"Recall against pairs told ({floats:,} numbers in the memory)",
            "pairs told",
            "right values",
            (*(share_series(arm, points) for arm, points in shares.items()), chance),
            log_x=True,
            y_range=(0.0, 1.0),
        )
        text = (
            f"Each pair is a sentence with a name and one of {CHOICES} words; then a window of book text, so that no "
            "pair is in sight. The model chooses among the words. Bits are the least that this share of right choices "
            "can mean (Fano)."
        )
        return Section("Capacity", text, (), (table,), (figure,))


def single_token_words(tokenizer: Any) -> list[tuple[str, int]]:
    """``CHOICES`` nouns that are one token after a space, with that token, always the same ones."""
    found = []
    for word in words_of("noun"):
        ids = encode(tokenizer, f" {word}")
        if len(ids) == 1 and len(word) > 3:
            found.append((word, ids[0]))
    if len(found) < CHOICES:
        raise SampleError(f"this tokenizer has {len(found)} nouns of one token, and {CHOICES} are needed")
    return Random(0).sample(found, CHOICES)


@torch.no_grad()
def choose(
    reader: SenriReader, state: SenriCache, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
) -> list[int]:
    """For each prompt, asked from ``state`` on its own, the index of the likeliest of ``candidates`` (token ids)."""
    model = reader.model
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    out = [0] * len(prompts)
    for members in by_length.values():
        for start in range(0, len(members), ROWS):
            rows = members[start : start + ROWS]
            cache = SenriCache.concat([state] * len(rows))
            ids = torch.tensor([list(prompts[i]) for i in rows], device=model.device)
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            best = logits[:, list(candidates)].argmax(-1).tolist()
            for i, index in zip(rows, best, strict=True):
                out[i] = index
    return out


def memory_floats(reader: SenriReader) -> int:
    """Numbers in the matrices and normalisers of all memories of one text."""
    empty = reader.model.model.empty_state(1, reader.model.dtype)
    memories = [layer.memory.memory for layer in empty.layers if layer.memory is not None]
    return sum(t.numel() for m in memories for name, t in named_tensors(m).items() if name in ("M", "z"))
