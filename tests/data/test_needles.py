"""Needle samples: every answer is where the sample says it is, asked for exactly, and nowhere else."""

import itertools
import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, RepeatedHaystack, encode
from senri.data.needle_tasks import HELD_OUT, KINDS, NIAH, RULER_NIAH
from senri.data.needles import distance_context, needle_contexts, shared_context, together_contexts
from senri.data.samples import SampleError
from senri.data.words import JOBS

pytest.importorskip("wonderwords")

TASKS = {**NIAH, **RULER_NIAH}
LENGTHS = (700, 1024, 2048)
DEPTHS = (0.0, 0.1, 0.35, 0.5, 0.9, 1.0)
KEY = re.compile(r"KEY-[A-Z]{3}\d{5}")
TOLD = re.compile(r" The secret key of (\w+ \w+) is: (KEY-[A-Z]{3}\d{5})\.")


def prose(sentences, seed=0):
    """Short sentences without a number or a capital inside, no two paragraphs of them alike."""
    rng = Random(seed)
    nouns, verbs = ("river", "horse", "lamp", "garden", "letter", "window", "road"), ("left", "found", "held", "saw")
    made = []
    for i in range(sentences):
        words = [rng.choice(("The", "A", "Every")), "old " * rng.randrange(3) + rng.choice(nouns), rng.choice(verbs)]
        made.append(" ".join([*words, "the", rng.choice(nouns)]) + ("." if i % 40 else ".\n") + " " * bool(i % 40))
    return "".join(made)


@pytest.fixture(scope="module")
def books(real_tokenizer):
    return BookHaystack([Document(f"book {i}", prose(1500, i)) for i in range(3)], real_tokenizer)


@pytest.fixture(scope="module")
def make(books, real_tokenizer):
    """``(task, sample, ...)`` -> contexts."""

    def contexts(task, sample=0, seed=0, lengths=LENGTHS, depths=DEPTHS, haystack=books):
        return needle_contexts(
            TASKS[task], haystack, real_tokenizer, lengths=lengths, depths=depths, seed=seed, sample=sample
        )

    return contexts


def same(a, b):
    return [(c.ids.tolist(), c.questions) for c in a] == [(c.ids.tolist(), c.questions) for c in b]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message
    return message


# every task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_cell_once_at_its_exact_length(make, name):
    task = TASKS[name]
    contexts = make(name)
    cells = [(c.questions[0].cell["length"], c.questions[0].cell["depth"]) for c in contexts]
    wanted = [(n, d) for n in LENGTHS for d in (DEPTHS if task.by_depth else (None,))]
    assert sorted(cells, key=str) == sorted(wanted, key=str)
    for context in contexts:
        (question,) = context.questions
        assert question.cell["task"] == name
        assert context.ids.dtype == np.int32
        assert question.at == len(context.ids), "asked at the end"
        assert question.at + len(question.prompt) + question.max_new_tokens == question.cell["length"]
        assert question.max_new_tokens == task.max_new_tokens
        assert question.metric == "all"
        assert question.stop == task.stop
        assert context.source


@pytest.mark.parametrize("name", TASKS)
def test_the_evidence_is_the_fact_with_the_answer(make, real_tokenizer, name):
    task = TASKS[name]
    for sample in range(3):
        for context in make(name, sample):
            (question,) = context.questions
            assert len(question.answers) == len(question.evidence) == task.values * task.queries
            assert len(set(question.answers)) == len(question.answers)
            last = 0
            for answer, (start, stop) in zip(question.answers, question.evidence, strict=True):
                fact = real_tokenizer.decode(context.ids[start:stop])
                wording = task.wordings[sample % len(task.wordings)]
                told = wording.fact.replace("{key}", "(.+)").replace("{value}", re.escape(answer))
                assert re.fullmatch(told, fact), fact
                # it stands between sentences, in text that decodes as it is
                whole = real_tokenizer.decode(context.ids)
                assert whole.startswith(real_tokenizer.decode(context.ids[:start]) + fact)
                last = max(last, stop)
            assert last <= question.at


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.value in ("code", "digits", "number", "uuid")])
def test_the_answer_stands_nowhere_else(make, real_tokenizer, name):
    task = TASKS[name]
    once = task.wordings[0].fact.count("{value}")
    for sample in range(4):
        for context in make(name, sample, seed=7):
            (question,) = context.questions
            text = real_tokenizer.decode(context.ids) + real_tokenizer.decode(question.prompt)
            assert [text.count(answer) for answer in question.answers] == [once] * len(question.answers)
            assert not any(answer in real_tokenizer.decode(question.prompt) for answer in question.answers)


