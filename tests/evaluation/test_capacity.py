"""Capacity: bits by hand, choices one by one, and a planted memory that knows every value."""

import math
import re
from dataclasses import replace
from hashlib import sha256

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
from senri.evaluation.runner import MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY, Log
from senri.evaluation.statistics import separate, share
from senri.evaluation.suites import Bench, Sources
from senri.evaluation.write import to_json
from senri.hf.convert import convert_to_senri

WINDOW = 16
CONTROLS = (MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY)


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


@pytest.mark.parametrize("arm", capacity.ARMS)
def test_choosing_together_is_choosing_one_by_one(make_senri, tokens, monkeypatch, arm):
    monkeypatch.setattr(capacity, "ROWS", 3)
    reader = SenriReader(make_senri(), None, piece_size=9)
    ids, theirs = (tokens(1, 50, seed=seed)[0].numpy() for seed in (0, 1))
    without = reader.read(ids, 50, memory=False)
    state = {
        MEMORY: reader.read(ids, 50),
        MEMORY_OFF: without,
        OTHER_MEMORY: reader.with_memory_of(without, reader.memory_of(reader.read(theirs, 50))),
        QUESTION_ONLY: reader.blank(),
    }[arm]
    assert (state.state is None) == (arm == QUESTION_ONLY)
    prompts = [tokens(1, 2 + i % 3, seed=i)[0].tolist() for i in range(17)]
    candidates = [40, 9, 77, 3, 60, 51, 22, 15, 90, 33]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            logits = reader.model(torch.tensor([prompt]), past_key_values=state.fork()).logits[0, -1]
        expected.append(max(range(len(candidates)), key=lambda i: logits[candidates[i]].item()))
    tensors = lambda: {} if state.state is None else state.named_tensors()  # noqa: E731
    before = {name: t.clone() for name, t in tensors().items()}
    assert choose(reader, state, prompts, candidates) == expected
    assert len(set(expected)) > 3
    assert choose(reader, state, [], candidates) == []
    assert tensors().keys() == before.keys()
    for name, tensor in tensors().items():
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
    """A state is the text read and the text in the memory, None for an empty one."""

    def read(self, ids, at, *, memory=True):
        text = self.tokenizer.decode(ids[:at])
        return text, text if memory else None

    def memory_of(self, state):
        return state[1]

    def with_memory_of(self, state, other):
        return state[0], other

    def blank(self):
        return "", None


def pairs_of(text):
    return dict(re.findall(r"The word of (\w+ \w+) is (\w+)\.", text))


@pytest.fixture
def knowing(model, real_tokenizer, monkeypatch):
    """A model that knows ``share`` of the values that its memory was told; else it says no word at all (-1)."""

    def make(share=1.0):
        asked = []

        def choose(reader, state, prompts, candidates):
            words = [real_tokenizer.decode([token]).strip() for token in candidates]
            names = [re.fullmatch(r" The word of (\w+ \w+) is", real_tokenizer.decode(p))[1] for p in prompts]
            asked.append((state, names, words))
            told = pairs_of(state[1] or "")
            known = names[: round(share * len(names))]
            return [words.index(told[name]) if name in told and name in known else -1 for name in names]

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
    assert section.tables[0].columns == (
        "pairs", "asked", "texts", MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY,
        "bits recalled", "bits per state number", "verdict",
    )  # fmt: skip
    assert column(section, "pairs") == [6, 30]
    assert column(section, "asked") == [12, 40]  # no more than there are
    assert column(section, "texts") == [2, 2]
    assert column(section, "bits recalled") == [48.0, 240.0]
    cells = column(section, "bits per state number")
    assert [cell.split(" ")[0] for cell in cells] == [f"{8 * 6 / floats:.5f}", f"{8 * 30 / floats:.5f}"]
    assert cells[1].endswith(f", {8 * 30 / floats:.5f}]")
    assert column(section, MEMORY)[1].startswith("100% [9")
    for control in CONTROLS:
        assert column(section, control)[1].startswith("0% [0%")
    assert column(section, "verdict") == ["recalls", "recalls"]
    curves = {s.name: s for s in section.figures[0].series}
    assert list(curves) == [MEMORY, *CONTROLS, "knows the words, not whose"]
    assert curves[MEMORY].y == (1.0, 1.0)
    for control in CONTROLS:
        assert curves[control].y == (0.0, 0.0)
    assert curves["knows the words, not whose"].y == (1 / 6, 1 / 30)
    assert [name for name, s in curves.items() if s.dashed] == ["knows the words, not whose"]
    to_json(Report("x", {}, (section,)))


