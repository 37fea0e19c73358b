"""``senri train``: teaches the memory of the configured model what to keep and how to find it again."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from senri.cli.common import console, quiet_transformers, warn
from senri.cli.train_unigram import train_unigram
from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.data.corpus import Document
    from senri.data.mix import TrainingMix
    from senri.data.training_sample import TrainingSample
    from senri.training.settings import TrainingSettings

NAME = "train"
PROBED = 8  # held-out samples with something to recall
PROBE_SEED = 1  # beyond the configured one
CALIBRATION_TEXTS = 4  # stretches of the training texts that calibration reads


def command(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the run and its adapter go. [default: in runs/]"),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="PATH", help="A text or folder instead of training.yaml's.")
    ] = None,
) -> None:
    """Train the memory of the configured model. How stands in config/training.yaml.

    Ctrl-C stops; the same command goes on from what was saved. Several processes: accelerate launch
    scripts/train.py.
    """
    config = ConfigManager()
    _check_packages(config)
    train(config, output, data or [])


def _check_packages(config: ConfigManager) -> None:
    try:
        import accelerate  # noqa: F401

        if config.training.trainable == "memory+lora":
            import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"senri train needs {error.name}: pip install 'senri[train]'") from None


def train(config: ConfigManager, output: Path | None, data: list[str]) -> Path:
    """Train as the configuration says, or go on with it; returns the path of what was learned.

    Args:
        data: texts and folders instead of the configured ones.
    """
    from senri.data.corpus import split_documents
    from senri.hf.base import find_adapter, is_senri, load_model, load_unconverted
    from senri.identity import run_name
    from senri.training.checkpoint import check_folder
    from senri.training.interrupt import TrainingStopped
    from senri.training.trainer import Trainer, processes, run_identity

    if config.training.method == "unigram":
        return train_unigram(config, output, data)
    if config.training.method == "features":
        return train_features(config, output, data)
    started = time.perf_counter()
    settings = make_settings(config)
    documents = training_texts(config, data)
    texts = split_documents(documents, "training")
    adapter = find_adapter(config.base_model_name, config.training.init_adapter)
    check_adapter(adapter)
    calibrates = adapter is None and not is_senri(config.base_model_name)
    with console.status("loading the model ..."):
        quiet_transformers()
        model, tokenizer = load_model(
            config.base_model_name, "float32", config.training.init_adapter, **config.senri_overrides()
        )
        teacher = load_unconverted(config.base_model_name) if settings.distillation_weight else None
    window = model.config.sliding_window_size
    mix = make_mix(config, texts, tokenizer, settings.max_length, window, settings.seed)
    tokens = config.experiment.calibration.num_tokens if calibrates and model.config.num_memory_layers else None
    facts = {**about_model(config, model, tokenizer), **about_data(config, texts), "calibration_tokens": tokens}
    identity = run_identity(settings, facts)
    folder = output or Path(config.experiment.output_dir) / "train" / run_name(identity)
    if processes().is_main_process:  # before the long preparations; others would see it being made
        check_folder(folder, identity)
    held_out = split_documents(documents, "evaluation")
    probed = make_mix(config, held_out, tokenizer, settings.max_length, window, settings.seed + PROBE_SEED)
    display = TrainingDisplay(settings.max_steps)
    trainer = Trainer(
        model,
        settings,
        mix,
        folder,
        identity,
        probed=probe_samples(probed),
        calibration=None if tokens is None else calibration_ids(mix, tokens, window, settings.seed),
        teacher=teacher,
        notes=notes_of(config, texts, adapter),
        show=display.show,
        say=console.print,
    )
    trainer.say(f"the run goes to {folder}")
    try:
        path = trainer.train()
    except TrainingStopped as stop:
        if trainer.main:
            again = shlex.join(["senri", *sys.argv[1:]])
            warn(f"interrupted; all {stop.step} steps are kept in {folder}, go on with: {again}")
        raise typer.Exit(130) from None
    if trainer.main:
        if path.is_dir():
            tokenizer.save_pretrained(path)
        use = "base_model_name" if path.is_dir() else "adapter"
        console.print(f"{time.perf_counter() - started:,.0f} s; saved {path}: name it as {use} in config/model.yaml")
    return path


def train_features(config: ConfigManager, output: Path | None, data: list[str]) -> Path:
    """As :func:`train`, on cached features."""
    from senri.data.corpus import split_documents
    from senri.data.pages import RecallPages
    from senri.hf.base import find_adapter, is_senri, load_model, resolve_dtype
    from senri.identity import run_name
    from senri.training.checkpoint import check_folder
    from senri.training.feature_trainer import train_on_features
    from senri.training.fit import check_model
    from senri.training.settings import FeatureSettings
    from senri.training.trainer import processes

    training, started = config.training, time.perf_counter()
    if training.trainable != "memory":
        raise ValueError(f"method features trains the memory alone, not {training.trainable}: set method to bptt")
    if processes().num_processes > 1:
        raise ValueError("method features runs in one process: start it with senri train, or set method to bptt")
    settings = FeatureSettings(**training.features.model_dump())
    documents = training_texts(config, data)
    texts = split_documents(documents, "training")
    adapter = find_adapter(config.base_model_name, training.init_adapter)
    check_adapter(adapter)
    calibrates = adapter is None and not is_senri(config.base_model_name)
    with console.status("loading the model ..."):
        quiet_transformers()
        model, tokenizer = load_model(
            config.base_model_name, "float32", training.init_adapter, **config.senri_overrides()
        )
    check_model(model)
    pages, probed = (
        RecallPages(
            part,
            tokenizer,
            size=settings.page_size,
            pages=settings.pages,
            questions=settings.questions,
            chat=training.chat_ratio,
            seed=seed,
        )
        for part, seed in (
            (texts, training.seed),
            (split_documents(documents, "evaluation"), training.seed + PROBE_SEED),
        )
    )
    facts = {
        **about_model(config, model, tokenizer),
        **about_data(config, texts),
        "features": training.features.model_dump(),
        "dtype": str(resolve_dtype(config.model.dtype)),
        "seed": training.seed,
    }
    folder = output or Path(config.experiment.output_dir) / "train" / run_name(facts)
    check_folder(folder, facts)
    console.print(f"the run goes to {folder}")
    display = FeatureDisplay()
    try:
        path = train_on_features(
            model,
            pages,
            settings,
            training.seed,
            folder,
            facts,
            calibrates=calibrates,
            dtype=resolve_dtype(config.model.dtype),
            notes=notes_of(config, texts, adapter),
            probed=probed,
            probe_steps=training.probe_steps,
            show=display.show,
            say=console.print,
        )
    except KeyboardInterrupt:
        again = shlex.join(["senri", *sys.argv[1:]])
        warn(f"interrupted; what was saved stands in {folder}, go on with: {again}")
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - started
    console.print(f"{seconds:,.0f} s; saved {path}: name it as adapter in config/model.yaml")
    return path


def training_texts(config: ConfigManager, data: list[str]) -> list[Document]:
    """The texts named in ``data``, or what training.yaml names."""
    from senri.data.corpus import load_documents
    from senri.data.packing import load_hub_documents

    training = config.training
    if not data and training.dataset is not None:
        with console.status(f"loading {training.dataset} ..."):
            return load_hub_documents(training.dataset, training.dataset_texts)
    return load_documents(data or training.data)


def make_settings(config: ConfigManager) -> TrainingSettings:
    """What the trainer takes of training.yaml."""
    from senri.training.settings import Stage, TrainingSettings

    values = {field.name: getattr(config.training, field.name) for field in fields(TrainingSettings)}
    values["curriculum"] = tuple(Stage(stage.max_length, stage.steps) for stage in config.training.curriculum)
    return TrainingSettings(**values)


def make_mix(
    config: ConfigManager, documents: list[Document], tokenizer: Any, length: int, window: int, seed: int
) -> TrainingMix:
    """The training data of ``documents`` as training.yaml mixes it."""
    from senri.data.babilong import TASKS, load_babi
    from senri.data.mix import TrainingMix

    training = config.training
    babi = None
    if training.recall_ratios.babi and training.babi_folder is not None:
        folder = Path(training.babi_folder)
        found = [task for task in TASKS if any(folder.glob(f"{task}_*_train.txt"))]
        babi = {task: load_babi(folder, task, "train") for task in found}
    return TrainingMix(
        documents,
        tokenizer,
        length=length,
        window=window,
        ratios=training.part_ratios,
        seed=seed,
        chat=training.chat_ratio,
        babi=babi,
    )


def probe_samples(mix: TrainingMix) -> list[TrainingSample]:
    """The first samples that ask for something; of a mix that never does, the first ones."""
    from senri.training.probe import answers

    if mix.parts == ["book"]:
        return [mix[i] for i in range(PROBED)]
    samples = (mix[i] for i in range(100 * PROBED))
    return [sample for _, sample in zip(range(PROBED), (s for s in samples if answers(s)), strict=False)]


def calibration_ids(mix: TrainingMix, num_tokens: int, window: int, seed: int) -> list[int]:
    """Token ids of some stretches of the training texts: for the statistics, and a passage that is read twice."""
    from random import Random

    from senri.hf.calibrate import REPEAT_BEYOND

    rng, size = Random(seed), -(-(num_tokens + window + REPEAT_BEYOND) // CALIBRATION_TEXTS)
    return [int(i) for _ in range(CALIBRATION_TEXTS) for i in mix.books.stretch(size, rng).ids]


def about_model(config: ConfigManager, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The part of a run's identity that says where it starts."""
    from senri.files import fingerprint
    from senri.hf.adapter import CONFIG_FIELDS, base_fingerprint
    from senri.hf.memory_file import tokenizer_fingerprint

    return {
        "model": config.base_model_name,
        "init_adapter": config.training.init_adapter,
        "base_fingerprint": base_fingerprint(model),
        "fingerprint": fingerprint(model.named_parameters()),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "memory": {name: getattr(model.config, name) for name in (*CONFIG_FIELDS, "num_sink_tokens")},
    }


