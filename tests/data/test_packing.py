"""Texts packed by concatenation, facts beside them, and a vocabulary of their own."""

import json

import numpy as np
import pytest

from senri.data.corpus import Document, beginnings
from senri.data.haystack import encode
from senri.data.packing import PackedTexts, forward_sentences, load_hub_documents, pack_facts, token_stream
from senri.data.reversal import fact_sets, own_pairs
from senri.data.samples import SampleError
from senri.data.text import TextError
from senri.data.vocabulary import END_OF_TEXT, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def documents(real_text) -> list[Document]:
    return [Document(f"book {i}", real_text[i * 100_000 : i * 100_000 + 8_000 + 1_000 * i]) for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 600)


@pytest.fixture(scope="module")
def stream(documents, tokenizer):
    return token_stream(documents, tokenizer)


# packing ----------------------------------------------------------------------------------------------------


def test_every_token_is_text_and_a_separator_ends_each(documents, tokenizer, stream) -> None:
    expected = []
    for document in documents:
        expected += [*encode(tokenizer, document.text), tokenizer.eos_token_id]
    assert stream.ids.tolist() == expected
    assert (stream.ids == tokenizer.eos_token_id).sum() == len(documents)
    assert [stream.ids[end - 1] for end in stream.ends] == [tokenizer.eos_token_id] * 4


def test_samples_are_stretches_without_a_prediction_in_common(stream) -> None:
    there = (len(stream.ids) - 1) // 50
    data = PackedTexts(stream, 50, there)
    starts = [int(start) for start in data.starts]
    assert starts == list(range(0, 50 * there, 50))
    for i in (0, 7, there - 1):
        assert data[i].tolist() == stream.ids[starts[i] : starts[i] + 51].tolist()
    assert len(data) == there


def test_fewer_samples_are_drawn_by_the_seed(stream) -> None:
    one, again, other = (PackedTexts(stream, 50, 20, seed=seed) for seed in (0, 0, 1))
    assert one.starts == again.starts != other.starts
    assert len(set(one.starts)) == len(one) == 20
    assert one.order(0) == again.order(0)
    assert one.order(0) != one.order(1)
    assert sorted(one.order(1)) == list(range(20))


def test_a_sample_knows_its_text(documents, tokenizer, stream) -> None:
    data = PackedTexts(stream, 10, (len(stream.ids) - 1) // 10)
    bounds = [0, *stream.ends]
    for i in (0, 200, len(data) - 1):
        book = next(b for b in range(4) if bounds[b] <= data.starts[i] < bounds[b + 1])
        assert data.source(i) == f"book {book}"
    assert PackedTexts(stream, 10, 5, [np.zeros(11, np.int32)]).source(5) == "the facts"


def test_too_little_text_is_refused(stream) -> None:
    with pytest.raises(SampleError, match=r"room for \d+ samples of 1,000, and 900 are wanted"):
        PackedTexts(stream, 1000, 900)


def test_a_tokenizer_without_an_end_is_refused(documents, tokenizer) -> None:
    class NoEnd:
        eos_token_id = None

    with pytest.raises(TextError, match="no end-of-text token"):
        token_stream(documents, NoEnd())


def test_the_beginnings_are_in_proportion(documents) -> None:
    some = beginnings(documents, sum(len(d.text) for d in documents) // 2)
    assert [len(d.text) for d in some] == [4000, 4500, 5000, 5500]
    assert [d.digest for d in some] == [d.digest for d in documents]
    assert [d.text for d in beginnings(documents, 10**9)] == [d.text for d in documents]


# facts ------------------------------------------------------------------------------------------------------


def test_all_facts_are_told_once_before_any_comes_again() -> None:
    pairs = own_pairs()
    told = forward_sentences(pairs, 3, seed=0)
    expected = sorted(pair.sentence for pair in pairs)
    rounds = [told[start : start + len(pairs)] for start in range(0, len(told), len(pairs))]
    assert [sorted(r) for r in rounds] == [expected] * 3
    assert rounds[0] != rounds[1]


def test_fact_samples_hold_all_sentences_and_no_padding(tokenizer) -> None:
    told = forward_sentences(own_pairs(), 1, seed=0)
    samples = pack_facts(told, tokenizer, 64)
    assert {len(sample) for sample in samples} == {65}
    ids = np.concatenate([*(sample[:-1] for sample in samples), samples[-1][-1:]])
    expected = [i for sentence in told for i in [*encode(tokenizer, sentence), tokenizer.eos_token_id]]
    assert ids[: len(expected)].tolist() == expected
    assert ids[len(expected) :].tolist() == expected[: len(ids) - len(expected)]  # filled from the start
    assert (ids == tokenizer.eos_token_id).mean() < 0.12
    assert len(pack_facts(told[:1], tokenizer, 500)) == 1
    assert pack_facts([], tokenizer, 64) == []


def test_both_sides_of_facts_are_completions_in_either_direction() -> None:
    (pairs,) = fact_sets(None).values()
    own = own_pairs()
    turned = [a != b for a, b in zip(pairs, own, strict=True)]
    assert all(b in (a, a.turned) for a, b in zip(pairs, own, strict=True))
    assert len(own) * 0.4 < sum(turned) < len(own) * 0.6
    capitals = [t for t, pair in zip(turned, own, strict=True) if "capital" in pair.source]
    assert capitals == [False, True] * (len(capitals) // 2)


# vocabulary -------------------------------------------------------------------------------------------------


def test_a_vocabulary_holds_every_text(documents, tokenizer, tmp_path) -> None:
    assert len(tokenizer) == 600
    for text in (documents[0].text, "naïve 漢字 \t\n1984 \x00"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert len(encode(tokenizer, "1984")) == 4
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == END_OF_TEXT
    ids = encode(tokenizer, documents[0].text)
    assert len(ids) < 0.6 * len(documents[0].text)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert encode(again, documents[0].text) == ids
    assert again.eos_token_id == tokenizer.eos_token_id


def test_no_vocabulary(documents, tmp_path) -> None:
    with pytest.raises(TextError, match="take 512 or more"):
        train_tokenizer(documents, 257)
    with pytest.raises(TextError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "none")


# data sets --------------------------------------------------------------------------------------------------


def test_a_data_set_is_read_by_the_package_datasets(tmp_path, monkeypatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["In the beginning", " ", "God created", "never read"]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(lines, encoding="utf-8")
    found = load_hub_documents(str(tmp_path / "set"), 3)
    assert [d.text for d in found] == ["In the beginning", "God created"]
    with pytest.raises(TextError, match="cannot be loaded"):
        load_hub_documents(str(tmp_path / "none"), 3)


def test_without_the_package_datasets_it_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TextError, match=r"pip install 'senri\[hub\]'"):
        load_hub_documents("any/thing", 3)
