"""``senri ask``: a question to a saved memory."""

from __future__ import annotations

from typing import Annotated

import typer

from senri.cli.common import MemoryFile, open_session, stream_answer, warn

NAME = "ask"


def command(
    memory: MemoryFile,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
) -> None:
    """Answer a question from a saved memory; the file stays as it is."""
    from senri.hf.memory_file import read_header

    read_header(memory)  # complains before the model is loaded
    session = open_session()
    header = session.load(memory)
    if not header.get("complete", True):
        warn(
            f"{memory} holds an unfinished reading ({header['read_tokens']:,} tokens); senri read ... --resume goes on"
        )
    session.ask(question, stream_answer(session))