def about_data(config: ConfigManager, documents: list[Document]) -> dict[str, Any]:
    """The part of a run's identity that says what it reads."""
    return {
        "ratios": config.training.part_ratios,
        "chat_ratio": config.training.chat_ratio,
        "babi_folder": config.training.babi_folder,
        "data_digests": sorted({document.digest for document in documents}),
    }


def notes_of(config: ConfigManager, documents: list[Document], adapter: Path | None) -> dict[str, Any]:
    """What an adapter says about its training; evaluation looks its texts up in it.

    Args:
        adapter: where the training started. Its texts count as trained on, and its own notes are kept as ``before``.
    """
    from senri.hf.adapter import read_adapter_header

    digests = {document.digest for document in documents}
    parts = {document.digest for document in documents if document.part_of}
    before = {} if adapter is None else read_adapter_header(adapter)["notes"]
    earlier, earlier_parts = (set(before.get(name, ())) for name in ("data_digests", "data_parts"))
    whole = (digests - parts) | (earlier - earlier_parts)
    return {
        "base": config.base_model_name,
        "command": shlex.join(["senri", *sys.argv[1:]]),
        "config": config.training.model_dump(mode="json"),
        "data": sorted({*(document.name for document in documents), *before.get("data", ())}),
        "data_digests": sorted(digests | earlier),
        # of these only the first part was trained on, and the rest is kept for evaluation
        "data_parts": sorted((parts | earlier_parts) - whole),
        **({"before": before} if before else {}),
    }