@pytest.mark.parametrize("name", TASKS)
def test_the_room_holds_the_answer(make, real_tokenizer, name):
    for sample in range(25):
        question = make(name, sample, lengths=(1024,), depths=(0.5,))[0].questions[0]
        said = " " + ", and ".join(question.answers) + "."
        assert len(encode(real_tokenizer, said)) <= question.max_new_tokens


@pytest.mark.parametrize("name", TASKS)
def test_the_question_asks_for_the_fact_in_its_words(make, real_tokenizer, name):
    task = TASKS[name]
    context = make(name, lengths=(1024,), depths=(0.5,))[0]
    (question,) = context.questions
    prompt = real_tokenizer.decode(question.prompt)
    assert prompt.startswith("\n\nQuestion: ")
    assert prompt.count("\nAnswer:") == 1
    assert not prompt.endswith(" "), "the answer's first token brings its space"
    assert "{" not in prompt
    text = real_tokenizer.decode(context.ids)
    head = task.wordings[0].head
    assert text.startswith(head)
    assert ("hides magic" in text) == (name in RULER_NIAH)
    for start, stop in question.evidence:
        fact = real_tokenizer.decode(context.ids[start:stop])
        wording = task.wordings[0].fact
        if "{key}" in wording:
            before, after = wording.split("{key}")
            key = fact[len(before) : fact.index(after.split("{value}")[0], len(before))]
            assert key in prompt.split("\nAnswer:")[0]
            assert name.startswith("wording_") or key in prompt.split("\nAnswer:")[1], "begun in the answer"


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if task.by_depth])
def test_the_depth_is_kept(make, books, real_tokenizer, name):
    """At the last sentence's end up to the depth: within 2 % where the sentences are short."""
    for sample in range(4):
        for context in make(name, sample):
            (question,) = context.questions
            start, stop = question.evidence[0]
            aim = question.cell["depth"] * question.at
            assert start <= aim or TASKS[name].overwritten or TASKS[name].keys > 1
            others = (TASKS[name].overwritten + TASKS[name].keys - 1) * (stop - start)  # they may stand in the way
            slack = stop - start + 25 if question.cell["depth"] == 1.0 else 25  # at the end: the fact's own length
            assert abs(start - aim) <= max(0.02 * question.at, slack + others)
            if not others and question.cell["depth"] < 1.0 and TASKS[name].haystack == "books":
                gap = context.ids[stop : stop + int(aim - start)]
                assert len(books.cuts(gap)) <= 2, "a later boundary was there"


def test_long_sentences_put_the_fact_before_its_depth(real_text, real_tokenizer, make):
    books = BookHaystack([Document("kjv", real_text[:400_000].replace("\n", " "))], real_tokenizer)
    for sample in range(5):
        for context in make("single", sample, haystack=books):
            (question,) = context.questions
            start, stop = question.evidence[0]
            aim = question.cell["depth"] * question.at
            assert start <= aim
            if question.cell["depth"] < 0.95:
                assert len(books.cuts(context.ids[stop : stop + int(aim - start)])) <= 2


