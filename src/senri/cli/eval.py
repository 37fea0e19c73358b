"""``senri eval``: what the configured model recalls, with every control; and two such runs compared."""

from __future__ import annotations

import json
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from senri.cli.common import console, open_session, quiet_transformers, warn
from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.data.corpus import Document
    from senri.evaluation.report import Report
    from senri.evaluation.suites import Bench, Sources, Suite
    from senri.session import Session

NAME = "eval"
WIDTH = 160  # columns of a table that goes to a file


def command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where the results go. [default: in runs/]")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Compare two runs' folders instead.")
    ] = None,
) -> None:
    """Measure what the configured model recalls: suites, controls, report. What is measured stands in
    config/experiment.yaml under `evaluation`.

    Ctrl-C stops; the same command goes on.
    """
    check_packages(NAME, "wonderwords")
    if compare is not None:
        compare_runs(*compare, output)
    else:
        run(ConfigManager(), output)


def check_packages(command: str, *more: str) -> None:
    """Raises ValueError where a package that reports are made with is missing, or one of ``more``."""
    for name in ("jinja2", "matplotlib", "scipy", *more):
        if find_spec(name) is None:
            raise ValueError(f"senri {command} needs {name}: pip install 'senri[eval]'")


def compare_runs(a: Path, b: Path, output: Path | None) -> None:
    """Write the comparison of two runs and show its tables."""
    from senri.evaluation.compare import compare
    from senri.evaluation.run import IDENTITY
    from senri.evaluation.write import write_report

    folder = output or a.parent / f"{a.name}-against-{b.name}"
    if (folder / IDENTITY).exists():
        raise ValueError(f"{folder} holds a run of its own: name another folder with -o")
    report = compare(a, b)
    write_report(report, folder)
    show(report, folder)


def run(config: ConfigManager, output: Path | None) -> Path:
    """Run what the configuration asks for, or go on with it; returns the folder with the results."""
    from senri.evaluation.run import evaluate, open_run
    from senri.identity import run_name

    started = time.perf_counter()
    documents = held_out(config)
    session = open_session(config)
    bench, suites, identity = prepare(config, session, documents)
    folder = output or Path(config.experiment.output_dir) / "eval" / run_name(identity)
    bench = bench(open_run(folder, identity))
    console.print(f"results go to {folder}")
    try:
        report = evaluate(suites, bench, folder, identity)
    except KeyboardInterrupt:
        again = "" if output is None else f" -o {shlex.quote(str(output))}"
        warn(f"interrupted; what was answered is kept in {folder}, go on with: senri eval{again}")
        raise typer.Exit(130) from None
    finally:
        bench.log.close()
    show(report, folder)
    console.print(f"{time.perf_counter() - started:,.0f} s")
    return folder


def held_out(config: ConfigManager) -> list[Document]:
    """The texts to evaluate on, none of which training sees.

    Raises:
        ValueError: no text, or one that training reads too, or that the adapter was trained on.
    """
    from senri.cli.train import training_texts
    from senri.data.corpus import check_disjoint, load_documents, split_documents

    training = training_texts(config, [])
    if not config.experiment.evaluation.data:
        documents = split_documents(training, "evaluation")
    else:
        documents = load_documents(config.experiment.evaluation.data)
        trained = split_documents(training, "training")
        check_disjoint(documents, [d.digest for d in trained], "data of training.yaml")
    name, notes = training_notes(config)
    # texts of which the model was trained on the first part only: their last part may be evaluated on
    first_parts = set(notes.get("data_parts", ()))
    for document in documents:
        digests = set(notes.get("data_digests", ())) - (first_parts if document.part_of else set())
        check_disjoint([document], digests, name)
    return documents


def training_notes(config: ConfigManager) -> tuple[str, dict[str, Any]]:
    """What was trained, and what it says about its training: an adapter's notes, or those beside full weights."""
    from senri.hf.adapter import read_adapter_header
    from senri.hf.base import find_adapter
    from senri.training.settings import NOTES

    adapter = find_adapter(config.base_model_name, config.model.adapter)
    if adapter is not None:
        return f"the adapter {adapter.name}", read_adapter_header(adapter)["notes"]
    beside = Path(config.base_model_name) / NOTES
    notes = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return f"the model {config.base_model_name}", notes