def check_adapter(path: Path | None) -> None:
    """Raises ValueError where a training cannot start from this adapter."""
    from senri.hf.adapter import has_lora, read_adapter_header

    if path is not None:
        read_adapter_header(path)
        if has_lora(path):
            raise ValueError(
                f"{path} has LoRA weights, which cannot be trained further: start from another init_adapter"
            )


class TrainingDisplay:
    """Where the training stands: one line that renews itself on a terminal, a line now and then elsewhere."""

    EVERY = 10.0  # seconds between two lines outside a terminal

    def __init__(self, steps: int) -> None:
        self.steps, self.last, self.probe = steps, 0.0, ""

    def show(self, entry: dict[str, Any]) -> None:
        """Show a step."""
        if probe := entry.get("probe"):
            console.print(self._whole(f"step {entry['step']}: {probe_line(probe)}"))
        now = time.monotonic()
        if console.is_terminal:
            console.print(self._whole(self.line(entry)), end="\r")
        elif now - self.last > self.EVERY or entry["step"] == self.steps:
            console.print(self.line(entry))
        else:
            return
        self.last = now

    def line(self, entry: dict[str, Any]) -> str:
        """One step in words."""
        losses = " ".join(f"{task} {loss:.3f}" for task, loss in entry["losses"].items() if loss is not None)
        gates = [f"{name} {entry[key]:.2f}" for name, key in _GATES.items() if entry[key] is not None]
        speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
        return "   ".join([f"step {entry['step']}/{self.steps}", f"loss {losses}", *gates, speed])

    def _whole(self, text: str) -> str:
        return text[: console.width - 1].ljust(console.width - 1) if console.is_terminal else text


