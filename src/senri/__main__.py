"""``python -m senri`` is the ``senri`` command."""

from senri.cli import main

main()
