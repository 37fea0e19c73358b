"""The harness with planted models whose score is known beforehand, and with a leak put in on purpose."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, encode
from senri.data.needle_tasks import NIAH
from senri.data.needles import distance_context, needle_contexts, shared_context, together_contexts
from senri.data.samples import Context, Question
from senri.evaluation import runner
from senri.evaluation.recall import distance_section, group, recall_section
from senri.evaluation.runner import (
    ARMS,
    AT_ONCE,
    FULL_ATTENTION,
    MEMORY,
    MEMORY_OFF,
    OTHER_MEMORY,
    QUESTION_ONLY,
    STRANGER,
    Log,
    RecallTask,
    run_task,
    window_facts,
)

WINDOW = 256
DEPTHS = [i / 20 for i in range(21)]


class Planted:
    """Answers by searching the text that it can see: the window's, and with ``copies`` also all that was read.

    A state is (ids in memory, ids in the window).
    """

    def __init__(self, tokenizer, *, copies, window=WINDOW, longest=None):
        self.tokenizer, self.copies, self.window, self.longest = tokenizer, copies, window, longest
        self.readings = 0
        self.answered = []  # rows of each call

    def read(self, ids, at, *, memory=True):
        self.readings += 1
        window = ids[max(at - self.window, 0) : at] if self.window else ids[:at]
        return (ids[:at] if self.copies and memory else ids[:0], window)

    def with_memory_of(self, state, other):
        return (other, state[1])

    def memory_of(self, state):
        return state[0]

    def blank(self):
        empty = np.empty(0, dtype=np.int32)
        return (empty, empty)

    def answer(self, states, questions):
        assert len({len(question.prompt) for question in questions}) == 1
        self.answered.append(len(questions))
        return [self._search(*state, question) for state, question in zip(states, questions, strict=True)]

    def _search(self, memory, window, question):
        asked = self.tokenizer.decode(question.prompt)
        # a window of W tokens holds the question too
        room = max(self.window - len(question.prompt), 0) if self.window else len(window)
        text = self.tokenizer.decode([*memory, *window[max(len(window) - room, 0) :]])
        name = re.search(r"secret key of (\w+ \w+)", asked)
        pattern = rf"secret key of {name.group(1)} is: (KEY-\w+)" if name else r"secret key is: (KEY-\w+)"
        found = re.findall(pattern, text)
        return f"{found[-1]}." if found else "I do not know"


@pytest.fixture(scope="module")
def books(real_tokenizer, real_text):
    return BookHaystack([Document("excerpt", real_text)], real_tokenizer)


@pytest.fixture
def run(tmp_path, real_tokenizer):
    """``(reader, contexts maker, samples, full)`` -> records in order."""

    def run(reader, make, samples=1, full=None, name="niah/x", file="log.jsonl"):
        log = Log(tmp_path / file)
        try:
            run_task(RecallTask(name, samples, make), reader, full, log, tokenizer=real_tokenizer)
        finally:
            log.close()
        return list(log.records.values())

    return run


@pytest.fixture
def single(books, real_tokenizer):
    def make(sample, length=1024, depths=DEPTHS, task="single", seed=0):
        return needle_contexts(
            NIAH[task], books, real_tokenizer, lengths=[length], depths=depths, seed=seed, sample=sample
        )

    return make


def share(records, arm):
    scores = [r["arms"][arm]["score"] for r in records]
    return sum(scores) / len(scores)


def test_a_model_that_copies_its_memory_scores_100_percent_and_its_controls_do_not(run, real_tokenizer, single):
    records = run(Planted(real_tokenizer, copies=True), single, samples=2)
    assert len(records) == 2 * len(DEPTHS)
    assert share(records, MEMORY) == 1.0
    assert all(r["arms"][MEMORY]["exact"] for r in records)
    assert share(records, QUESTION_ONLY) == 0.0
    in_window = sum(r["in_window"] for r in records) / len(records)
    assert 0.1 < in_window < 0.4
    assert share(records, MEMORY_OFF) == pytest.approx(in_window, abs=0.06)  # a fact may be half in the window
    assert share(records, OTHER_MEMORY) == pytest.approx(share(records, MEMORY_OFF), abs=0.06)
    outside = group([r for r in records if not r["in_window"]], "length")[1024,]
    assert outside.verdict == "recalls"


def test_another_memory_answers_with_the_other_texts_fact(run, real_tokenizer, single):
    stranger = single(STRANGER)
    records = run(Planted(real_tokenizer, copies=True), single)
    for record, context in zip(records, stranger, strict=True):
        if not record["in_window"]:
            assert record["arms"][OTHER_MEMORY]["answer"].rstrip(".") == context.questions[0].answers[0]


def test_of_another_text_no_more_is_read_than_its_limit(run, real_tokenizer, single, monkeypatch):
    def others(file):
        records = run(Planted(real_tokenizer, copies=True), single, file=file)
        return [(r["arms"][OTHER_MEMORY], r["arms"][MEMORY_OFF]) for r in records]

    assert any(other != off for other, off in others("whole.jsonl"))
    monkeypatch.setattr(runner, "STRANGER_TOKENS", 0)
    assert all(other == off for other, off in others("nothing.jsonl"))


def test_an_amnesiac_scores_its_window_over_the_length(run, real_tokenizer, single):
    reader = Planted(real_tokenizer, copies=False)
    for length in (512, 1024, 2048):
        records = run(reader, partial(single, length=length), samples=2, file=f"{length}.jsonl")
        contexts = [context for sample in range(2) for context in single(sample, length)]
        seen = []
        for record, context in zip(records, contexts, strict=True):
            (question,) = context.questions
            ((start, stop),) = question.evidence
            begins = question.at + len(question.prompt) - WINDOW  # of the visible part: the question takes room too
            assert not start < begins < stop, "no fact is half visible, so what follows is exact"
            seen.append(float(start >= begins))
            assert record["arms"][MEMORY]["score"] == seen[-1]
        assert share(records, MEMORY) == pytest.approx(sum(seen) / len(seen), abs=1e-12)
        assert share(records, MEMORY) == pytest.approx(WINDOW / length, abs=0.12)
        cell = group(records, "length")[length,]
        assert cell.verdict == "nothing shown"


def test_full_attention_is_asked_only_where_the_sample_fits(run, real_tokenizer, single):
    full = Planted(real_tokenizer, copies=False, window=None, longest=1024)
    make = lambda sample: [*single(sample, 1024, [0.0]), *single(sample, 1025, [0.0])]  # noqa: E731
    first, second = run(Planted(real_tokenizer, copies=True), make, full=full)
    assert first["arms"][FULL_ATTENTION]["score"] == 1.0
    assert FULL_ATTENTION not in second["arms"]


def test_a_leak_put_into_the_window_is_flagged(run, real_tokenizer, single):
    def leaking(sample):
        contexts = []
        for context in single(sample, 1024, [0.0, 0.25, 0.5]):
            (question,) = context.questions
            note = encode(real_tokenizer, f" Somebody noted {question.answers[0]} here.")
            ids = context.ids.copy()
            ids[question.at - 20 - len(note) : question.at - 20] = note
            contexts.append(Context(ids, context.questions))
        return contexts

    records = run(Planted(real_tokenizer, copies=False), leaking)
    assert all(r["leak"] and not r["in_window"] for r in records)
    flags = recall_section("Planted", records, WINDOW).flags
    assert any("LEAK" in flag and "3 of 3" in flag for flag in flags)
    clean = run(Planted(real_tokenizer, copies=False), partial(single, depths=[0.0, 0.25, 0.5]), file="clean.jsonl")
    assert not any(r["leak"] for r in clean)
    assert recall_section("Planted", clean, WINDOW).flags == ()


def test_a_model_that_sees_without_memory_is_flagged(run, real_tokenizer, single):
    """A leak that no account of the samples shows: a "memory off" that still remembers."""

    class Cheat(Planted):
        def read(self, ids, at, *, memory=True):
            return (ids[:at], ids[max(at - self.window, 0) : at])

    records = run(Cheat(real_tokenizer, copies=True), partial(single, depths=[0.0, 0.25, 0.5]), samples=2)
    flags = recall_section("Planted", records, WINDOW).flags
    assert any("without memory" in flag for flag in flags)


def test_an_answer_in_the_question_is_a_leak(real_tokenizer):
    prompt = tuple(encode(real_tokenizer, "\nIs it KEY-ABC12345?\nAnswer:"))
    question = Question(4, prompt, ("KEY-ABC12345",), 8, {"task": "x", "length": 40, "depth": 0.0}, ((0, 2),))
    context = Context(np.arange(300, 304, dtype=np.int32), (question,))
    assert window_facts(context, question, 8, real_tokenizer)["leak"]


def test_guessable_questions_are_flagged(run, real_tokenizer, single):
    class Guesser(Planted):
        def _search(self, memory, window, question):
            return question.answers[0]

    records = run(Guesser(real_tokenizer, copies=False), partial(single, depths=[0.0, 0.5], task="multikey"), samples=4)
    assert any(f.startswith("GUESSABLE") for f in recall_section("Planted", records, WINDOW).flags)
    assert group(records, "length")[1024,].verdict == "nothing shown"


def test_questions_at_one_place_with_prompts_of_one_length_are_answered_side_by_side(run, books, real_tokenizer):
    def together(sample):
        grid = {"lengths": [1500], "depths": [0.2, 0.6], "seed": 0, "sample": sample}
        return together_contexts([NIAH["single"], NIAH["multikey"], NIAH["overwritten"]], books, real_tokenizer, **grid)

    def many(sample):  # the same again and again, so that there are more than are answered at once
        return [replace(context, questions=context.questions * 4) for context in together(sample)]

    planted = Planted(real_tokenizer, copies=True)
    found = run(planted, many, samples=2)
    assert len(found) == 24
    assert max(planted.answered) == 3 * AT_ONCE
    alone = run(Planted(real_tokenizer, copies=True), together, samples=2, file="alone.jsonl")
    for record in found:
        (same,) = [r for r in alone if (r["question"], r["expected"]) == (record["question"], record["expected"])]
        assert {arm: r["answer"] for arm, r in record["arms"].items()} == {
            arm: r["answer"] for arm, r in same["arms"].items()
        }


def test_shared_contexts_and_distances_are_recalled_by_the_copier(run, books, real_tokenizer):
    def shared(sample):
        return [
            shared_context(
                books, real_tokenizer, lengths=[600, 1800], depths=[0.0, 0.5, 1.0], per_cell=2, seed=0, sample=sample
            )
        ]

    records = run(Planted(real_tokenizer, copies=True), shared)
    assert len(records) == 12
    assert share(records, MEMORY) == 1.0

    def distance(sample):
        where = {"distances": [100, 400, 1600], "facts": 3, "seed": 0, "sample": sample}
        return [distance_context(books, real_tokenizer, **where)]

    records = run(Planted(real_tokenizer, copies=False), distance, file="distance.jsonl")
    table = distance_section("Distance", records, WINDOW).tables[0]
    found = {row[0]: row[table.columns.index(MEMORY)] for row in table.rows}
    assert found["100"].startswith("100%")
    assert found["400"].startswith("0%")


@pytest.mark.parametrize(
    "grid",
    [
        {"lengths": [2048], "depths": [0.95, 1.0], "per_cell": 4},
        {"lengths": [2048, 4096], "depths": [0.49, 1.0], "per_cell": 1},
    ],
    ids=["close depths", "close lengths"],
)
def test_facts_of_a_crowded_shared_context_are_told_in_time(run, books, real_tokenizer, grid):
    samples = 5
    contexts = [shared_context(books, real_tokenizer, **grid, seed=0, sample=i) for i in range(samples + 1)]
    for context in contexts:
        end = 0
        for (start, stop), question in sorted((q.evidence[0], q) for q in context.questions):
            assert end <= start < stop <= question.at, "one after the other, each before its question"
            end = stop
            # earlier by 15 % and a verse at most, never later
            aim = question.cell["depth"] * question.at
            assert aim - 0.15 * question.at - (stop - start) - 120 < start <= aim
            told = real_tokenizer.decode(context.ids[start:stop])
            assert re.fullmatch(rf" The secret key of \w+ \w+ is: {question.answers[0]}\.", told)
    records = run(Planted(real_tokenizer, copies=True), lambda i: [contexts[i]], samples=samples)
    assert len(records) == samples * len(contexts[0].questions)
    assert share(records, MEMORY) == 1.0


def test_an_interrupted_run_goes_on_and_answers_nothing_twice(run, real_tokenizer, single, tmp_path):
    whole = run(Planted(real_tokenizer, copies=True), single, samples=2, file="whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:25]) + lines[25][:40])  # killed in the middle of a line
    reader = Planted(real_tokenizer, copies=True)
    resumed = run(reader, single, samples=2, file="cut.jsonl")
    timeless = [{k: v for k, v in r.items() if "seconds" not in k} for r in resumed]
    assert timeless == [{k: v for k, v in r.items() if "seconds" not in k} for r in whole]
    strangers = len(DEPTHS)
    assert reader.readings == 2 * (len(whole) - 25) + strangers
    again = Planted(real_tokenizer, copies=True)
    run(again, single, samples=2, file="cut.jsonl")
    assert again.readings == 0


def test_a_log_of_other_samples_is_refused(run, real_tokenizer, single):
    run(Planted(real_tokenizer, copies=True), single)
    with pytest.raises(ValueError, match="holds another sample as niah/x/0/0/0"):
        run(Planted(real_tokenizer, copies=True), partial(single, seed=1))


@pytest.mark.parametrize("line", ["no json\n", '{"task": 1}\n', "[]\n"])
def test_a_damaged_log_names_the_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\n" + line)
    with pytest.raises(ValueError, match=r"line 2 is no record"):
        Log(path)


def test_every_record_holds_what_an_appendix_needs(run, real_tokenizer, single):
    (record,) = run(Planted(real_tokenizer, copies=True), partial(single, depths=[0.5]))
    assert set(record["arms"]) <= set(ARMS)
    assert re.fullmatch(r"[0-9a-f]{64}", record["prompt_sha256"])
    assert record["expected"][0].startswith("KEY-")
    assert record["source"] == "excerpt"
    assert record["tokens"] + NIAH["single"].max_new_tokens == 1024
    assert record["question"].endswith("The secret key is:")


def test_evidence_in_part_in_the_window_is_not_in_the_window(real_tokenizer):
    def facts(*evidence, **fields):
        ids = np.full(100, real_tokenizer.eos_token_id, dtype=np.int32)
        values = {"at": 100, "prompt": (5, 6), "answers": ("KEY",), "max_new_tokens": 4, "cell": {"task": "x"}} | fields
        return window_facts(Context(ids, ()), Question(**values, evidence=evidence), 20, real_tokenizer)["in_window"]

    assert facts((90, 95)) is True  # the window holds [82, 102)
    assert facts((82, 84), (90, 95)) is True
    assert facts((81, 84), (90, 95)) is False
    assert facts((10, 12), (90, 95)) is False
    assert facts() is None  # nothing can be said of words that are everywhere


@pytest.mark.parametrize(("metric", "leak"), [("all", True), ("part", False), ("label", False)])
def test_labels_and_common_words_in_the_window_are_no_leak(real_tokenizer, metric, leak):
    ids = np.array(encode(real_tokenizer, " Daniel went to the kitchen." + " Then it was night." * 30 + " A kitchen."))
    asked = tuple(encode(real_tokenizer, " Where is Daniel?"))
    question = Question(len(ids), asked, ("kitchen",), 4, {"task": "x"}, ((0, 6),), metric)
    facts = window_facts(Context(ids, ()), question, 30, real_tokenizer)
    assert facts == {"in_window": False, "leak": leak}


def test_tasks_without_evidence_have_no_window_share_and_no_flag(run, real_tokenizer, single):
    def counting(sample):
        return [Context(c.ids, tuple(replace(q, evidence=()) for q in c.questions)) for c in single(sample)]

    records = run(Planted(real_tokenizer, copies=False), counting)
    section = recall_section("Planted", records, WINDOW)
    assert section.flags == ()
    assert section.tables[0].rows[0][section.tables[0].columns.index("facts in window")] is None
    assert [s.name for s in section.figures[-1].series if s.dashed] == ["W / length"]


def test_an_answer_without_an_end_is_not_called_exact(run, real_tokenizer, single):
    def endless(sample):
        return [Context(c.ids, tuple(replace(q, stop=None) for q in c.questions)) for c in single(sample)]

    records = run(Planted(real_tokenizer, copies=True), endless)
    assert {r["arms"][MEMORY]["exact"] for r in records} == {None}
    table = recall_section("Planted", records, WINDOW).tables[0]
    assert table.rows[0][table.columns.index("memory, exact")] is None
