"""Texts as streams of tokens; knows no model."""

from senri.data.bible import iter_bible
from senri.data.text import TextError, iter_pieces, iter_text, iter_tokens

__all__ = ["TextError", "iter_bible", "iter_pieces", "iter_text", "iter_tokens"]
