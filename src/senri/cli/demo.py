"""``senri demo``: reads a long text in constant memory, saves it, opens it in a new process, asks, and says what it
can and cannot recall."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import psutil
import typer
from rich.markup import escape
from rich.table import Table

from senri.cli.common import ReadingDisplay, console, open_session, warn
from senri.cli.read import check_space, save
from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.session import Session

NAME = "demo"


class Fact(NamedTuple):
    """What is planted in the text, and where, from 0 (its start) to 1 (its end)."""

    place: float
    told: str
    question: str
    answer: str


FACTS = (
    Fact(0.0, "Miss Clara Brand was born in Riga.", "Where was Clara Brand born?", "Riga"),
    Fact(0.15, "The telephone number of Edwin Cole is 5550173.", "What is the telephone number of Edwin Cole?",
         "5550173"),
    Fact(0.3, "The secret key of Martha Lind is: KEY-QWT90218.", "What is the secret key of Martha Lind?",
         "KEY-QWT90218"),
    Fact(0.5, "The secret key is: KEY-ABC12345.", "What is the secret key mentioned above?", "KEY-ABC12345"),
    Fact(0.65, "Hugo Penn worked as a carpenter.", "As what did Hugo Penn work?", "carpenter"),
    Fact(0.8, "The password of the old library is copper-falcon.", "What is the password of the old library?",
         "copper-falcon"),
    Fact(0.9, "The secret key of Martha Lind is: KEY-MJB66401.", "What is the secret key of Martha Lind?",
         "KEY-MJB66401"),
)  # fmt: skip
ASKED_AGAIN = FACTS[3]  # in a new process
SAID = 24  # tokens of an answer in the table


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
        ids, ends = planted_text(session, None if full else config.experiment.demo.num_tokens)
    check_space(memory, session)
    read(session, ids, memory)
    memory = save(session, memory)
    console.print(f"saved {memory}: {memory.stat().st_size / 1e6:.2f} MB\n")
    recall_table(session, ends, len(ids))
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


def planted_text(session: Session, limit: int | None) -> tuple[list[int], list[int]]:
    """Token ids of the text with the facts planted between its sentences, ``limit`` of them or all, and where each
    fact ends.
    """
    import numpy as np

    from senri.data import iter_bible, iter_tokens
    from senri.data.haystack import BookHaystack, Plant, Stretch, encode, plant

    tokens = itertools.chain.from_iterable(iter_tokens(iter_bible(), session.tokenizer))
    facts = [tuple(encode(session.tokenizer, f" {fact.told}")) for fact in FACTS]
    planted = sum(map(len, facts))
    if limit is not None and limit < 2 * planted:
        raise ValueError(
            f"the demo plants {planted} tokens of facts, {limit} do not hold them: set demo.num_tokens in "
            f"experiment.yaml to {2 * planted} at least"
        )
    text = np.fromiter(tokens if limit is None else itertools.islice(tokens, limit - planted), dtype=np.int32)
    length = len(text) + planted
    stretch = Stretch(text, BookHaystack([], session.tokenizer).cuts(text), "King James Bible")
    plants = [Plant(fact.place * length, ids) for fact, ids in zip(FACTS, facts, strict=True)]
    ids, spans = plant(stretch, plants, length)
    return ids.tolist(), [stop for _, stop in spans]


def read(session: Session, ids: list[int], memory: Path) -> None:
    """Read with speed and state size on show; stopped by Ctrl-C, what was read is kept in ``memory``."""
    from senri.session import ReadingStopped

    def blocks() -> Iterator[list[int]]:
        yield from (ids[i : i + 4096] for i in range(0, len(ids), 4096))

    console.print(
        f"reading the King James Bible, {len(ids):,} tokens; {len(FACTS)} facts are planted in it, in the middle: "
        f"{ASKED_AGAIN.told}"
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


def recall_table(session: Session, ends: list[int], length: int) -> None:
    """Every planted fact asked for, from the memory and, the control, from an emptied one."""
    table = Table(title="what was planted, asked for after the end of the text", title_justify="left")
    for column in ("told", "tokens ago", "from the memory", "memory emptied"):
        table.add_column(column, justify="right" if column == "tokens ago" else "left", overflow="fold")
    session.generation = {**session.generation, "max_new_tokens": SAID}
    last = {fact.question: (fact, end) for fact, end in zip(FACTS, ends, strict=True)}  # told again, it changed
    right = 0
    for fact, end in sorted(last.values(), key=lambda item: item[1]):
        answers = [session.ask(fact.question, memory=memory).partition("\n")[0] for memory in (True, False)]
        right += fact.answer in answers[0]
        table.add_row(fact.told, f"{length - end:,}", *map(escape, answers))
    console.print(table)
    console.print(f"{right} of {len(last)} recalled")


def ask_in_new_process(memory: Path) -> None:
    """Open the saved memory in a fresh process and ask for the planted key; say honestly how it went."""
    console.print(f'\nin a new process: senri ask {memory} "{ASKED_AGAIN.question}"')
    command = [sys.executable, "-m", "senri", "ask", str(memory), ASKED_AGAIN.question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the new process failed: {done.stderr.strip() or done.stdout.strip()}")
    answer = done.stdout.strip()
    console.print(f"  {answer}")
    if ASKED_AGAIN.answer in answer:
        console.print(f"the key was recalled ({ASKED_AGAIN.answer}).")
        return
    console.print(f"wrong: the key is {ASKED_AGAIN.answer}. How often which facts are recalled: docs/training.md")
