"""Text as a stream: the same characters, tokens and pieces as of the whole text at once."""

import io
import itertools
import random
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import senri.data.text as text_module
from senri.data.text import FILE_BLOCK, TextError, iter_pieces, iter_text, iter_tokens


def cut(text, seed, longest):
    """``text`` in blocks of random lengths, empty ones among them."""
    chance, start = random.Random(seed), 0
    while start < len(text):
        stop = start + chance.randint(0, longest)
        yield text[start:stop]
        start = stop


@pytest.mark.parametrize(("longest", "block"), [(7, 4096), (3001, 4096), (150_000, 1 << 16), (400_000, 5000)])
def test_a_real_text_in_blocks_gives_the_tokens_of_the_whole(real_text, real_tokenizer, monkeypatch, longest, block):
    monkeypatch.setattr(text_module, "TOKENIZER_BLOCK", block)
    text = real_text[2_000_000:2_300_000]
    whole = real_tokenizer(text)["input_ids"]
    blocks = list(iter_tokens(cut(text, longest, longest), real_tokenizer))
    assert [token for part in blocks for token in part] == whole
    assert len(whole) > 60_000
    if longest < 100_000:
        assert len(blocks) > 3, "never cut: this would show nothing"
        assert max(map(len, blocks)) < 2 * max(block, longest)


@pytest.mark.parametrize(
    "text",
    [
        "no spaces" + "at-all," * 900,
        "1984 " * 900,
        "two  blanks and\n\nlines\t\tand tabs " * 200,
        "naïve café, 千里を見る。 " * 300,
        "it's we've don't " * 400,
        "x" * 9000,
    ],
)
def test_other_texts_too(real_tokenizer, monkeypatch, text):
    monkeypatch.setattr(text_module, "TOKENIZER_BLOCK", 2200)
    whole = real_tokenizer(text)["input_ids"]
    tokens = [token for part in iter_tokens(cut(text, 0, 500), real_tokenizer) for token in part]
    if max(map(len, text.split(" "))) < 2200:
        assert tokens == whole
    assert real_tokenizer.decode(tokens) == text


def test_the_start_token_comes_once(real_text, monkeypatch):
    monkeypatch.setattr(text_module, "TOKENIZER_BLOCK", 3000)

    def tokenizer(text, add_special_tokens, verbose):
        return {"input_ids": [-1] * add_special_tokens + list(map(ord, text))}

    text = real_text[:20_000]
    blocks = list(iter_tokens(cut(text, 1, 2000), tokenizer))
    assert len(blocks) > 3
    assert [token for part in blocks for token in part] == [-1, *map(ord, text)]
    assert list(iter_tokens([], tokenizer)) == list(iter_tokens(["", ""], tokenizer)) == []


def test_a_long_text_does_not_warn_about_its_length(real_tokenizer, caplog):
    assert len(next(iter_tokens(["word " * 10_000], real_tokenizer))) > real_tokenizer.model_max_length
    assert "longer than the specified maximum" not in caplog.text


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=9), st.integers(min_value=1, max_value=7))
def test_pieces_regroup_exactly(blocks, size):
    pieces = list(iter_pieces(blocks, size))
    flat = [token for block in blocks for token in block]
    assert [token for piece in pieces for token in piece] == flat
    assert all(len(piece) == size for piece in pieces[:-1])
    assert len(pieces) == -(-len(flat) // size)
    assert all(pieces)


def test_pieces_come_as_soon_as_they_are_full():
    def blocks():
        yield [1, 2, 3]
        pytest.fail("asked for more than the first piece needs")

    assert next(iter_pieces(blocks(), 2)) == [1, 2]


# files -----------------------------------------------------------------------------------------------------------


def write(tmp_path, data):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("shift", range(4))
def test_characters_across_block_borders(tmp_path, shift):
    text = "a" * (FILE_BLOCK - shift) + "千里𠮷é" * 40_000
    parts = list(iter_text(write(tmp_path, text.encode())))
    assert "".join(parts) == text
    assert len(parts) > 3
    assert max(map(len, parts)) <= FILE_BLOCK + 3


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    mark = "\ufeff"
    assert "".join(iter_text(write(tmp_path, f"{mark}In the {mark}beginning".encode()))) == f"In the {mark}beginning"
    text = mark + "a" * (FILE_BLOCK + 5)
    assert "".join(iter_text(write(tmp_path, text.encode()))) == text[1:]
    assert list(iter_text(write(tmp_path, mark.encode()))) == []


def test_line_ends_stay_as_they_are(tmp_path):
    assert "".join(iter_text(write(tmp_path, b"a\r\nb\nc\rd"))) == "a\r\nb\nc\rd"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("place", [0, 1, 5, FILE_BLOCK - 4, FILE_BLOCK - 3, FILE_BLOCK, 2 * FILE_BLOCK + 7])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, mark, place):
    bad = len(mark) + place
    for wrong in (b"\xff", b"\xe5\x8d\xff", b"\xe9t\xe9"):  # the last is Latin-1
        path = write(tmp_path, mark + b"a" * place + wrong + b"b" * 3 * FILE_BLOCK)
        with pytest.raises(TextError, match=rf"is not UTF-8 text \(byte {bad}\): convert it first, e\.g\. iconv"):
            list(iter_text(path))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("place", [0, 3, FILE_BLOCK - 1, FILE_BLOCK])
def test_a_character_cut_off_at_the_end_is_named(tmp_path, mark, place):
    for rest in (b"\xe5", b"\xe5\x8d", b"\xf0\xa0\xae"):
        path = write(tmp_path, mark + b"a" * place + rest)
        with pytest.raises(TextError, match=rf"is not UTF-8 text \(byte {len(mark) + place}\)"):
            list(iter_text(path))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(TextError, match=r"none\.txt: no such file"):
        list(iter_text(tmp_path / "none.txt"))
    with pytest.raises(TextError, match="is a folder; name a text file"):
        list(iter_text(tmp_path))
    with pytest.raises(TextError, match=r"book\.txt is empty: there is nothing to read"):
        list(iter_text(write(tmp_path, b"")))
    with pytest.raises(TextError, match=r"book\.txt is not UTF-8 text"):
        list(iter_text(str(write(tmp_path, b"a\x80"))))


def test_a_file_that_may_not_be_opened(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, b"text")
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(TextError, match=r"book\.txt cannot be opened: Permission denied"):
        list(iter_text(path))


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("千里を見る".encode())))
    assert "".join(iter_text("-")) == "千里を見る"
    assert not sys.stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab\xff")))
    with pytest.raises(TextError, match=r"- is not UTF-8 text \(byte 2\)"):
        list(iter_text("-"))


def test_the_file_is_closed_when_reading_stops_early(tmp_path):
    texts = iter_text(write(tmp_path, b"a" * 3 * FILE_BLOCK))
    next(texts)
    texts.close()  # a file left open would be a ResourceWarning, and warnings are errors here


def test_a_tokenizer_that_puts_a_space_before_every_text(real_text):
    """SentencePiece's way (Llama 2, TinyLlama): only the first block may get that space."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    text = real_text[:200_000]
    backend.train_from_iterator([text[:20_000]], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert list(itertools.chain.from_iterable(iter_tokens([text], tokenizer))) == whole
