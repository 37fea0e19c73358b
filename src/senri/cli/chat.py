"""``senri chat``: a conversation that goes on from a memory and becomes part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from senri.cli.common import ReadingDisplay, console, estimate_tokens, open_session, stream_answer, warn
from senri.cli.read import check_output

if TYPE_CHECKING:
    from senri.session import Session

NAME = "chat"
HELP = "/read TEXT  read a file   /save FILE.senri  save the memory   /memory  its size   /quit  leave"


def command(
    memory: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.senri]", help="A saved memory to start from; it is not changed."),
    ] = None,
) -> None:
    """Talk with the model; what is said and read becomes part of its memory."""
    from senri.hf.memory_file import read_header

    if memory is not None:
        read_header(memory)
    session = open_session()
    if memory is not None:
        header = session.load(memory)
        console.print(f"{memory}: {header['tokens_read'][0]:,} tokens read")
    else:
        session.model.reset_memory()
    console.print(HELP)
    while True:
        try:
            line = console.input("> ").strip()
            if line in ("/quit", "/exit"):
                return
            if line:
                _turn(session, line)
        except EOFError:
            return
        except KeyboardInterrupt:  # stops an answer, not the conversation with its memory
            console.print("\n(stopped; /quit leaves, /save FILE.senri keeps the memory)")


def _turn(session: Session, line: str) -> None:
    """One input; a mistake in it does not end the conversation."""
    from senri.session import ReadingStopped

    name, _, rest = line.partition(" ")
    path = Path(rest.strip()).expanduser()
    try:
        if name in ("/read", "/save") and not rest.strip():
            warn(f"{name} needs a file: {name} FILE")
        elif name == "/read":
            display = ReadingDisplay(estimate_tokens(path))
            display.finish(session.read_file(path, display))
        elif name == "/save":
            check_output(path, exists_ok=False)
            session.save(path)
            console.print(f"saved {path}")
        elif name == "/memory":
            state = session.state
            console.print(
                f"{state.tokens_read[0]:,} tokens read; state {state.nbytes / 1e6:.2f} MB, of it memory "
                f"{state.memory_nbytes / 1e6:.2f} MB"
            )
        elif name.startswith("/"):
            console.print(HELP)
        else:
            session.say(line, stream_answer(session))
    except ReadingStopped as stop:
        warn(f"stopped after {stop.tokens:,} tokens: {stop.reason}. They are in the memory; /read {path} goes on")
    except (ValueError, RuntimeError, OSError) as error:
        warn(str(error))
