"""``senri read``: a text of any length into a memory file."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from senri.cli.common import ReadingDisplay, console, estimate_tokens, open_session, warn

NAME = "read"


def command(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file; - for standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.senri", help="Where the memory goes.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a reading that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.senri if it exists.")] = False,
) -> None:
    """Read a text of any length into a memory file of fixed size.

    Ctrl-C stops and keeps what was read; --resume goes on from there.
    """
    from senri.data import iter_text
    from senri.session import ReadingStopped

    check_output(output, exists_ok=overwrite or resume)
    if output.exists() and text.exists() and output.samefile(text):
        raise ValueError(f"{output} is the text itself: name another file for the memory")
    iter_text(text)  # complains before the model is loaded
    session = open_session()
    if resume:
        session.resume(output)
    check_space(output, session)
    total = estimate_tokens(text)
    display = ReadingDisplay(total and max(total - session.notes.get("read_tokens", 0), 0))
    try:
        now = session.read_file(text, display)
    except ReadingStopped as stop:
        kept = save(session, output)
        when = "" if stop.reason == "interrupted" else "once that is mended, "
        warn(
            f"stopped after {stop.tokens:,} tokens: {stop.reason}. They are kept in {kept}; {when}"
            f"go on with: senri read {_quoted(text)} -o {_quoted(kept)} --resume"
        )
        raise typer.Exit(130 if stop.reason == "interrupted" else 1) from None
    display.finish(now)
    kept = save(session, output)
    console.print(
        f"saved {kept}: {kept.stat().st_size / 1e6:.2f} MB for {session.state.tokens_read[0]:,} tokens; "
        f'ask it with: senri ask {_quoted(kept)} "..."'
    )
    if kept != output:
        raise typer.Exit(1)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def check_output(path: Path, *, exists_ok: bool) -> None:
    """Raises ValueError where a memory file could not be written, before anything is read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, e.g. {path / 'book.senri'}")
    if path.exists() and not exists_ok:
        raise ValueError(
            f"{path} exists: name another file, or add --overwrite (replace it) or --resume (go on with it)"
        )
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist: make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} is not writable: choose another place with -o")


def check_space(path: Path, session: object) -> None:
    """Raises ValueError where the disk is too full for the memory: its size is known before anything is read."""
    model = session.model  # type: ignore[attr-defined]
    from senri.memory.state import nbytes

    window = model.config.sliding_window_size * model.config.num_hidden_layers * model.config.num_key_value_heads
    needed = nbytes(model.model.empty_state(1, model.dtype)) + 2 * window * model.config.head_dim * model.dtype.itemsize
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise ValueError(
            f"the disk of {path} has {free / 1e6:.1f} MB free and the memory may need {needed / 1e6:.1f} MB: make room "
            "or choose another place with -o"
        )


def save(session: object, path: Path) -> Path:
    """Save to ``path``; if that fails, to the temporary folder, so that nothing read is lost."""
    from senri.files import FileError

    try:
        session.save(path)  # type: ignore[attr-defined]
        return path
    except FileError as error:
        rescue = Path(tempfile.mkdtemp(prefix="senri-")) / path.name
        session.save(rescue)  # type: ignore[attr-defined]
        warn(f"{error}. The memory is safe in {rescue}")
        return rescue
