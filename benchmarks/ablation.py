"""Small trainings side by side: one thing of the shipped recipe changed at a time.

``python benchmarks/ablation.py TRAIN DEV OUT [NAME ...]``. TRAIN, DEV: folders of different books; OUT: where features
(two GB) and results are kept, so that it can go on; NAME: some of the rows only. Each row is trained as ``senri train``
trains method features, on fewer pages and with fewer steps, and asked on texts that are put together from DEV's pages
as training's are: an answer is right when every token of its value is, each after the right ones before it. Another
configuration or other books: another OUT.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import transformers

from senri.config import ConfigManager
from senri.data.corpus import load_documents
from senri.data.pages import RecallPages
from senri.evaluation.statistics import share
from senri.hf.base import load_model
from senri.hf.modeling_senri import SenriForCausalLM
from senri.training.features import Features, collect, load_features, save_features
from senri.training.fit import Reading, fit_write_gates, prepare
from senri.training.settings import FeatureSettings

STREAMS, DEV_STREAMS, TEXTS = 24, 9, 120  # a third of the streams has no facts
GATE_STEPS, STEPS = 500, 200
SEED, DEV_SEED = 0, 1000
ANSWERS = ("right", "overwritten", "untold", "unrelated", "messages")  # that are counted
ALL_LAYERS = (6, 10, 14, 18, 22)  # whose inputs one reading keeps


class Row(NamedTuple):
    """What differs from the shipped recipe."""

    layers: tuple[int, ...] = (14,)
    window: int = 1024
    rate: float = 1.0  # times the learning rates of reading


ROWS = {
    "as shipped: layer 14, window 1,024": Row(),
    "layer 6": Row(layers=(6,)),
    "layer 10": Row(layers=(10,)),
    "layer 18": Row(layers=(18,)),
    "layer 22": Row(layers=(22,)),
    "layers 6 and 10, a memory each": Row(layers=(6, 10)),
    "layers 10 and 14, a memory each": Row(layers=(10, 14)),
    "layers 10 and 18, a memory each": Row(layers=(10, 18)),
    "window 128": Row(window=128),
    "window 256": Row(window=256),
    "window 512": Row(window=512),
    "learning rates / 3": Row(rate=1 / 3),
    "learning rates x 3": Row(rate=3.0),
}


class Bench:
    """Features by window, and the rows that are trained on them."""

    def __init__(self, train: str, dev: str, out: Path) -> None:
        self.folders, self.out, self.config = {"train": train, "dev": dev}, out, ConfigManager()
        settings = FeatureSettings(**self.config.training.features.model_dump())
        self.settings = dataclasses.replace(settings, gate_steps=GATE_STEPS, steps=STEPS)
        out.mkdir(parents=True, exist_ok=True)

    def model(self, row: Row) -> tuple[SenriForCausalLM, Any]:
        """The base with this row's memories, untrained."""
        gaps = {b - a for a, b in pairwise(row.layers)} or {1}
        assert len(gaps) == 1, "memory layers are evenly spaced"
        changed = {
            "num_memory_layers": len(row.layers), "first_memory_layer": row.layers[0],
            "memory_layer_interval": min(gaps), "sliding_window_size": row.window,
            "unigram_cache": False,
        }  # fmt: skip
        overrides = {**self.config.senri_overrides(), **changed}
        model, tokenizer = load_model(self.config.base_model_name, "float32", "none", **overrides)
        return model, tokenizer

    def features(self, part: str, row: Row) -> Features:
        """Of the training or the dev pages, as this row's window reads them; of its layers alone."""
        layers = ALL_LAYERS if row.window == Row().window else row.layers
        path = self.out / f"{part}-{row.window}.pt"
        if not path.is_file():
            model, tokenizer = self.model(row._replace(layers=layers))
            seed, streams = (SEED, STREAMS) if part == "train" else (DEV_SEED, DEV_STREAMS)
            source = RecallPages(
                load_documents([self.folders[part]]), tokenizer, size=self.settings.page_size,
                pages=self.settings.pages, questions=1, chat=self.config.training.chat_ratio, seed=seed,
            )  # fmt: skip
            save_features(collect(model, source, range(streams), batch=4), path)
        found = load_features(path)
        found.hidden = {i: found.hidden[i] for i in row.layers}
        for question in found.asked:
            question.hidden = {i: question.hidden[i] for i in row.layers}
        return found

    def run(self, name: str) -> dict[str, Any]:
        """Train one row and ask it."""
        row, started = ROWS[name], time.perf_counter()
        model, _ = self.model(row)
        settings = dataclasses.replace(
            self.settings,
            learning_rate=self.settings.learning_rate * row.rate,
            gate_learning_rate=self.settings.gate_learning_rate * row.rate,
        )
        features = self.features("train", row)
        prepare(model, features)
        fit_write_gates(model, features, settings, SEED)
        model.train()
        Reading(model, features, settings, SEED).train(lambda entry: None)
        found = ask(Reading(model.eval(), self.features("dev", row), settings, SEED))
        return {"name": name, **found, "seconds": round(time.perf_counter() - started)}


