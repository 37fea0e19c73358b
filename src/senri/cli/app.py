"""Assembles the commands and turns every expected error into one line."""

from __future__ import annotations

import sys

import typer

from senri.cli import ask, chat, convert, demo, inspect, read

app = typer.Typer(
    help="Senri: read text of any length in constant memory, and ask about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (read, ask, chat, inspect, convert, demo):
    app.command(name=module.NAME)(module.command)


def main() -> None:
    """Run the command line; exit status 1 and one line on stderr for what the user can mend, 130 for Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:
        print("senri: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"senri: {error}", file=sys.stderr)
        sys.exit(1)
