"""``scripts/experiment.py``: models from scratch, trained and measured side by side. How stands in
config/experiment.yaml under `transformer_lm`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senri.cli.common import console, resumable, warn
from senri.config import ConfigManager
from senri.config.schema import TransformerLMConfig

if TYPE_CHECKING:
    from senri.data.corpus import Document
    from senri.data.haystack import Stretch
    from senri.data.packing import PackedTexts, TokenStream
    from senri.data.reversal import Pair
    from senri.evaluation.scratch_report import Result
    from senri.training.lm import LMSettings

RESULT = "result.json"


@dataclass(frozen=True)
class Material:
    """What all models are trained and measured on."""

    tokenizer: Any
    stream: TokenStream  # to train on
    texts: list[Stretch]  # held out
    facts: dict[str, list[Pair]]
    identity: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the four options and run; exit status 1 and one line on stderr for what the user can mend."""
    from senri.lm import MODELS

    parser = argparse.ArgumentParser(
        description="Train models from scratch and compare them: perplexity of long texts, what the memory does, the "
        "reversal curse, speed, state. Everything else stands in config/experiment.yaml under transformer_lm. Ctrl-C "
        "stops; the same command goes on."
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL",
                        help=f"of: {', '.join(MODELS)} [default: all]")  # fmt: skip
    parser.add_argument("--samples", type=_positive(int), help="training samples [default: transformer_lm.training]")
    parser.add_argument("--epochs", type=_positive(int), help="times each is trained on [default: as configured]")
    parser.add_argument("--lr", type=_positive(float), help="highest learning rate [default: as configured]")
    asked = parser.parse_args(arguments)
    with resumable():
        run(ConfigManager(), list(dict.fromkeys(asked.models)), asked.samples, asked.epochs, asked.lr)


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def run(
    config: ConfigManager,
    models: list[str],
    samples: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Path:
    """Train and measure each model with each seed, or go on with it; write the report; returns its folder."""
    check_packages()
    started, lm = time.perf_counter(), config.experiment.transformer_lm
    changes = {"samples": samples, "epochs": epochs, "learning_rate": learning_rate}
    training = lm.training.model_copy(update={k: v for k, v in changes.items() if v is not None})
    lm = lm.model_copy(update={"training": training})
    _check_bf16(training.bf16)
    material = prepare(config, lm)
    folder = _parent(config) / _folder_name(lm, material)
    console.print(f"results go to {folder}")
    results = []
    for seed in dict.fromkeys(lm.seeds):
        data = pack(lm, material, seed)
        for name in models:
            results.append(one(lm, material, data, name, seed, folder / f"{name}-seed{seed}"))
    write(lm, material, results, folder)
    console.print(f"{time.perf_counter() - started:,.0f} s")
    return folder


def _parent(config: ConfigManager) -> Path:
    return Path(config.experiment.output_dir) / "transformer_lm"


def check_packages() -> None:
    """Raises ValueError, naming what to install."""
    try:
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the experiment needs {error.name}: pip install 'senri[eval,train]'") from None


def _check_bf16(bf16: bool) -> None:
    import torch

    from senri.hf.base import resolve_dtype

    if bf16 and resolve_dtype("auto") != torch.bfloat16:
        warn("this processor is slow at bfloat16: set transformer_lm.training.bf16 of experiment.yaml to false")


# what is trained on and measured -----------------------------------------------------------------------------


def prepare(config: ConfigManager, lm: TransformerLMConfig) -> Material:
    """Texts, vocabulary and facts; nothing of what is measured on is trained on."""
    from random import Random

    from senri.data.corpus import beginnings, check_disjoint, load_documents, split_documents
    from senri.data.haystack import BookHaystack
    from senri.data.packing import load_hub_documents, token_stream
    from senri.data.reversal import fact_sets
    from senri.hf.memory_file import tokenizer_fingerprint

    every = load_documents(lm.data) if lm.dataset is None else load_hub_documents(lm.dataset, lm.dataset_texts)
    if lm.held_out:
        documents, held_out = every, load_documents(lm.held_out)
        check_disjoint(held_out, [d.digest for d in documents], "data of experiment.yaml")
    else:
        documents, held_out = (split_documents(every, part) for part in ("training", "evaluation"))
    tokenizer = vocabulary(lm, documents, _parent(config))
    with console.status("cutting the texts into tokens ..."):
        # twice of what the samples take, at 4 characters a token: tokenizing is slow
        wanted = lm.training.samples * lm.training.segments * lm.training.segment_length
        stream = token_stream(beginnings(documents, 8 * wanted), tokenizer)
    console.print(
        f"{len(documents)} texts to train on, of them {len(stream.ids) / 1e6:.1f}M tokens of a vocabulary of "
        f"{len(tokenizer):,}"
    )
    evaluation = lm.evaluation
    texts = BookHaystack(held_out, tokenizer).disjoint(
        evaluation.length, evaluation.samples, Random(f"{config.experiment.seed}/transformer_lm")
    )
    identity = {
        "model": "transformer_lm",
        "data_digests": sorted({d.digest for d in documents}),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "samples": lm.training.samples,
        "reversal": lm.reversal.model_dump(),
    }
    return Material(tokenizer, stream, texts, fact_sets(lm.reversal.folder), identity)


def vocabulary(lm: TransformerLMConfig, documents: list[Document], parent: Path) -> Any:
    """The tokenizer that is named, or one learned from the documents; it is kept, for another try may give another."""
    from senri.data.vocabulary import load_tokenizer, train_tokenizer
    from senri.hf.base import new_folder

    if lm.tokenizer != "trained":
        return load_tokenizer(lm.tokenizer)
    what = json.dumps([lm.vocab_size, sorted(document.digest for document in documents)])
    target = parent / f"vocabulary-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    if not target.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        with console.status("making the vocabulary ..."), new_folder(target) as scratch:
            train_tokenizer(documents, lm.vocab_size).save_pretrained(scratch)
    return load_tokenizer(target)


def pack(lm: TransformerLMConfig, material: Material, seed: int) -> PackedTexts:
    """The samples of one seed."""
    from senri.data.packing import PackedTexts, forward_sentences, pack_facts

    length = lm.training.segments * lm.training.segment_length
    facts = [pair for pairs in material.facts.values() for pair in pairs]
    told = pack_facts(forward_sentences(facts, lm.reversal.repeats, seed), material.tokenizer, length)
    return PackedTexts(material.stream, length, lm.training.samples, told, seed)


def _folder_name(lm: TransformerLMConfig, material: Material) -> str:
    """The same for the same training of all models, whatever is measured and with whichever seeds."""
    from senri.identity import run_name

    parts = ("model", "memory", "infini", "multi_memory", "hierarchical", "training")
    return run_name({**material.identity, **{f"{part} of all": getattr(lm, part).model_dump() for part in parts}})


def lm_settings(lm: TransformerLMConfig, seed: int) -> LMSettings:
    """What the trainer takes."""
    from senri.training.lm import LMSettings

    return LMSettings(**lm.training.model_dump(exclude={"samples"}), seed=seed)


# one model ---------------------------------------------------------------------------------------------------


def one(lm: TransformerLMConfig, material: Material, data: PackedTexts, name: str, seed: int, folder: Path) -> Result:
    """Train a model, or go on with it, and measure it; what is measured already is read back."""
    import torch

    from senri.evaluation.scratch import LMEvaluation, measure
    from senri.evaluation.scratch_report import Result
    from senri.lm import create_model
    from senri.training.interrupt import TrainingStopped
    from senri.training.lm import LMTrainer, lm_identity
    from senri.training.log import LOG

    settings = lm_settings(lm, seed)
    torch.manual_seed(seed)
    model = create_model(name, vocab_size=len(material.tokenizer), **lm.options(name))
    display = Display(f"{name}, seed {seed}")
    identity = lm_identity(model, settings, material.identity)
    trainer = LMTrainer(model, data, settings, folder, identity, show=display.step, say=console.print)
    display.steps = trainer.max_steps
    try:
        trainer.train()
    except TrainingStopped as stop:
        again = shlex.join(["python", *sys.argv])
        warn(f"interrupted; all {stop.step} steps are kept in {folder}, go on with: {again}")
        sys.exit(130)
    how = _measured_how(lm, material)
    path = folder / RESULT
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("how") != how:
        evaluation = LMEvaluation(**lm.evaluation.model_dump())
        measured = measure(
            model, material.tokenizer, material.texts, material.facts, settings.segment_length, evaluation, display.line
        )
        entries = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
        training = {
            "tokens": sum(entry["tokens"] for entry in entries),
            "seconds": sum(entry["seconds"] for entry in entries),
            "tokens_per_step": settings.batch_size * settings.length,
            "losses": [entry["loss"] for entry in entries],
        }
        known = {"how": how, "model": name, "seed": seed, "training": training, "measured": measured}
        _write_json(path, known)
    return Result(name, seed, known["training"], known["measured"])


def _measured_how(lm: TransformerLMConfig, material: Material) -> dict[str, Any]:
    """All that decides what a trained model is measured on, as JSON gives it back."""
    texts = hashlib.sha256(b"".join(text.ids.tobytes() for text in material.texts)).hexdigest()
    return {"evaluation": lm.evaluation.model_dump(), "texts": texts}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from senri.files import write_atomically

    write_atomically(path, (json.dumps(content, allow_nan=False) + "\n").encode())


def write(lm: TransformerLMConfig, material: Material, results: list[Result], folder: Path) -> None:
    """The report of all models, on disk and on the terminal."""
    from senri.cli.eval import show
    from senri.evaluation.report import Report
    from senri.evaluation.run import versions
    from senri.evaluation.scratch_report import sections
    from senri.evaluation.write import write_report

    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "texts trained on": len(material.stream.names),
        "texts read": ", ".join(sorted({text.source for text in material.texts})),
        "vocabulary": len(material.tokenizer),
        **versions(),
    }
    length = lm.training.segments * lm.training.segment_length
    report = Report("Models from scratch", facts, tuple(sections(results, length)), lm.model_dump(mode="json"))
    write_report(report, folder)
    show(report, folder)


class Display:
    """Where one model stands: one line that renews itself on a terminal, a line now and then elsewhere."""

    EVERY = 10.0  # seconds between two lines outside a terminal

    def __init__(self, name: str) -> None:
        self.name, self.steps, self.last = name, 0, 0.0

    def step(self, entry: dict[str, Any]) -> None:
        """Show a step of training."""
        left = (self.steps - entry["step"]) * entry["seconds"]
        self.line(
            f"step {entry['step']:,}/{self.steps:,}   loss {entry['loss']:.3f}   "
            f"{entry['tokens_per_second']:,.0f} tokens/s   about {left:,.0f} s left",
            last=entry["step"] == self.steps,
        )

    def line(self, text: str, last: bool = False) -> None:
        """Show what was just done."""
        now = time.monotonic()
        if console.is_terminal:
            line = f"{self.name}: {text}"[: console.width - 1]
            console.print(line.ljust(console.width - 1), end="\n" if last else "\r")
        elif last or now - self.last > self.EVERY:
            console.print(f"{self.name}: {text}")
        else:
            return
        self.last = now
