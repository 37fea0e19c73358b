"""The reversal figures: hand-computed, planted, resumed, and with a memory that is really on or off."""

import math
from dataclasses import astuple
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from senri.data.haystack import RepeatedHaystack, encode
from senri.data.reversal import Pair, made_up_pairs
from senri.evaluation.completions import (
    Scored,
    completion_nll,
    evaluate_reversal,
    model_scorer,
    reversal_figures,
    saved,
)
from senri.evaluation.markdown import cells
from senri.evaluation.readers import FullAttentionReader, SenriReader, without_memory
from senri.evaluation.reversal import BEYOND, MEMORY_CROSSED, MODEL, OFF_CROSSED, ReversalSuite, reversal
from senri.evaluation.runner import ARMS, FULL_ATTENTION, MEMORY, MEMORY_OFF, OTHER_MEMORY, QUESTION_ONLY, Log
from senri.evaluation.suites import Bench, Sources

WINDOW = 128  # longer than a question with its answer, in letters


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 94 + 3 for letter in text]}


class Counting(SenriReader):
    """Counts readings."""

    readings = 0

    def read(self, ids, at, *, memory=True):
        self.readings += 1
        return super().read(ids, at, memory=memory)


PAIRS = [Pair(f"{i} is", f" b{i}", f"b{i} is", f" a{i}", "test") for i in range(20)]


def bench_for(model, path, base=None, kind=SenriReader, longest=4096):
    full = None
    if base is not None:
        full = FullAttentionReader(base, Letters())
        full.longest = longest
    return Bench(kind(model, Letters()), full, Letters(), Log(path))


@pytest.fixture
def suite():
    sources = Sources(RepeatedHaystack(Letters()), Letters(), 5)
    return ReversalSuite(sources, tuple(PAIRS[:3]), tuple(made_up_pairs(3, Random(0))))


# scoring ----------------------------------------------------------------------------------------------------


def test_a_completion_is_scored_token_by_token(make_base, make_senri):
    prompt, completion = [5, 9, 13], [7, 8, 21, 4]
    for model in (make_base(), make_senri(), make_base("qwen2")):
        expected, text = 0.0, list(prompt)
        for token in completion:
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1]
            expected -= float(logits[token] - logits.logsumexp(0))
            text.append(token)
        assert completion_nll(model, prompt, completion) == pytest.approx(expected, rel=1e-5)


def test_right_padding_in_a_batch_changes_nothing(make_base, make_senri):
    rows = [([5, 9, 13], [7, 8]), ([30], [31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41]), ([3, 4], [5])]
    for model in (make_base(), make_senri()):
        ids = torch.zeros(3, 12, dtype=torch.long)
        for row, (prompt, completion) in enumerate(rows):
            ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)
        for row, (prompt, completion) in enumerate(rows):
            first = len(prompt) - 1
            padded = -sum(float(logs[row, first + i, token]) for i, token in enumerate(completion))
            assert completion_nll(model, prompt, completion) == pytest.approx(padded, rel=1e-5)


def test_a_state_is_gone_on_from_and_stays_as_it_is(make_base, make_senri):
    read, prompt, completion = list(range(3, 43)), [50, 51], [52, 53, 54]
    senri = make_senri()
    state = SenriReader(senri, None).read(np.array(read, dtype=np.int32), 40)
    before = {name: tensor.clone() for name, tensor in state.named_tensors().items()}
    whole = completion_nll(senri, [*read, *prompt], completion)
    for _ in range(2):
        assert completion_nll(senri, prompt, completion, state) == pytest.approx(whole, rel=1e-5)
    assert state.columns == 40
    assert all(torch.equal(before[name], tensor) for name, tensor in state.named_tensors().items())
    assert completion_nll(senri, prompt, completion) != pytest.approx(whole, rel=1e-3)
    base = make_base()
    with torch.no_grad():
        cache = base(torch.tensor([read]), use_cache=True).past_key_values
    for _ in range(2):
        expected = completion_nll(base, [*read, *prompt], completion)
        assert completion_nll(base, prompt, completion, cache) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_scored(make_senri):
    model = make_senri()
    for prompt, completion in (([], [3]), ([3], [])):
        with pytest.raises(ValueError, match="one token or more"):
            completion_nll(model, prompt, completion)
    model.reset_memory()
    with pytest.raises(ValueError, match="end_session"):
        completion_nll(model, [3], [4])
    model.end_session()
    with pytest.raises(ValueError, match="eval"):
        completion_nll(model.train(), [3], [4])
    model.eval().lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        completion_nll(model, [3], [4])


