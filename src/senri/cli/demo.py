"""``senri demo``: reads a long text in constant memory, saves it, opens it in a new process, asks, and says what it
can and cannot recall."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.table import Table

from senri.cli.common import ReadingDisplay, console, open_session, warn
from senri.cli.read import check_space, save
from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.session import Session

NAME = "demo"
NEEDLE = "The secret key is: KEY-ABC12345. "
QUESTION = "What is the secret key mentioned above?"
ANSWER = "KEY-ABC12345"
PASSAGE = 256  # tokens quoted in the recall table


def command(
    full: Annotated[bool, typer.Option("--full", help="Read the whole text, 1.0 million tokens.")] = False,
) -> None:
    """Read the King James Bible in constant memory, save it, reopen it in a new process and ask."""
    config = ConfigManager()
    folder = Path(config.experiment.output_dir) / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    memory = folder / "bible.senri"
    session = open_session(config)
    describe(session, config.base_model_name)
    with console.status("tokenizing ..."):
        ids = planted_text(session, None if full else config.experiment.demo.num_tokens)
    check_space(memory, session)
    read(session, ids, memory)
    memory = save(session, memory)
    console.print(f"saved {memory}: {memory.stat().st_size / 1e6:.2f} MB\n")
    recall_table(session, ids)
    ask_in_new_process(memory)


def describe(session: Session, name: str) -> None:
    """What is about to read."""
    config = session.model.config
    slots = f"{config.memory_num_slots} slots, " if config.update_rule == "slot" else ""
    console.print(
        f"{name} as a Senri model: window {config.sliding_window_size} tokens in all "
        f"{config.num_hidden_layers} layers, memory ({config.update_rule}, {slots}{config.memory_num_heads} x "
        f"{config.memory_head_dim}) in layer {', '.join(map(str, config.memory_layers))}, {session.model.dtype}"
    )


def planted_text(session: Session, limit: int | None) -> list[int]:
    """Token ids of the text with a sentence planted in its middle; ``limit`` tokens, or all."""
    from senri.data import iter_bible, iter_tokens

    tokens = itertools.chain.from_iterable(iter_tokens(iter_bible(), session.tokenizer))
    needle = session.tokenizer(" " + NEEDLE, add_special_tokens=False)["input_ids"]
    ids = list(tokens if limit is None else itertools.islice(tokens, limit - len(needle)))
    middle = len(ids) // 2
    return ids[:middle] + needle + ids[middle:]


def read(session: Session, ids: list[int], memory: Path) -> None:
    """Read with speed and state size on show; stopped by Ctrl-C, what was read is kept in ``memory``."""
    from senri.session import ReadingStopped

    def blocks() -> Iterator[list[int]]:
        yield from (ids[i : i + 4096] for i in range(0, len(ids), 4096))

    console.print(
        f"reading the King James Bible, {len(ids):,} tokens; a key is planted in the middle: {NEEDLE.strip()}"
    )
    display = ReadingDisplay(len(ids))
    try:
        now = session.read_tokens(blocks(), "King James Bible", display)
    except ReadingStopped as stop:
        warn(f"stopped after {stop.tokens:,} tokens: {stop.reason}. They are kept in {save(session, memory)}")
        raise typer.Exit(130) from None
    display.finish(now)
    peak = psutil.Process().memory_info().rss / 1e6
    state = session.state
    console.print(
        f"after the end of the text: memory {state.memory_nbytes / 1e6:.2f} MB for {state.tokens_read[0]:,} tokens "
        f"(process {peak:,.0f} MB)"
    )


def recall_table(session: Session, ids: list[int]) -> None:
    """What is left of what was read: passages from further and further back come again, with and without memory."""
    import torch

    table = Table(title="passages quoted again: share of tokens predicted right", title_justify="left")
    for column in ("read this many tokens ago", "with memory", "memory emptied"):
        table.add_column(column, justify="right")
    for distance in sorted({min(n * PASSAGE, len(ids)) for n in (1, 2, 4, 16, 64)} | {len(ids)}):
        start = len(ids) - distance
        passage = torch.tensor(ids[start : start + PASSAGE])
        with_memory, without = (session.passage_recall(passage, memory=m) for m in (True, False))
        table.add_row(f"{distance:,}", f"{with_memory:.0%}", f"{without:.0%}")
    console.print(table)


def ask_in_new_process(memory: Path) -> None:
    """Open the saved memory in a fresh process and ask for the planted key; say honestly how it went."""
    console.print(f'\nin a new process: senri ask {memory} "{QUESTION}"')
    command = [sys.executable, "-m", "senri", "ask", str(memory), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the new process failed: {done.stderr.strip() or done.stdout.strip()}")
    answer = done.stdout.strip()
    console.print(f"  {answer}")
    if ANSWER in answer:
        console.print(f"the key was recalled ({ANSWER}).")
        return
    console.print(f"wrong: the key is {ANSWER}. How often which facts are recalled: docs/training.md")