class FeatureDisplay:
    """Where a training on features stands: a line now and then."""

    EVERY = 10.0  # seconds between two lines of one stage

    def __init__(self) -> None:
        self.stage, self.last = "", 0.0

    def show(self, entry: dict[str, Any]) -> None:
        """Show what was seen."""
        now = time.monotonic()
        if entry["stage"] == self.stage and now - self.last < self.EVERY:
            return
        self.stage, self.last = entry["stage"], now
        if entry["stage"] == "features":
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
            part = f"part {entry['part']} of {entry['parts']}, {entry['step']:,} of {entry['of']:,} tokens"
            console.print(f"reading pages and questions: {part}   {speed}")
            return
        if entry["stage"] == "probe":
            console.print(held_out_line(entry))
            return
        losses = [f"{n} {v:.4f}" for n, v in entry.items() if n not in ("stage", "step", "seconds")]
        console.print("   ".join([f"{entry['stage']}: step {entry['step']}", *losses, f"{entry['seconds']:,.0f} s"]))


def held_out_line(entry: dict[str, Any]) -> str:
    """A probe of a training on features in words."""
    from senri.training.fit_probe import LEFT_ALONE, PLAIN, RIGHT, VALUES

    def some(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {entry[name]:.0%}" for name in names if name in entry)

    written = f"written {entry[VALUES]:.0%} of values, {entry[PLAIN]:.2%} of plain tokens"
    return f"held-out pages: step {entry['step']}   {some(RIGHT)}; left alone: {some(LEFT_ALONE)}; {written}"


_GATES = {"write": "write_plain", "write asked": "write_asked", "read": "read_gate"}


def probe_line(probe: dict[str, float | None]) -> str:
    """A probe in words."""
    parts = []
    if probe["answers"] is not None:
        parts.append(f"recalls {probe['answers']:.0%} of answers, {probe['tokens']:.0%} of their tokens")
        parts.append(f"memory emptied {probe['answers_off']:.0%}, {probe['tokens_off']:.0%}")
    for name, key in (("plain", "write_plain"), ("asked", "write_asked")):
        if probe[key] is not None:
            parts.append(f"writes {probe[key]:.2f} of {name} tokens")
    return "; ".join(parts) or "nothing to recall in this mix"