@torch.no_grad()
def ask(reading: Reading) -> dict[str, tuple[int, int]]:
    """Answers right and asked, of all facts and of those told again; answers that the memory should leave and leaves,
    to facts not told, to anything else and to messages that tell a fact; plain tokens written, and tokens of values.
    """
    count = {name: [0, 0] for name in ANSWERS}
    for number in range(TEXTS):
        reading.rng = Random(f"{DEV_SEED}/{number}")
        text = reading.draw()
        questions = [*text.asked, *text.unknown]
        ((added,), _), sizes = reading.added([text]), [len(question.target) for question in questions]
        added = added[: sum(sizes)].split(sizes)
        for place, (question, more) in enumerate(zip(questions, added, strict=True)):
            final = question.final.float()
            now, before = ((x @ reading.embedding.T).argmax(-1) for x in (final + more, final))
            if place >= len(text.asked):
                kind = "untold" if not question.left_to_base else "messages" if question.page >= 0 else "unrelated"
                kinds, good = [kind], bool((now == before).all())
            elif question.fact < 0:
                continue
            else:
                facts = reading.features.facts[question.page]
                kinds = ["right", *(["overwritten"] if facts.count(facts[question.fact]) > 1 else [])]
                value = slice(len(question.target) - 2)  # the full stop, and the line's end
                good = bool((now == question.target)[value].all())
            for kind in kinds:
                count[kind][0] += good
                count[kind][1] += 1
    features, gates = reading.features, reading.pairs.values()
    kinds = {"plain tokens written": features.write == 0, "value tokens written": features.write == 1}
    for name, mask in kinds.items():
        written = torch.zeros_like(mask)
        for pairs in gates:
            written[torch.cat([rows for rows, _ in pairs])] = True
        count[name] = [int((written & mask).sum()), int(mask.sum())]
    return {name: (good, total) for name, (good, total) in count.items()}


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown; shares of answers with 95 % Wilson intervals."""

    def shown(pair: tuple[int, int]) -> str:
        found = share(*pair)
        return f"{pair[0]} of {pair[1]} [{found.low:.0%}, {found.high:.0%}]"

    left = " | ".join(f"{name}: left alone" for name in ANSWERS[2:])
    lines = [f"| | right | overwritten | {left} | plain tokens written | of values |", f"|---{'|---:' * 7}|"]
    for result in results:
        plain, values = (result[f"{kind} tokens written"] for kind in ("plain", "value"))
        rates = f"{plain[0] / plain[1]:.2%} | {values[0] / values[1]:.0%}"
        lines.append(f"| {result['name']} | {' | '.join(shown(result[name]) for name in ANSWERS)} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    """All rows, or those named; kept as they come."""
    if len(sys.argv) < 4 or not {*sys.argv[4:]} <= {*ROWS}:
        sys.exit(f"{__doc__}\nRows: {', '.join(ROWS)}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    log = bench.out / "results.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for name in sys.argv[4:] or ROWS:
        if name not in {result["name"] for result in known}:
            known.append(bench.run(name))
            with log.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(f"{name}: {known[-1]}", file=sys.stderr, flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