def test_texts_are_scored_as_tokens_behind_the_lead(make_base):
    base, letters = make_base(), Letters()
    nll, count = model_scorer(base, letters, lead="\n")("The cat", " sat")
    assert count == 4
    assert nll == completion_nll(base, encode(letters, "\nThe cat"), encode(letters, " sat"))


# figures ----------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    # 6 nats over 3 tokens forward, 3 nats over 6 backward: e^2, e^0.5; not the mean of the facts' own means
    figures = reversal_figures([Scored(5.0, 1, 1.0, 5), Scored(1.0, 2, 2.0, 1)])
    assert figures.n == 2
    assert figures.forward.value == pytest.approx(math.exp(2))
    assert figures.backward.value == pytest.approx(math.exp(0.5))
    assert figures.ratio.value == pytest.approx(math.exp(1.5))
    assert figures.gap.value == pytest.approx(math.exp(0.5) - math.exp(2))
    # drawn are the first twice, one of each, or the second twice
    assert (figures.forward.low, figures.forward.high) == pytest.approx((math.exp(0.5), math.exp(5)))


def test_a_planted_model_that_knows_one_direction():
    forward = {pair.forward_prompt for pair in PAIRS}
    rng = np.random.default_rng(0)

    def score(prompt, completion):
        tokens = len(completion)
        return float((0.1 if prompt in forward else 4.0) * tokens * rng.uniform(0.8, 1.2)), tokens

    known = reversal_figures(evaluate_reversal(score, PAIRS))
    assert known.ratio.value == pytest.approx(math.exp(-3.9), rel=0.5)
    assert 0 < known.ratio.low < known.ratio.value < known.ratio.high < 0.1
    assert 20 < known.gap.low < known.gap.value < known.gap.high
    turned = reversal_figures(evaluate_reversal(score, [pair.turned for pair in PAIRS]))
    assert turned.ratio.low > 10
    assert turned.gap.high < -20
    same = reversal_figures(evaluate_reversal(lambda p, c: (2.0 * len(c), len(c)), PAIRS))
    assert same.ratio == pytest.approx((1, 1, 1))
    assert same.gap == pytest.approx((0, 0, 0))


def test_intervals_narrow_with_facts_and_are_the_same_every_time():
    rng = np.random.default_rng(1)
    scored = [Scored(*rng.uniform(1, 3, 1), 2, *rng.uniform(1, 3, 1), 2) for _ in range(400)]
    few, many = reversal_figures(scored[:25]).forward, reversal_figures(scored).forward
    assert many == reversal_figures(scored).forward
    assert many.high - many.low < (few.high - few.low) / 2
    # the mean nats' standard error is 1/√12 a token of 2, so 0.577 / 2 / √400
    assert math.log(many.high / many.low) == pytest.approx(2 * 1.96 * 0.577 / 2 / 20, rel=0.15)


def test_what_is_not_known_is_none():
    one = reversal_figures([Scored(2.0, 2, 2.0, 1)])
    assert one.forward == (pytest.approx(math.e), None, None)
    endless = reversal_figures([Scored(5000.0, 2, 5000.0, 2)] * 2)
    assert {v for figure in astuple(endless)[1:] for v in figure} == {None}
    with pytest.raises(ValueError, match="one fact"):
        reversal_figures([])


def test_saved_nats_by_hand():
    memory, control = [Scored(1.0, 2, 6.0, 3), Scored(2.0, 1, 1.0, 1)], [Scored(5.0, 2, 6.0, 3), Scored(4.0, 1, 0.0, 1)]
    forward, backward = saved(memory, control)
    assert forward == pytest.approx((2.0, 2.0, 2.0))  # (4 + 2) / 3; 4 / 2; 2 / 1
    assert backward == pytest.approx((-0.25, -1.0, 0.0))
    with pytest.raises(ValueError, match="same facts"):
        saved(memory, control[:1])


# the suite --------------------------------------------------------------------------------------------------