@pytest.mark.parametrize("name", TASKS)
def test_seed_and_sample_decide_everything(make, name):
    one = make(name, 3, seed=5)
    assert same(one, make(name, 3, seed=5))
    facts = [c.questions[0].answers for c in one]
    for other in (make(name, 4, seed=5), make(name, 3, seed=6)):
        assert [c.questions[0].answers for c in other] != facts
        assert not np.array_equal(other[0].ids, one[0].ids)
    if TASKS[name].value in ("code", "number", "uuid"):
        many = [a for s in range(6) for c in make(name, s, lengths=(1024,)) for a in c.questions[0].answers]
        assert len(set(many)) == len(many)


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_said(make, name):
    for length in (1, 35):
        with pytest.raises(SampleError) as caught:
            make(name, lengths=(length, 1024))
        assert "does not hold its facts and instructions" in one_line(caught)


def test_the_shortest_length_that_holds_a_sample(make):
    lengths = []
    for length in range(20, 120):
        try:
            context = make("single", lengths=(length,), depths=(0.5,))[0]
        except SampleError:
            assert not lengths
        else:
            assert len(context.ids) + len(context.questions[0].prompt) + 16 == length
            lengths.append(length)
    assert lengths[0] > 40


def test_too_little_text_is_said(make, books):
    with pytest.raises(SampleError, match="give it more text"):
        make("single", lengths=(200_000,))


def test_tasks_of_one_seed_have_their_own_facts(make):
    answers = Counter(a for name in NIAH for c in make(name) for a in set(c.questions[0].answers) if KEY.fullmatch(a))
    assert all(answers[a] <= len(LENGTHS) for a in answers)  # a depth has the same fact at every length


# kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pattern", "different"),
    [
        ("code", r"KEY-[A-Z]{3}\d{5}", 300),
        ("digits", r"[1-9]\d{4}", 290),
        ("number", r"[1-9]\d{6}", 299),
        ("uuid", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", 300),
        ("words", r"[\w' -]+-[\w' -]+", 280),
        ("person", r"[A-Z][a-z]+ [A-Z][a-z]+", 250),
        ("city", r"[A-Z][a-z]+", 45),
        ("food", r"[a-z]+ [a-z]+", 45),
        ("job", r"(a [^\Waeiou]|an [aeiou])[a-z]+", 45),
    ],
)
def test_kinds_of_keys_and_values(kind, pattern, different):
    made = [KINDS[kind](Random(i)) for i in range(300)]
    assert all(re.fullmatch(pattern, value) for value in made)
    assert len(set(made)) >= different
    assert made == [KINDS[kind](Random(i)) for i in range(300)]


def test_a_job_is_told_with_its_article(make, real_tokenizer):
    assert len(set(JOBS)) == len(JOBS) == 50
    assert all(re.fullmatch(r"(a [^\Waeiou]|an [aeiou])[a-z]+", job) for job in JOBS)
    assert {"a baker", "an innkeeper"} <= set(JOBS)
    for sample in range(30):
        (context,) = make("wording_job", sample, lengths=(700,), depths=(0.5,))
        (question,) = context.questions
        ((start, stop),) = question.evidence
        told = r" (\w+ \w+) earned a living for many years as (an? \w+)\."
        key, value = re.fullmatch(told, real_tokenizer.decode(context.ids[start:stop])).groups()
        assert question.answers == (value,)
        prompt = real_tokenizer.decode(question.prompt)
        assert prompt == f"\n\nQuestion: As what did {key} earn a living?\nAnswer: {key} earned a living as"


def test_there_are_not_more_different_values_than_there_are(books, real_tokenizer):
    task = replace(NIAH["wording_city"], keys=51)
    with pytest.raises(SampleError) as caught:
        needle_contexts(task, books, real_tokenizer, lengths=[4096], depths=[0.5], seed=0, sample=0)
    assert "51 different" in one_line(caught)


# the variants ----------------------------------------------------------------------------------------------------


def facts_of(context, tokenizer):
    return TOLD.findall(tokenizer.decode(context.ids))


