"""``senri bench``: how fast the configured model is, as shares of this machine's bounds and beside its peers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from senri.cli.common import console, warn
from senri.cli.eval import check_packages, show
from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.benchmark.plan import Settings

NAME = "bench"


def command() -> None:
    """Measure speed and memory of the configured model, and of its peers. What is measured stands in
    config/experiment.yaml under `benchmark`.

    Ctrl-C stops; the same command goes on. Leave the machine alone meanwhile.
    """
    check_packages(NAME)
    run(ConfigManager())


def run(config: ConfigManager) -> Path:
    """Measure what is not measured yet; returns the folder with the results."""
    from senri.benchmark.run import bench, check, run_identity, start
    from senri.identity import run_name

    started = time.perf_counter()
    settings = make_settings(config)
    check(settings)  # complains before a folder is made
    folder = Path(config.experiment.output_dir) / "bench" / run_name(run_identity(settings))
    log = start(settings, folder)
    console.print(f"results go to {folder}")
    before = len(log.records)
    try:
        report = bench(settings, folder, log, console.print)
    except KeyboardInterrupt:
        kept = len(log.records)
        warn(f"interrupted; {kept} rows are kept in {folder}, go on with: senri bench")
        raise typer.Exit(130) from None
    finally:
        log.close()
    show(report, folder)
    if before == len(log.records):
        console.print(f"all rows were there already; to measure again, remove {folder}")
    console.print(f"{time.perf_counter() - started:,.0f} s")
    return folder


def make_settings(config: ConfigManager) -> Settings:
    """What the benchmark takes of the configuration."""
    from dataclasses import fields

    from senri.benchmark.plan import Settings
    from senri.training.settings import TrainingSettings

    training, dumped = config.training, config.training.model_dump(mode="json")
    # what is given twice is measured once
    values: dict[str, Any] = {
        name: tuple(dict.fromkeys(v)) if isinstance(v, tuple) else v
        for name, v in config.experiment.benchmark.model_dump().items()
    }
    return Settings(
        **values,
        model={
            "name": config.base_model_name,
            "dtype": config.model.dtype,
            "adapter": config.model.adapter,
            "overrides": config.senri_overrides(),
        },
        piece_size=config.experiment.reading.piece_size,
        training={field.name: dumped[field.name] for field in fields(TrainingSettings)},
        features={**dumped["features"], "chat": training.chat_ratio, "seed": training.seed},
    )