def prepare(config: ConfigManager, session: Session, documents: list[Document]) -> tuple[Any, list[Suite], dict]:
    """What the run needs: a maker of the bench for a log, the suites, and the run's identity."""
    from senri.data.haystack import BookHaystack
    from senri.evaluation.readers import FullAttentionReader, SenriReader
    from senri.evaluation.suites import Bench, Sources
    from senri.files import fingerprint
    from senri.hf.adapter import base_fingerprint
    from senri.hf.memory_file import expected_header, tokenizer_fingerprint

    settings, tokenizer, model = config.experiment.evaluation, session.tokenizer, session.model
    piece_size = config.experiment.reading.piece_size
    display = Progress()
    full = load_full(config, model.dtype, model.device) if settings.full_attention else None
    if full is None and settings.full_attention:
        console.print("no full-attention control: a saved Senri model has no unconverted base beside it")
    sources = Sources(BookHaystack(documents, tokenizer), tokenizer, config.experiment.seed)
    values = settings.model_dump(mode="json")
    suites = {name: make_suite(name, values[name], sources) for name in settings.suites}
    for suite in suites.values():
        suite.check()
    identity = {
        "model": config.base_model_name,
        "adapter": config.model.adapter,
        "base_fingerprint": base_fingerprint(model),
        "fingerprint": fingerprint(model.named_parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "memory": expected_header(model.config),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "piece_size": piece_size,
        "seed": config.experiment.seed,
        "texts": ", ".join(d.name for d in documents),
        "text_digests": [d.digest for d in documents],
        "full_attention": full is not None,
        "evaluation": {name: values[name] for name in sorted(suites)},
    }

    def bench(log: Any) -> Bench:
        return Bench(
            SenriReader(model, tokenizer, piece_size=piece_size, progress=display.tokens),
            None if full is None else FullAttentionReader(full, tokenizer, piece_size=piece_size),
            tokenizer,
            log,
            display.line,
        )

    return bench, list(suites.values()), identity


def make_suite(name: str, values: dict[str, Any], sources: Sources) -> Suite:
    """A suite from its section of the configuration."""
    from senri.evaluation import suites
    from senri.evaluation.capacity import CapacitySuite
    from senri.evaluation.perplexity import PerplexitySuite
    from senri.evaluation.reversal import reversal

    makers: dict[str, Any] = {
        "niah": suites.niah,
        "ruler": suites.ruler,
        "babilong": suites.babilong,
        "recall_by_writes": suites.recall_by_writes,
        "perplexity": PerplexitySuite,
        "capacity": CapacitySuite,
        "reversal": reversal,
    }
    unique = {key: list(dict.fromkeys(v)) if isinstance(v, list) else v for key, v in values.items()}
    return makers[name](sources, **unique)


def load_full(config: ConfigManager, dtype: Any, device: Any) -> Any:
    """The unconverted base model, or None for a saved Senri model, which has none beside it."""
    from senri.hf.base import load_unconverted

    with console.status("loading the base model for the full-attention control ..."):
        quiet_transformers()
        base = load_unconverted(config.base_model_name)
    return None if base is None else base.to(device, dtype).eval()


class Progress:
    """Where the evaluation stands: one line that renews itself on a terminal, a line now and then elsewhere."""

    EVERY = 10.0  # seconds between two lines outside a terminal

    def __init__(self) -> None:
        self.text, self.last = "", time.monotonic()
        self.read, self.since = 0, time.monotonic()

    def line(self, text: str) -> None:
        """Show what was just done."""
        self.text = text
        self._show(text)

    def tokens(self, total: int) -> None:
        """Show that a long reading goes on."""
        now = time.monotonic()
        if now - self.last > self.EVERY:
            speed = (total - self.read) / (now - self.since)
            self.read, self.since = total, now
            self._show(f"{self.text or 'reading'}   ({total:,} tokens read, {speed:,.0f} tokens/s)")

    def _show(self, text: str) -> None:
        now = time.monotonic()
        if console.is_terminal:
            console.print(text[: console.width - 1].ljust(console.width - 1), end="\r")
        elif now - self.last > self.EVERY:
            console.print(text)
        else:
            return
        self.last = now


def show(report: Report, folder: Path) -> None:
    """The report's flags and tables on the terminal, and where the rest is."""
    from senri.evaluation.markdown import cells

    if console.is_terminal:
        console.print(" " * (console.width - 1), end="\r")
    # a log or a pipe has no width of its own to keep to
    wide = console if console.is_terminal else Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for section in report.sections:
        for table in section.tables:
            drawn = RichTable(title=f"{section.title}: {table.title}", title_justify="left", box=SIMPLE_HEAD)
            for column in table.columns:
                drawn.add_column(column, justify="right" if column != table.columns[-1] else "left")
            for row in cells(table):
                drawn.add_row(*row)
            wide.print(drawn)
        for flag in section.flags:
            console.print(f"! {flag}")
    console.print(f"report: {folder / 'report.html'} (and report.md, report.json, pictures)")