def test_multikey_hides_four_and_asks_for_one(make, real_tokenizer):
    asked_places, gaps = Counter(), []
    for sample in range(6):
        for context in make("multikey", sample):
            (question,) = context.questions
            facts = facts_of(context, real_tokenizer)
            assert len(facts) == 4
            assert len({key for key, _ in facts}) == len({value for _, value in facts}) == 4
            prompt = real_tokenizer.decode(question.prompt)
            (asked,) = [key for key, _ in facts if key in prompt]
            assert dict(facts)[asked] == question.answers[0]
            asked_places[[key for key, _ in facts].index(asked)] += 1
            text = real_tokenizer.decode(context.ids)
            places = [text.index(key) / len(text) for key, _ in facts]
            gaps.append(max(places) - min(places))
    assert len(asked_places) == 4, "the distractors stand before it and behind it"
    assert np.mean(gaps) > 0.4, "and anywhere"


def test_a_tasks_wordings_take_turns(books, real_tokenizer):
    task = replace(NIAH["single"], wordings=NIAH["single"].wordings + NIAH["passkey"].wordings, max_new_tokens=16)
    for sample, words in enumerate(["The secret key is:", "The pass key is"] * 2):
        (context,) = needle_contexts(task, books, real_tokenizer, lengths=[700], depths=[0.5], seed=0, sample=sample)
        (question,) = context.questions
        ((start, stop),) = question.evidence
        assert real_tokenizer.decode(context.ids[start:stop]).startswith(f" {words} KEY-")
        assert real_tokenizer.decode(question.prompt).endswith(words)


@pytest.mark.parametrize(("name", "keys"), [("multivalue", 1), ("multiquery", 4)])
def test_four_answers_all_in_the_context(make, real_tokenizer, name, keys):
    depths = []
    for sample in range(12):
        for context in make(name, sample):
            (question,) = context.questions
            facts = facts_of(context, real_tokenizer)
            assert len(facts) == 4
            assert len({key for key, _ in facts}) == keys
            assert sorted(value for _, value in facts) == sorted(question.answers)
            prompt = real_tokenizer.decode(question.prompt)
            assert all(key in prompt for key, _ in facts)
            if keys == 4:
                names = [prompt.index(key) for key in sorted({k for k, _ in facts}, key=prompt.index)]
                assert prompt[names[-1] - 5 : names[-1]] == " and "
                by_key = dict(facts)
                listed = sorted(by_key, key=prompt.index)
                assert [by_key[k] for k in listed] == list(question.answers)
            depths += [start / question.at for start, _ in question.evidence]
    assert min(depths) < 0.05
    assert max(depths) > 0.9
    assert 0.35 < sum(depths) / len(depths) < 0.65
    assert sum(0.25 < d < 0.75 for d in depths) > 0.3 * len(depths)


def test_overwritten_asks_for_the_last_of_three(make, real_tokenizer):
    for sample in range(6):
        for context in make("overwritten", sample):
            (question,) = context.questions
            facts = facts_of(context, real_tokenizer)
            assert len(facts) == 3
            assert len({key for key, _ in facts}) == 1
            assert len({value for _, value in facts}) == 3
            assert facts[-1][1] == question.answers[0], "in the order of reading"
            assert "last secret key" in real_tokenizer.decode(question.prompt)
            assert facts[0][0] in real_tokenizer.decode(question.prompt)


def test_passkey_is_the_published_test(make, real_tokenizer):
    for context in make("passkey"):
        text = real_tokenizer.decode(context.ids)
        (answer,) = context.questions[0].answers
        assert f" The pass key is {answer}. Remember it. {answer} is the pass key." in text
        assert set(re.findall(r"\d+", text)) == {answer}
        assert text.startswith((" The grass is green. The sky is blue. The sun is yellow.", " The pass key"))


def test_single_and_single_free_differ_in_the_answers_beginning(make, real_tokenizer):
    prompts = {n: real_tokenizer.decode(make(n)[0].questions[0].prompt) for n in ("single", "single_free")}
    assert prompts["single"] == prompts["single_free"] + " The secret key is:"
    assert prompts["single_free"].endswith("\nAnswer:")


