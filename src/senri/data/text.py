"""A text of any length as a stream: file -> characters -> tokens -> pieces, never whole in memory."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE_BLOCK = 1 << 16  # bytes read at once
TOKENIZER_BLOCK = 1 << 16  # characters tokenized at once
# Before a single space between a word and a letter every byte-level BPE cuts, so tokens do not depend on the blocks.
_SAFE_CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class TextError(ValueError):
    """A text that cannot be read; the message says what is wrong and how to mend it, in one line."""


def iter_text(path: str | Path) -> Iterator[str]:
    """The characters of a UTF-8 file (``-``: standard input), block by block.

    Raises:
        TextError: missing, a directory, not readable, empty, or not UTF-8 (naming the byte).
    """
    name = str(path)
    if name != "-":
        path = Path(path)
        if not path.exists():
            raise TextError(f"{name}: no such file")
        if path.is_dir():
            raise TextError(f"{name} is a folder; name a text file")
        if path.is_file() and path.stat().st_size == 0:  # a pipe has no size
            raise TextError(f"{name} is empty: there is nothing to read")
    return _decode(path, name)


def _decode(path: str | Path, name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # not utf-8-sig: its error positions leave out the mark
    offset, first = 0, True
    try:
        source = sys.stdin.buffer if name == "-" else open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise TextError(f"{name} cannot be opened: {error.strerror}") from None
    try:
        while block := source.read(FILE_BLOCK):
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(name, offset - waiting + error.start) from None
            offset += len(block)
            if text and first:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise _not_utf8(name, offset - len(decoder.getstate()[0])) from None
    finally:
        if name != "-":
            source.close()


def _not_utf8(name: str, offset: int) -> TextError:
    return TextError(
        f"{name} is not UTF-8 text (byte {offset}): convert it first, e.g. "
        f"iconv -f latin1 -t utf-8 {name} > {name}.utf8"
    )


def iter_tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of a text given in arbitrary blocks, the same as of the whole text at once.

    Special tokens that the tokenizer puts before a text (BOS) come once, at the start.
    """
    buffer, first = "", True
    for text in texts:
        buffer += text
        while len(buffer) >= TOKENIZER_BLOCK:
            cut = _last_safe_cut(buffer)
            if cut is None and len(buffer) < 4 * TOKENIZER_BLOCK:
                break  # one endless word so far: wait for its end
            cut = cut or len(buffer)
            yield _encode(buffer[:cut], tokenizer, first)
            buffer, first = buffer[cut:], False
    if buffer:
        yield _encode(buffer, tokenizer, first)


def _last_safe_cut(text: str) -> int | None:
    """Where the last block may end; looks at the second half only, backwards in steps."""
    for start in range(len(text) - 2048, len(text) // 2, -2048):
        matches = list(_SAFE_CUT.finditer(text, max(start, 1)))
        if matches:
            return matches[-1].start()
    return None


def _encode(text: str, tokenizer: Any, first: bool) -> list[int]:
    if not first and text.startswith(" "):
        # Some tokenizers (SentencePiece's) put a space before every text: here before a word that is dropped again.
        word = len(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        return tokenizer("a" + text, add_special_tokens=False, verbose=False)["input_ids"][word:]
    return tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]


def iter_pieces(tokens: Iterable[list[int]], piece_size: int) -> Iterator[list[int]]:
    """Regroup a stream of token lists into pieces of exactly ``piece_size`` (the last may be shorter)."""
    buffer: list[int] = []
    for block in tokens:
        buffer.extend(block)
        whole = len(buffer) - len(buffer) % piece_size
        for start in range(0, whole, piece_size):
            yield buffer[start : start + piece_size]
        buffer = buffer[whole:]
    if buffer:
        yield buffer