def test_a_run_scores_every_arm_and_is_resumed_without_reading(make_base, make_senri, tmp_path, suite):
    model, base = make_senri(sliding_window_size=WINDOW), make_base()
    bench = bench_for(model, tmp_path / "log.jsonl", base, Counting)
    suite.run(bench)
    assert list(bench.log.records) == [*(f"reversal/known/{i}" for i in range(3)), "reversal/read/0", "reversal/read/1"]
    assert bench.reader.readings == 2 * 2 + 1, "with and without memory for each fact, and the other memory"
    known, read = bench.log.records["reversal/known/1"], bench.log.records["reversal/read/1"]
    assert list(known["arms"]) == [MODEL, FULL_ATTENTION]
    assert set(read["arms"]) == {*ARMS, MEMORY_CROSSED, OFF_CROSSED}
    assert known["arms"][MODEL] == evaluate_reversal(model_scorer(model, Letters()), PAIRS[1:2])[0]._asdict()
    assert known["arms"][FULL_ATTENTION] == evaluate_reversal(model_scorer(base, Letters()), PAIRS[1:2])[0]._asdict()
    bench.log.close()

    again = bench_for(model, tmp_path / "log.jsonl", base, Counting)
    suite.run(again)
    assert again.reader.readings == 0
    assert again.log.records == bench.log.records
    del again.log.records["reversal/read/1"]
    suite.run(again)
    assert again.log.records == bench.log.records, "one fact asked for again gives what the whole run gave"
    other = ReversalSuite(suite.sources, suite.known, tuple(made_up_pairs(3, Random(1))))
    with pytest.raises(ValueError, match="of another run"):
        other.run(again)
    again.log.close()


def test_each_arm_is_the_state_it_is_named_after(make_base, make_senri, tmp_path, suite):
    base, model = make_base(), make_senri(sliding_window_size=WINDOW)
    bench = bench_for(model, tmp_path / "log.jsonl", base)
    suite.run(bench)
    bench.log.close()
    arms, letters = bench.log.records["reversal/read/0"]["arms"], Letters()
    pair = suite.new[0]
    ids = _context(suite, pair, 0)
    reader = SenriReader(model, letters)
    length = len(ids)
    question = encode(letters, "\n" + pair.backward_prompt), encode(letters, pair.backward_completion)

    def backward(model, cache=None, before=()):
        return completion_nll(model, [*before, *question[0]], question[1], cache)

    nll = {arm: arms[arm]["backward_nll"] for arm in arms}
    assert nll[MEMORY] == pytest.approx(backward(model, before=ids.tolist()), rel=1e-4)
    assert nll[QUESTION_ONLY] == pytest.approx(backward(model), rel=1e-6)
    assert nll[FULL_ATTENTION] == pytest.approx(backward(base, before=ids.tolist()), rel=1e-4)
    # a model whose memory is silent has only the window
    silent = make_senri(sliding_window_size=WINDOW, random=False)
    assert nll[MEMORY_OFF] == pytest.approx(backward(silent, before=ids.tolist()), rel=1e-4)
    assert nll[MEMORY_OFF] == pytest.approx(backward(model, reader.read(ids, length, memory=False)), rel=1e-6)
    stranger = _context(suite, suite.new[2], 2)
    mixed = reader.with_memory_of(
        reader.read(ids, length, memory=False), reader.memory_of(reader.read(stranger, len(stranger)))
    )
    assert nll[OTHER_MEMORY] == pytest.approx(backward(model, mixed), rel=1e-6)
    # a prompt that asks for a name, as the fact's own does
    another = encode(letters, "\n" + suite.new[1].forward_prompt)
    assert another != question[0]
    assert "The person known as" in suite.new[1].forward_prompt
    for arm, state in ((MEMORY_CROSSED, True), (OFF_CROSSED, False)):
        crossed = completion_nll(model, another, question[1], reader.read(ids, length, memory=state))
        assert nll[arm] == pytest.approx(crossed, rel=1e-6)
    assert len({round(value, 3) for value in nll.values()}) == 7, "arms that cannot be told apart show nothing"


def test_memory_off_is_an_emptied_memory_where_the_read_enters_nothing_else(make_senri, tmp_path, suite):
    model = make_senri(sliding_window_size=WINDOW, memory_readout="head")
    bench = bench_for(model, tmp_path / "log.jsonl")
    suite.run(bench)
    bench.log.close()
    record, pair = bench.log.records["reversal/read/1"], suite.new[1]
    ids = _context(suite, pair, 1)
    emptied = without_memory(SenriReader(model, Letters()).read(ids, len(ids)))
    expected = evaluate_reversal(model_scorer(model, Letters(), emptied, "\n"), [pair])[0]
    assert record["arms"][MEMORY_OFF] == pytest.approx(expected._asdict(), rel=1e-6)
    assert record["arms"][MEMORY]["forward_nll"] != pytest.approx(expected.forward_nll, rel=1e-3)


