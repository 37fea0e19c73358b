"""Capacity: bits by hand, choices one by one, and a planted memory that knows every value."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, encode
from senri.data.samples import SampleError
from senri.data.words import FIRST_NAMES, LAST_NAMES
from senri.evaluation import capacity
from senri.evaluation.capacity import (
    CHOICES,
    CapacitySuite,
    choose,
    memory_floats,
    recalled_bits,
    single_token_words,
)
from senri.evaluation.readers import SenriReader
from senri.evaluation.report import Report
from senri.evaluation.runner import MEMORY, MEMORY_OFF, Log
from senri.evaluation.suites import Bench, Sources
from senri.evaluation.write import to_json
from senri.hf.convert import convert_to_senri

WINDOW = 16


# bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [2, 10, 256])
def test_bits_from_chance_to_certainty(choices):
    assert recalled_bits(1.0, choices) == math.log2(choices)
    for p in (0.0, 0.5 / choices, 1 / choices):
        assert recalled_bits(p, choices) == 0.0
    assert recalled_bits(1 / choices + 1e-9, choices) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "choices", "bits"),
    [
        (0.9, 2, 0.5310044),  # the binary symmetric channel: 1 − H(0.1)
        (0.75, 2, 0.1887219),
        (0.5, 4, 0.2075187),  # 2 − H(0.5) − 0.5·log2(3)
        (0.5, 256, 3.0028233),  # 8 − 1 − 0.5·log2(255)
    ],
)
def test_bits_by_hand(p, choices, bits):
    assert recalled_bits(p, choices) == pytest.approx(bits, abs=1e-6)


@settings(deadline=None)
@given(st.integers(2, 1000), st.floats(0, 1), st.floats(0, 1))
def test_more_right_answers_are_never_fewer_bits(choices, p, q):
    low, high = sorted((p, q))
    assert -1e-9 <= recalled_bits(low, choices) <= recalled_bits(high, choices) + 1e-9
    assert recalled_bits(high, choices) <= math.log2(choices) + 1e-9


# words --------------------------------------------------------------------------------------------------------


def test_the_values_are_256_different_words_of_one_token(real_tokenizer):
    values = single_token_words(real_tokenizer)
    assert values == single_token_words(real_tokenizer)
    assert len({word for word, _ in values}) == len({token for _, token in values}) == CHOICES == 256
    for word, token in values:
        assert encode(real_tokenizer, f" {word}") == [token]
        said = encode(real_tokenizer, capacity.FACT.format(key="Ada Abbott", value=word))
        assert said == [*encode(real_tokenizer, capacity.ASK.format(key="Ada Abbott")), token, said[-1]]


def test_a_tokenizer_without_so_many_words_is_refused():
    letters = lambda text, **options: {"input_ids": [ord(c) for c in text]}  # noqa: E731
    with pytest.raises(SampleError, match=r"has 0 nouns of one token, and 256 are needed"):
        single_token_words(letters)


# choices ------------------------------------------------------------------------------------------------------


def test_choosing_together_is_choosing_one_by_one(make_senri, tokens, monkeypatch):
    monkeypatch.setattr(capacity, "ROWS", 3)
    reader = SenriReader(make_senri(), None, piece_size=9)
    state = reader.read(tokens(1, 50)[0].numpy(), 50)
    prompts = [tokens(1, 2 + i % 3, seed=i)[0].tolist() for i in range(17)]
    candidates = [40, 9, 77, 3, 60, 51, 22, 15, 90, 33]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            logits = reader.model(torch.tensor([prompt]), past_key_values=state.fork()).logits[0, -1]
        expected.append(max(range(len(candidates)), key=lambda i: logits[candidates[i]].item()))
    before = {name: t.clone() for name, t in state.named_tensors().items()}
    assert choose(reader, state, prompts, candidates) == expected
    assert len(set(expected)) > 3
    assert choose(reader, state, [], candidates) == []
    for name, tensor in state.named_tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("options", "floats"),
    [  # 2 layers of 2 memories, 8 wide
        ({"update_rule": "linear"}, 2 * 2 * (8 * 8 + 8)),
        ({"update_rule": "delta"}, 2 * 2 * (8 * 8 + 8)),  # what it held when the segment began is no capacity
        ({"update_rule": "delta_token"}, 2 * 2 * 8 * 8),
        ({"update_rule": "gated_delta"}, 2 * 2 * 8 * 8),
        ({"update_rule": "linear", "feature_map": "dpfp"}, 2 * 2 * (8 * 16 + 16)),
        ({"update_rule": "delta_token", "num_memory_layers": 1}, 2 * 8 * 8),
        ({"num_memory_layers": 0}, 0),
    ],
)
def test_the_numbers_of_a_memory(make_senri, options, floats):
    assert memory_floats(SenriReader(make_senri(random=False, **options), None)) == floats


# the suite ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(randomise):
    """Tiny, with the vocabulary of the real tokenizer."""
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 49152}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    special = {"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    base = LlamaForCausalLM(LlamaConfig(**fields, **heads, **special, initializer_range=0.2)).eval()
    memory = {"num_memory_layers": 1, "first_memory_layer": 0, "memory_num_heads": 2, "memory_head_dim": 8}
    window = {"sliding_window_size": WINDOW, "chunk_size": 16, "segment_size": 50}
    return randomise(convert_to_senri(base, **memory, **window, update_rule="linear"))


@pytest.fixture(scope="module")
def sources(real_tokenizer, real_text):
    books = BookHaystack([Document("excerpt", real_text[:20_000])], real_tokenizer)
    return Sources(books, real_tokenizer, 0)


@pytest.fixture
def run(sources, tmp_path):
    """``(suite options, reader)`` -> records; the log is kept between runs."""

    def run(reader, pairs, questions, samples, said=None):
        suite = CapacitySuite(sources, pairs, questions, samples)
        log = Log(tmp_path / "log.jsonl")
        progress = (lambda text: None) if said is None else said.append
        try:
            suite.run(Bench(reader, None, sources.tokenizer, log, progress))
        finally:
            log.close()
        return suite, list(log.records.values())

    return run


class Knowing(SenriReader):
    """A state is the text read and whether there is a memory of it."""

    def read(self, ids, at, *, memory=True):
        return self.tokenizer.decode(ids[:at]), memory


@pytest.fixture
def knowing(model, real_tokenizer, monkeypatch):
    """A model whose memory knows ``share`` of the values told; without it the first word is always said."""

    def make(share=1.0):
        asked = []

        def choose(reader, state, prompts, candidates):
            text, memory = state
            words = [real_tokenizer.decode([token]).strip() for token in candidates]
            told = dict(re.findall(r"The word of (\w+ \w+) is (\w+)\.", text))
            asked.append(len(prompts))
            names = [re.fullmatch(r" The word of (\w+ \w+) is", real_tokenizer.decode(p))[1] for p in prompts]
            right = [words.index(told[name]) for name in names]
            known = round(share * len(right)) if memory else 0
            return [answer if i < known else (answer + 1) % CHOICES for i, answer in enumerate(right)]

        monkeypatch.setattr(capacity, "choose", choose)
        reader = Knowing(model, real_tokenizer)
        reader.asked = asked
        return reader

    return make


def column(section, name):
    (table,) = section.tables
    return [row[table.columns.index(name)] for row in table.rows]


def test_a_memory_that_knows_holds_8_bits_a_pair(run, knowing, model):
    suite, records = run(knowing(), (6, 30), 20, 2)
    section = suite.section(records, WINDOW)
    floats = 2 * (8 * 8 + 8)
    assert {r["floats"] for r in records} == {floats}
    assert column(section, "pairs") == [6, 30]
    assert column(section, "asked") == [12, 40]  # no more than there are
    assert column(section, "bits recalled") == [48.0, 240.0]
    cells = column(section, "bits per state number")
    assert [cell.split(" ")[0] for cell in cells] == [f"{8 * 6 / floats:.5f}", f"{8 * 30 / floats:.5f}"]
    assert cells[1].endswith(f", {8 * 30 / floats:.5f}]")
    assert column(section, MEMORY)[1].startswith("100% [9")
    assert column(section, MEMORY_OFF)[1].startswith("0% [0%")
    assert column(section, "verdict") == ["recalls", "recalls"]
    curves = {s.name: s for s in section.figures[0].series}
    assert curves[MEMORY].y == (1.0, 1.0)
    assert curves["chance"].y == (1 / 256,) * 2
    to_json(Report("x", {}, (section,)))


def test_a_memory_that_knows_half_and_one_that_knows_nothing(run, knowing):
    suite, records = run(knowing(0.5), (20,), 20, 2)
    section = suite.section(records, WINDOW)
    assert column(section, "bits recalled") == [pytest.approx(20 * 3.0028233, abs=1e-4)]
    assert column(section, "verdict") == ["recalls"]
    for record in records:
        record["arms"] = {MEMORY: 0, MEMORY_OFF: 0}
    section = suite.section(records, WINDOW)
    assert column(section, "bits recalled") == [0.0]
    assert column(section, "verdict") == ["nothing shown"]
    for record in records:
        record["arms"][MEMORY_OFF] = 10  # a window that gives it away is no memory
    assert column(suite.section(records, WINDOW), "verdict") == ["nothing shown"]


def test_no_pair_is_in_the_window_when_it_is_asked(run, knowing, real_tokenizer):
    texts = []
    reader = knowing()
    read = reader.read
    reader.read = lambda ids, at, memory=True: texts.append((ids, at)) or read(ids, at, memory=memory)
    _, records = run(reader, (5,), 5, 1)
    for ids, at in texts:
        assert at == len(ids) == records[0]["tokens"] + WINDOW
        assert "The word of" not in real_tokenizer.decode(ids[-WINDOW:])
        assert real_tokenizer.decode(ids[: records[0]["tokens"]]).count("The word of") == 5


def test_a_run_on_a_model_resumes_without_asking_again(run, model, real_tokenizer, tmp_path):
    said = []
    reader = SenriReader(model, real_tokenizer, piece_size=64)
    suite, records = run(reader, (4, 12), 5, 2, said)
    assert [r["key"] for r in records] == [f"capacity/{pairs}/{i}" for pairs in (4, 12) for i in (0, 1)]
    assert [r["n"] for r in records] == [4, 4, 5, 5]
    assert all(0 <= right <= r["n"] for r in records for right in r["arms"].values())
    assert len(said) == 4
    before, read = (tmp_path / "log.jsonl").read_bytes(), reader.tokens_read
    assert run(reader, (4, 12), 5, 2, said)[1] == records
    assert (reader.tokens_read, len(said)) == (read, 4)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    lines = before.splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    assert run(SenriReader(model, real_tokenizer, piece_size=64), (4, 12), 5, 2)[1] == records
    assert suite.section(records, WINDOW).tables


def test_more_pairs_than_names_are_refused(run, knowing):
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    with pytest.raises(SampleError, match=rf"^there are names for [\d,]+ pairs, not for {names + 1:,}: ask for fewer$"):
        run(knowing(), (names + 1,), 5, 1)


def test_a_model_without_memory_layers_has_no_bits_per_number(run, knowing):
    suite, records = run(knowing(), (5,), 5, 1)
    for record in records:
        record["floats"] = 0
    assert column(suite.section(records, WINDOW), "bits per state number") == [None]
