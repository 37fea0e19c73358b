"""``senri train`` with ``method: unigram``: fits the unigram cache of an adapter."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from senri.cli.common import console, quiet_transformers
from senri.config import ConfigManager


def train_unigram(config: ConfigManager, output: Path | None, data: list[str]) -> Path:
    """Fit the unigram cache on top of ``init_adapter``; returns the new adapter's path.

    Raises:
        ValueError: no adapter to start from.
    """
    from senri.cli.train import about_model, check_adapter, notes_of, training_texts
    from senri.data.corpus import split_documents
    from senri.hf.adapter import save_adapter
    from senri.hf.base import find_adapter, load_model
    from senri.identity import run_name
    from senri.training import checkpoint
    from senri.training.trainer import ADAPTER
    from senri.training.unigram import UnigramSettings, fit_unigram_cache

    training, started = config.training, time.perf_counter()
    adapter = find_adapter(config.base_model_name, training.init_adapter)
    if adapter is None:
        raise ValueError("method unigram adds to an adapter: name one as init_adapter in training.yaml")
    settings = UnigramSettings(**training.unigram.model_dump())
    check_adapter(adapter)
    texts = split_documents(training_texts(config, data), "training")
    overrides = {name: value for name, value in config.senri_overrides().items() if name != "unigram_cache"}
    with console.status("loading the model ..."):
        quiet_transformers()
        model, tokenizer = load_model(config.base_model_name, config.model.dtype, training.init_adapter, **overrides)
    notes = notes_of(config, texts, adapter)
    facts = {
        **about_model(config, model, tokenizer),
        "data_digests": sorted({document.digest for document in texts}),
        "unigram": training.unigram.model_dump(),
        "seed": training.seed,
    }
    folder = output or Path(config.experiment.output_dir) / "train" / run_name(facts)
    checkpoint.open_folder(folder, facts)
    console.print(f"the run goes to {folder}")
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10 or done == total:
            last = time.monotonic()
            console.print(f"reading {done:,} of {total:,} tokens   {done / (last - begun):,.0f} tokens/s")

    begun = time.monotonic()
    report = fit_unigram_cache(
        model, texts, tokenizer, settings, training.seed, piece_size=config.experiment.reading.piece_size, show=show
    )
    console.print(
        f"{report.predictions:,} predictions: {report.loss_without:.4f} -> {report.loss_with:.4f} nats a token "
        f"(strength {report.strength:.3f}, smoothing {report.smoothing:,.0f})"
    )
    path = folder / ADAPTER
    save_adapter(model, path, **notes, seed=training.seed, settings=dataclasses.asdict(settings), fit=report._asdict())
    console.print(f"{time.perf_counter() - started:,.0f} s; saved {path}: name it as adapter in config/model.yaml")
    return path