def _context(suite, pair, number):
    """The text that is read, put together from what the suite promises."""
    fact = encode(Letters(), " " + pair.sentence)
    filler = suite.sources.books.unit.tolist()
    first = max(cut for cut in range(0, 65, len(filler)))
    length = 64 + len(fact) + WINDOW + BEYOND
    text = [*(filler * 40)[:first], *fact, *(filler * 40)[: length - first - len(fact)]]
    assert len(text) - (first + len(fact)) >= WINDOW + BEYOND, "the fact has left the window"
    return np.array(text, dtype=np.int32)


def test_full_attention_only_where_it_fits(make_base, make_senri, tmp_path, suite):
    bench = bench_for(make_senri(sliding_window_size=WINDOW), tmp_path / "log.jsonl", make_base(), longest=256)
    suite.run(bench)
    bench.log.close()
    assert FULL_ATTENTION in bench.log.records["reversal/known/0"]["arms"]
    assert FULL_ATTENTION not in bench.log.records["reversal/read/0"]["arms"]


def test_the_factory_takes_own_or_no_new_facts(tmp_path):
    sources = SimpleNamespace(seed=7)
    both = reversal(sources, folder=None, facts=4)
    assert (both.name, len(both.known), len(both.new)) == ("reversal", 60, 5)
    assert both == reversal(sources, folder=None, facts=4)
    assert reversal(sources, folder=None, facts=0).new == ()
    with pytest.raises(ValueError, match="no such file"):
        reversal(sources, folder=str(tmp_path), facts=0)


# the section ------------------------------------------------------------------------------------------------


def records(task, figures):
    """Three equal facts; ``figures``: (forward nats, backward nats) a token, by arm."""
    arms = {arm: Scored(2 * f, 2, 3 * b, 3)._asdict() for arm, (f, b) in figures.items()}
    return [{"key": f"{task}/{i}", "task": task, "arms": arms} for i in range(3)]


def test_the_section_shows_planted_figures(suite):
    e = math.log
    mine = [
        *records("reversal/known", {FULL_ATTENTION: (e(3), e(6)), MODEL: (e(2), e(8))}),
        *records("reversal/read", {MEMORY_OFF: (e(30), e(40)), MEMORY: (e(10), e(40)), QUESTION_ONLY: (e(5), e(80))}),
    ]
    crossed = records("reversal/read", {MEMORY_CROSSED: (e(2), e(9)), OFF_CROSSED: (e(2), e(3))})
    for record, more in zip(mine[3:], crossed, strict=True):
        record["arms"] |= more["arms"]
    section = suite.section([{"key": "niah/0", "task": "niah"}, *mine], 1024)
    known, read, gains = section.tables
    assert cells(known) == [
        ["model", "3", "2.0 [2.0, 2.0]", "8.0 [8.0, 8.0]", "0.25 [0.25, 0.25]", "+6.0 [+6.0, +6.0]"],
        ["full attention", "3", "3.0 [3.0, 3.0]", "6.0 [6.0, 6.0]", "0.50 [0.50, 0.50]", "+3.0 [+3.0, +3.0]"],
    ]
    assert [row[0] for row in read.rows] == [MEMORY, MEMORY_OFF, QUESTION_ONLY, MEMORY_CROSSED, OFF_CROSSED]
    assert cells(read)[0][2:] == ["10.0 [10.0, 10.0]", "40.0 [40.0, 40.0]", "0.25 [0.25, 0.25]", "+30.0 [+30.0, +30.0]"]
    assert "1,536 tokens" in read.title
    assert cells(gains) == [
        [MEMORY, MEMORY_OFF, "3", "+1.099 [+1.099, +1.099]", "+0.000 [+0.000, +0.000]"],
        [MEMORY, QUESTION_ONLY, "3", "-0.693 [-0.693, -0.693]", "+0.693 [+0.693, +0.693]"],
        [MEMORY_CROSSED, OFF_CROSSED, "3", "+0.000 [+0.000, +0.000]", "-1.099 [-1.099, -1.099]"],
    ]


def test_sections_of_a_part_or_of_nothing(suite):
    assert suite.section([], None).tables == ()
    (known,) = suite.section(records("reversal/known", {MODEL: (1.0, 1.0)})[:1], 8).tables
    assert known.rows == ((MODEL, 1, "2.7", "2.7", "1.00", "+0.0"),)
    endless = suite.section(records("reversal/known", {MODEL: (1e4, 1e4)}), 8).tables[0]
    assert cells(endless) == [[MODEL, "3", "–", "–", "–", "–"]]
