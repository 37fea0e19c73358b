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
from typing import Any, NamedTuple

import transformers

from senri.config import ConfigManager
from senri.data.corpus import load_documents
from senri.data.pages import RecallPages
from senri.evaluation.statistics import share
from senri.hf.base import load_model, resolve_dtype
from senri.hf.modeling_senri import SenriForCausalLM
from senri.training.features import Features, collect, load_features, save_features
from senri.training.fit import Reading, fit_write_gates, prepare
from senri.training.fit_probe import LEFT_ALONE, PLAIN, RIGHT, VALUES, count_answers
from senri.training.settings import FeatureSettings

STREAMS, DEV_STREAMS, TEXTS = 24, 9, 120  # a third of the streams has no facts
GATE_STEPS, STEPS = 500, 200
SEED, DEV_SEED = 0, 1000
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
            model.to(resolve_dtype(self.config.model.dtype))
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
        dev = Reading(model.eval(), self.features("dev", row), settings, SEED)
        found = count_answers(dev, TEXTS, DEV_SEED)
        return {"name": name, **found, "seconds": round(time.perf_counter() - started)}


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown; shares of answers with 95 % Wilson intervals."""

    def shown(pair: tuple[int, int]) -> str:
        found = share(*pair)
        return f"{pair[0]} of {pair[1]} [{found.low:.0%}, {found.high:.0%}]"

    columns = [*RIGHT, *(f"{name}: left alone" for name in LEFT_ALONE), "plain tokens written", "of values"]
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for result in results:
        plain, values = result[PLAIN], result[VALUES]
        rates = f"{plain[0] / plain[1]:.2%} | {values[0] / values[1]:.0%}"
        lines.append(
            f"| {result['name']} | {' | '.join(shown(result[name]) for name in (*RIGHT, *LEFT_ALONE))} | {rates} |"
        )
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
