"""The ``senri`` command: one file a command, each thin over the library."""

from senri.cli.app import main

__all__ = ["main"]