def test_contexts_of_one_sample_share_their_beginning(make):
    """What was read for one is not read again for the next, up to its fact."""
    for sample in range(5):
        contexts = make("single", sample)
        late = [-c.questions[0].cell["length"] * c.questions[0].cell["depth"] for c in contexts]
        assert late == sorted(late)
        shared = 0
        for before, after in itertools.pairwise(contexts):
            shortest = min(len(before.ids), len(after.ids))
            differ = np.flatnonzero(before.ids[:shortest] != after.ids[:shortest])
            common = int(differ[0]) if len(differ) else shortest
            starts = [c.questions[0].evidence[0][0] for c in (before, after)]
            assert common >= min(starts)
            assert starts[1] <= starts[0] + 60  # lengths count the question, positions do not
            shared += common
        assert shared > 5000
        by_depth = {}
        for context in contexts:
            (question,) = context.questions
            by_depth.setdefault(question.cell["depth"], set()).add(question.answers)
        assert all(len(answers) == 1 for answers in by_depth.values())
        assert len(set.union(*by_depth.values())) == len(DEPTHS), "a depth's fact is its own"
        assert len({c.source for c in contexts}) == 1


def test_held_out_wordings_are_nobody_elses():
    wordings = [wording for _, wording in HELD_OUT]
    others = [w for name, task in TASKS.items() if not name.startswith("wording_") for w in task.wordings]
    assert len(wordings) == 5
    told = " | ".join(w.fact + w.question for w in others)
    for kind, wording in HELD_OUT:
        assert TASKS[f"wording_{kind}"].wordings == (wording,)
        assert TASKS[f"wording_{kind}"].value == kind
        assert wording.question.startswith("\n\nQuestion: ")
        for text in (wording.fact, wording.question.removeprefix("\n\nQuestion: ")):
            for piece in re.split(r"\{key\}|\{value\}|\nAnswer: |\?", text):
                words = [w for w in piece.split() if len(w) > 3]
                if len(words) > 1:
                    assert piece not in told
        assert wording.fact not in {w.fact for w in others}
        assert wording.question not in {w.question for w in others}
        assert "secret key" not in wording.fact + wording.question


# RULER's ---------------------------------------------------------------------------------------------------------

