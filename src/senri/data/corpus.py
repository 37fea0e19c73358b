"""A collection of texts, split into training and evaluation by construction: by the content of each document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from senri.data.bible import iter_bible
from senri.data.text import TextError, iter_text

Part = Literal["training", "evaluation"]
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str
    part_of: str | None = None  # digest of the whole text that this is a part of

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole text: two documents are of the same text when their digests are equal."""
        return self.part_of or hashlib.sha256(self.text.encode()).hexdigest()


def load_documents(paths: Sequence[str | Path]) -> list[Document]:
    """The documents of files and folders (``.txt``: one each; ``.jsonl``: one a line, field ``text``), by name.

    Without paths, the text that a pip package ships: the King James Bible. A text that comes twice is taken once.

    Raises:
        TextError: no such place, no text in it, not UTF-8, or a line that is no JSON object with a text.
    """
    if not paths:
        return [Document("King James Bible", "".join(iter_bible()))]
    documents: dict[str, Document] = {}
    for path in map(Path, paths):
        found = False
        for document in _documents_of(path):
            if document.text.strip():
                found = True
                documents.setdefault(document.digest, document)
        if not found:
            raise TextError(f"{path} holds no text: it needs .txt or .jsonl files")
    return list(documents.values())


def _documents_of(path: Path) -> Iterable[Document]:
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            if file.stat().st_size:
                yield from _documents_of(file)
    elif path.suffix == ".jsonl":
        lines = "".join(iter_text(path)).split("\n")  # not splitlines(): a text may hold U+2028
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{path.name}:{number}", _text_field(line, f"{path}: line {number}"))
    else:
        yield Document(path.name, "".join(iter_text(path)))


def _text_field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # half a surrogate pair is no text
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError):
        text = None
    if not isinstance(text, str):
        raise TextError(f'{place} is no JSON object with a field "text"')
    return text


def split_documents(documents: Sequence[Document], part: Part, share: float = 0.1) -> list[Document]:
    """One side of the split: no text of it is ever on the other, whatever else is in the collection.

    A document belongs to ``evaluation`` when its digest, as a number, falls below ``share``; so adding texts moves none
    of the old ones. A collection whose documents all fall on one side is cut instead: each document's last ``share``
    (at a paragraph or sentence) is for evaluation.

    Raises:
        TextError: too little text for two sides.
    """
    below = [int(d.digest[:8], 16) < share * 2**32 for d in documents]
    if any(below) and not all(below):
        return [d for d, evaluation in zip(documents, below, strict=True) if evaluation == (part == "evaluation")]
    sides = [side for document in documents if (side := _side(document, part, share)).text.strip()]
    if not sides:
        raise TextError("there is too little text to keep a part of it for evaluation: give more, or longer, texts")
    return sides


def _side(document: Document, part: Part, share: float) -> Document:
    text = document.text
    cut = round(len(text) * (1 - share))
    for mark in ("\n", ". ", " "):
        found = text.find(mark, cut)
        if 0 <= found < cut + (len(text) - cut) // 2:
            cut = found + len(mark)
            break
    if part == "training":
        return Document(f"{document.name} (first part)", text[:cut], document.digest)
    return Document(f"{document.name} (last part)", text[cut:], document.digest)


def beginnings(documents: Sequence[Document], characters: int) -> list[Document]:
    """About so many characters of the texts (all there are, if fewer): the beginning of each, in proportion."""
    share = min(characters / max(sum(len(d.text) for d in documents), 1), 1.0)
    return [Document(d.name, d.text[: round(len(d.text) * share)], d.digest) for d in documents]


def check_disjoint(documents: Sequence[Document], digests: Iterable[str], owner: str) -> None:
    """Refuse texts that were trained on, as a whole or in part.

    Args:
        digests: of the documents of the training; ``owner`` names what was trained on them.

    Raises:
        TextError: naming the first text that is among them.
    """
    known = set(digests)
    for document in documents:
        if document.digest in known:
            raise TextError(f"{document.name} was trained on ({owner}): evaluate on other texts")
