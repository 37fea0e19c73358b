"""Assembles the commands and turns every expected error into one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from senri import __version__
from senri.cli import ask, bench, chat, convert, demo, eval, inspect, read, train
from senri.cli.common import warn

app = typer.Typer(
    help="Senri: read text of any length in constant memory, and ask about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"senri {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``senri`` itself."""


def _speaks_when_interrupted(command: Callable[..., None]) -> Callable[..., None]:
    """Typer ends a command at Ctrl-C without a word."""

    @functools.wraps(command)
    def wrapped(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            warn("interrupted")
            raise typer.Exit(130) from None

    return wrapped


for module in (read, ask, chat, inspect, convert, demo, train, eval, bench):
    app.command(name=module.NAME)(_speaks_when_interrupted(module.command))


def main() -> None:
    """Run the command line; exit status 1 and one line on stderr for what the user can mend, 130 for Ctrl-C."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        warn(str(error))
        sys.exit(1)