# Hsieh et al. 2024, table 2 and the published scripts: key, value, haystack, keys, values, queries
PUBLISHED = {
    "niah_single_1": ("words", "number", "filler", 1, 1, 1),
    "niah_single_2": ("words", "number", "books", 1, 1, 1),
    "niah_single_3": ("words", "uuid", "books", 1, 1, 1),
    "niah_multikey_1": ("words", "number", "books", 4, 1, 1),
    "niah_multikey_2": ("words", "number", "facts", 1, 1, 1),
    "niah_multikey_3": ("uuid", "uuid", "facts", 1, 1, 1),
    "niah_multivalue": ("words", "number", "books", 1, 4, 1),
    "niah_multiquery": ("words", "number", "books", 4, 1, 4),
}
VALUES = {"number": r"\b\d{7}\b", "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def test_rulers_eight_tasks():
    assert set(RULER_NIAH) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rulers_numbers_are_in_the_samples(make, real_tokenizer, name):
    key, value, haystack, keys, values, queries = PUBLISHED[name]
    noun = {"number": "number", "uuid": "code"}[value]
    depths = set()
    for sample in range(5):
        (context,) = make(name, sample, lengths=(2048,))
        (question,) = context.questions
        assert question.max_new_tokens == 128
        assert question.stop is None
        text, prompt = real_tokenizer.decode(context.ids), real_tokenizer.decode(question.prompt)
        # a fact at the very end may stand behind one that is cut off
        fact = rf" The magic {noun} of ((?:(?! The magic ).)+?) is ({VALUES[value]})\."
        told = re.findall(fact, text)
        asked = [(k, v) for k, v in told if k in prompt]
        assert len({v for _, v in asked}) == len(question.answers) == values * queries
        assert {v for _, v in asked} == set(question.answers)
        assert len({k for k, _ in asked}) == queries
        assert all(len(KINDS["uuid"](Random(0))) == len(k) if key == "uuid" else "-" in k for k, _ in told)
        if haystack == "facts":
            assert len(told) > 20
            rest = re.sub(fact, "", text)
            assert len(rest) < 250, "nothing but facts and the head"
        else:
            assert len(told) == keys * values
            assert len({k for k, _ in told}) == keys
            assert ("The grass is green." in text) == (haystack == "filler")
            assert (" the " in text.split("\n", 1)[1]) == (haystack == "books")
        several = values * queries > 1
        assert prompt.endswith(" are" if several else " is")
        assert f"magic {noun}{'s' if several else ''} of" in prompt
        depths.update(round(start / question.at, 2) for start, _ in question.evidence)
    assert len(depths) > 3


def test_rulers_depths_are_forty_and_even(make, real_tokenizer):
    """In a haystack of one-word sentences a fact can stand at its very depth."""
    haystack, seen = RepeatedHaystack(real_tokenizer, " Yes."), []
    for sample in range(150):
        (context,) = make("niah_multivalue", sample, lengths=(2500,), haystack=haystack)
        (question,) = context.questions
        head = len(encode(real_tokenizer, RULER_NIAH["niah_multivalue"].wordings[0].head))
        steps = [(start - head) / (question.at - head) * 39 for start, _ in question.evidence]
        if max(steps) < 38 and min(np.diff(sorted(steps)), default=9) > 0.9:
            assert all(abs(step - round(step)) < 0.06 for step in steps), steps
        seen += [round(step) for step in steps]
    assert set(range(39)) <= set(seen)


# one context, many questions -------------------------------------------------------------------------------------

SHARED = {"lengths": (1024, 2048, 4096), "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "per_cell": 2}


def check_shared(context, tokenizer, lengths, depths, per_cell):
    cells = Counter((q.cell["length"], q.cell["depth"]) for q in context.questions)
    assert cells == {(n, d): per_cell for n in lengths for d in depths}
    assert [q.at for q in context.questions] == sorted(q.at for q in context.questions)
    assert len(context.ids) == max(q.at for q in context.questions)
    assert context.ids.dtype == np.int32
    text = tokenizer.decode(context.ids)
    facts = TOLD.findall(text)
    assert len(facts) == len(dict(facts)) == len({v for _, v in facts}) == len(context.questions)
    assert len({q.evidence for q in context.questions}) == len(context.questions)
    for question in context.questions:
        assert question.cell["task"] == "shared"
        assert question.at + len(question.prompt) + question.max_new_tokens == question.cell["length"]
        ((start, stop),) = question.evidence
        (told,) = TOLD.findall(tokenizer.decode(context.ids[start:stop]))
        assert told[0] in tokenizer.decode(question.prompt)
        assert question.answers == (told[1],)
        assert text.count(told[1]) == 1
        assert stop <= question.at, "told before it is asked for"


def test_a_shared_context(books, real_tokenizer):
    for sample in range(10):
        context = shared_context(books, real_tokenizer, **SHARED, seed=3, sample=sample)
        check_shared(context, real_tokenizer, **SHARED)
        again = shared_context(books, real_tokenizer, **SHARED, seed=3, sample=sample)
        assert same([context], [again])
        for question in context.questions:
            ((start, _),) = question.evidence
            # facts of other cells may stand in the way: six of about twenty tokens
            assert abs(start - question.cell["depth"] * question.at) < 0.02 * question.at + 120
    other = shared_context(books, real_tokenizer, **SHARED, seed=4, sample=9)
    assert {q.answers for q in other.questions}.isdisjoint(q.answers for q in context.questions)


@pytest.mark.parametrize(
    "grid",
    [
        {"lengths": (2048,), "depths": (0.95, 1.0), "per_cell": 4},
        {"lengths": (2048, 4096), "depths": (0.49, 1.0), "per_cell": 1},
    ],
    ids=["close depths", "close lengths"],
)
def test_no_fact_is_told_after_its_question(books, real_tokenizer, grid):
    for sample in range(10):
        check_shared(shared_context(books, real_tokenizer, **grid, seed=3, sample=sample), real_tokenizer, **grid)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_facts_in_each_others_way_are_moved_by_15_percent_at_most(books, real_tokenizer, depth):
    grid = {"lengths": (2048,), "depths": (depth,)}
    for per_cell in range(1, 40):
        try:
            context = shared_context(books, real_tokenizer, **grid, per_cell=per_cell, seed=1, sample=0)
        except SampleError:
            break
        check_shared(context, real_tokenizer, **grid, per_cell=per_cell)
        told = sum(stop - start for q in context.questions for start, stop in q.evidence)
        for question in context.questions:
            ((start, stop),) = question.evidence
            moved = abs(start - depth * question.at)
            assert moved < 0.15 * question.at + stop - start + 25, "25: a sentence may begin before it"
    with pytest.raises(SampleError) as caught:
        shared_context(books, real_tokenizer, **grid, per_cell=per_cell, seed=1, sample=0)
    assert re.match(rf"{per_cell} facts in one text leave no room", one_line(caught))
    assert told + 2 * told / per_cell > 0.15 * question.at, "and not refused before"
    for more in (per_cell + 1, 2 * per_cell):
        with pytest.raises(SampleError, match="leave no room at the shortest length"):
            shared_context(books, real_tokenizer, **grid, per_cell=more, seed=1, sample=0)


@pytest.mark.parametrize(
    "grid",
    [
        {"lengths": (256, 4096), "depths": tuple(i / 10 for i in range(11)), "per_cell": 1},
        {"lengths": (512, 1024, 4096), "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "per_cell": 3},
    ],
    ids=["one short length", "many a cell"],
)
def test_a_crowded_start_is_refused_or_in_time(books, real_tokenizer, grid):
    for sample in range(5):
        try:
            context = shared_context(books, real_tokenizer, **grid, seed=0, sample=sample)
        except SampleError as e:
            assert "leave no room at the shortest length" in str(e)  # noqa: PT017
        else:
            check_shared(context, real_tokenizer, **grid)


def test_a_shared_context_that_is_too_short_is_said(books, real_tokenizer):
    with pytest.raises(SampleError) as caught:
        shared_context(books, real_tokenizer, lengths=(256,), depths=DEPTHS, per_cell=9, seed=0, sample=0)
    assert re.match(r"54 facts in one text leave no room at the shortest length: ask for fewer", one_line(caught))
    with pytest.raises(SampleError) as caught:
        shared_context(books, real_tokenizer, lengths=(10**6,), depths=DEPTHS, per_cell=1, seed=0, sample=0)
    assert "give it more text" in one_line(caught)


def test_distances_are_exact(books, real_tokenizer):
    distances = (900, 5, 0, 3000)
    for sample in range(3):
        context = distance_context(books, real_tokenizer, distances=distances, facts=4, seed=2, sample=sample)
        facts = TOLD.findall(real_tokenizer.decode(context.ids))
        assert len(dict(facts)) == 4
        told = max(stop for q in context.questions for _, stop in q.evidence)
        assert len(context.ids) == told + 3000
        assert real_tokenizer.decode(context.ids[:told]) == "".join(
            f" The secret key of {k} is: {v}." for k, v in facts
        )
        assert [q.at for q in context.questions] == sorted(q.at for q in context.questions)
        assert Counter(q.cell["distance"] for q in context.questions) == dict.fromkeys(distances, 4)
        for question in context.questions:
            assert question.at - told == question.cell["distance"]
            ((start, stop),) = question.evidence
            fact = real_tokenizer.decode(context.ids[start:stop])
            assert question.answers[0] in fact
            assert TOLD.findall(fact)[0][0] in real_tokenizer.decode(question.prompt)
        asked = [(q.cell["distance"], q.answers) for q in context.questions]
        assert len(set(asked)) == 16, "every fact at every distance"
    again = distance_context(books, real_tokenizer, distances=distances, facts=4, seed=2, sample=2)
    assert same([again], [context])
    other = distance_context(books, real_tokenizer, distances=distances, facts=4, seed=2, sample=5)
    assert not np.array_equal(other.ids, context.ids)
    with pytest.raises(SampleError, match="give it more text"):
        distance_context(books, real_tokenizer, distances=(10**6,), facts=4, seed=0, sample=0)


# all together ----------------------------------------------------------------------------------------------------

TOGETHER = [task for name, task in NIAH.items() if task.haystack == "books" and task.by_depth and name != "single_free"]


@pytest.mark.parametrize("form", ["together", "chat", "reworded"])
def test_the_facts_of_all_tasks_in_one_text(books, real_tokenizer, form):
    lengths, depths = (1500, 3000), (0.1, 0.5, 0.8)
    placed = set()
    for sample in range(6):
        grid = {"lengths": lengths, "depths": depths, "seed": 1, "sample": sample, "form": form}
        contexts = together_contexts(TOGETHER, books, real_tokenizer, **grid)
        again = together_contexts(TOGETHER, books, real_tokenizer, **grid)
        assert [c.ids.tolist() for c in contexts] == [c.ids.tolist() for c in again]
        for length, context in zip(lengths, contexts, strict=True):
            text = real_tokenizer.decode(context.ids)
            assert len(context.questions) == len(TOGETHER) == 8
            for task, question in zip(TOGETHER, context.questions, strict=True):
                assert question.cell["task"] == f"{form}_{task.name}"
                asked = real_tokenizer.decode(question.prompt)
                if form != "together":
                    (user,) = re.findall(r"<\|im_start\|>user\n(.*[?.])<\|im_end\|>\n", asked)
                    turns = [{"role": "user", "content": user}]
                    whole = real_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
                    assert (asked, question.stop) == (whole, "")
                    wording = task.wordings[sample % len(task.wordings)]
                    plain = [wording.question.split("\n")[2].removeprefix("Question: ")]
                    words = plain if form == "chat" else wording.reworded
                    pattern = re.escape(words[sample % len(words)]).replace(r"\{key\}", r"\w+ \w+")
                    assert re.fullmatch(pattern, user)
                else:
                    assert "\nAnswer: " in asked
                assert re.fullmatch(r"[\w-]+", question.cell["task"]), "the report names its plots so"
                assert question.cell["length"] == length
                assert question.at == len(context.ids)
                assert question.at + len(question.prompt) + question.max_new_tokens <= length
                (answer,) = question.answers
                ((start, stop),) = question.evidence
                assert answer in real_tokenizer.decode(context.ids[start:stop])
                assert text.count(f" {answer}.") == 1
                wanted = question.cell["depth"] * len(context.ids)
                assert -0.15 * length < start - wanted < 0.15 * length
                placed.add((task.name, question.cell["depth"]))
            (last,) = (q for q, t in zip(context.questions, TOGETHER, strict=True) if t.overwritten)
            name = re.search(r"(?:key of|key has) (\w+ \w+)", real_tokenizer.decode(last.prompt)).group(1)
            told = [m.start() for m in re.finditer(f"The secret key of {name} is", text)]
            assert len(told) == 3
            assert text.index(last.answers[0]) > max(told)
    assert len(placed) == len(TOGETHER) * len(depths), "every task's fact comes to every depth"


def test_no_chat_without_a_chat_format(books, real_tokenizer):
    plain = deepcopy(real_tokenizer)
    plain.chat_template = None
    with pytest.raises(SampleError, match="no chat format: leave the task together_chat out"):
        together_contexts(TOGETHER, books, plain, lengths=[1500], depths=[0.5], seed=0, sample=0, form="chat")