def test_a_memory_that_knows_half_and_one_that_knows_nothing(run, knowing):
    suite, records = run(knowing(0.5), (20,), 20, 2)
    section = suite.section(records, WINDOW)
    assert column(section, "bits recalled") == [pytest.approx(20 * 3.0028233, abs=1e-4)]
    assert column(section, "verdict") == ["recalls"]
    for record in records:
        record["arms"] = dict.fromkeys(capacity.ARMS, 0)
    section = suite.section(records, WINDOW)
    assert column(section, "bits recalled") == [0.0]
    assert column(section, "verdict") == ["nothing shown"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_memory_must_be_above_every_control(run, knowing, control):
    suite, records = run(knowing(0.5), (20,), 20, 2)
    for right, verdict in ((0, "recalls"), (3, "recalls"), (8, "nothing shown"), (10, "nothing shown")):
        for record in records:  # what gives it away without this text's memory is no memory
            record["arms"] = {**dict.fromkeys(capacity.ARMS, 0), MEMORY: 10, control: right}
        found = separate(share(20, 40), share(2 * right, 40)) > 0
        assert found == (verdict == "recalls")
        assert column(suite.section(records, WINDOW), "verdict") == [verdict]


@pytest.mark.parametrize(
    ("pairs", "n", "right", "verdict"),
    [
        (2, 40, 24, "nothing shown"),  # a coin, for two words told
        (2, 40, 28, "recalls"),
        (20, 40, 8, "recalls"),
        (20, 400, 26, "nothing shown"),  # above controls that find none, yet not above 1 in 20
        (1000, 10_000, 20, "nothing shown"),  # above 1 in 1000, but there are 256 words
        (1000, 10_000, 60, "recalls"),
    ],
)  # fmt: skip
def test_knowing_the_words_and_not_whose_is_no_recall(pairs, n, right, verdict):
    record = {"pairs": pairs, "n": n, "floats": 144, "arms": {**dict.fromkeys(CONTROLS, 0), MEMORY: right}}
    assert separate(share(right, n), share(0, n)) > 0
    assert (share(right, n).low > 1 / min(pairs, 256)) == (verdict == "recalls")
    section = CapacitySuite(None, (pairs,), n, 1).section([record], WINDOW)
    assert column(section, "verdict") == [verdict]
    (dashed,) = [s for s in section.figures[0].series if s.dashed]
    assert (dashed.x, dashed.y) == ((float(pairs),), (1 / min(pairs, 256),))


def test_each_arm_is_asked_once_from_its_own_state(run, knowing):
    reader = knowing()
    _, records = run(reader, (5, 12), 8, 2)
    assert [r["n"] for r in records] == [5, 5, 8, 8]
    assert len(reader.asked) == 4 * len(records)
    for i, record in enumerate(records):
        asked = reader.asked[4 * i : 4 * i + 4]
        (text, names, words), *_ = asked
        other = asked[2][0][1]
        assert [state for state, *_ in asked] == [(text[0], text[0]), (text[0], None), (text[0], other), ("", None)]
        assert len(pairs_of(text[0])) == len(pairs_of(other)) == record["pairs"]
        assert pairs_of(text[0]) != pairs_of(other)
        assert len(set(names)) == record["n"]
        assert all(other_names == names for _, other_names, _ in asked)
        expected = [words.index(pairs_of(text[0])[name]) for name in names]
        theirs = [words.index(pairs_of(other)[name]) if name in pairs_of(other) else -1 for name in names]
        nothing = [-1] * len(names)
        assert record["expected"] == expected
        said = {MEMORY: expected, MEMORY_OFF: nothing, OTHER_MEMORY: theirs, QUESTION_ONLY: nothing}
        assert record["said"] == said
        right = sum(a == b for a, b in zip(theirs, expected, strict=True))
        assert record["arms"] == {MEMORY: record["n"], MEMORY_OFF: 0, OTHER_MEMORY: right, QUESTION_ONLY: 0}
    # both samples of a size have the same stranger, who is none of them
    assert [reader.asked[i][0][1] for i in (2, 10)] == [reader.asked[i][0][1] for i in (6, 14)]
    assert len({reader.asked[i][0][0] for i in (0, 4, 8, 12)}) == 4


def test_no_pair_is_in_the_window_when_it_is_asked(run, knowing, real_tokenizer):
    texts = []
    reader = knowing()
    read = reader.read
    reader.read = lambda ids, at, memory=True: texts.append((ids, at, memory)) or read(ids, at, memory=memory)
    _, (record,) = run(reader, (5,), 5, 1)
    mine = [(ids, memory) for ids, _, memory in texts if sha256(ids.tobytes()).hexdigest() == record["prompt_sha256"]]
    assert sorted(memory for _, memory in mine) == [False, True]
    assert len(texts) == 3  # and the stranger's
    for ids, at, _ in texts:
        assert at == len(ids)
        assert "The word of" not in real_tokenizer.decode(ids[-WINDOW:])
        assert real_tokenizer.decode(ids[:-WINDOW]).count("The word of") == 5
    for ids, _ in mine:
        assert len(ids) == record["tokens"] + WINDOW


@pytest.mark.slow
def test_a_run_on_a_model_resumes_without_asking_again(run, model, real_tokenizer, tmp_path):
    said = []
    reader = SenriReader(model, real_tokenizer, piece_size=64)
    suite, records = run(reader, (4, 12), 5, 2, said)
    assert [r["key"] for r in records] == [f"capacity/{pairs}/{i}" for pairs in (4, 12) for i in (0, 1)]
    assert [r["n"] for r in records] == [4, 4, 5, 5]
    for r in records:
        assert list(r["arms"]) == list(r["said"]) == list(capacity.ARMS)
        assert len(r["expected"]) == r["n"]
        for arm, answers in r["said"].items():
            assert len(answers) == r["n"]
            assert all(0 <= index < CHOICES for index in [*answers, *r["expected"]])
            assert r["arms"][arm] == sum(a == b for a, b in zip(answers, r["expected"], strict=True))
    assert len({r["prompt_sha256"] for r in records}) == 4
    # the arms are really read differently
    for control in CONTROLS:
        assert [r["said"][control] for r in records] != [r["said"][MEMORY] for r in records]
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


def test_a_check_complains_before_the_model_is_asked(sources):
    CapacitySuite(sources, (4, 12), 5, 2).check()
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    with pytest.raises(SampleError, match=r"^there are names for [\d,]+ pairs, not for"):
        CapacitySuite(sources, (4, names + 1), 5, 2).check()
    letters = lambda text, **options: {"input_ids": [ord(c) for c in text]}  # noqa: E731
    with pytest.raises(SampleError, match=r"has 0 nouns of one token"):
        CapacitySuite(replace(sources, tokenizer=letters), (4,), 5, 2).check()


def test_a_model_without_memory_layers_has_no_bits_per_number(run, knowing):
    suite, records = run(knowing(), (5,), 5, 1)
    for record in records:
        record["floats"] = 0
    assert column(suite.section(records, WINDOW), "bits per state number") == [None]
