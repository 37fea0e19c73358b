"""Pages crowded with facts: every label, fact, question and answer is read off the finished tokens of real text."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from senri.data.corpus import Document
from senri.data.pages import LEAD, ROOM, RecallPages
from senri.data.samples import SampleError

SIZE, PAGES, QUESTIONS = 256, 3, 2
STREAMS = range(0, 24, 2)  # those with facts


@pytest.fixture(scope="module")
def documents(real_text):
    return [Document(f"book {i}", real_text[start : start + 60_000]) for i, start in enumerate((0, 1_000_000))]


@pytest.fixture(scope="module")
def make(documents, real_tokenizer):
    """``(seed, documents, **settings)`` -> pages of book text."""

    def pages(seed=0, documents=documents, **changes):
        settings = {"size": SIZE, "pages": PAGES, "questions": QUESTIONS, "chat": 0.3, **changes}
        return RecallPages(documents, real_tokenizer, seed=seed, **settings)

    return pages


@pytest.fixture(scope="module")
def streams(make):
    source = make()
    return {index: source.stream(index) for index in [*STREAMS, 1, 3]}


@pytest.fixture(scope="module")
def fact_pages(streams):
    return [page for index in STREAMS for page in streams[index]]


def same(a, b):
    """Whether two pages are one, to the last token."""
    questions = [
        [(q.lead.tolist(), q.fact, q.exchange) for q in page.questions] for page in (a, b)
    ]  # arrays have no equality of their own
    rest = [(p.ids.tolist(), p.write.tolist(), p.facts, p.fact_of.tolist(), p.source) for p in (a, b)]
    return questions[0] == questions[1] and rest[0] == rest[1]


def runs(mask):
    """[start, end) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def in_books(ids, source):
    whole = np.concatenate([source.books.ids(i) for i in (0, 1, 0)])
    return ids.astype(np.int32).tobytes() in whole.tobytes()


def value_of(question, tokenizer):
    """The value that a question is answered with, and what stands around it in the answer."""
    exchange = question.exchange
    begun, rest = (
        tokenizer.decode(part)
        for part in (exchange.answer[: exchange.value_from], exchange.answer[exchange.value_from :])
    )
    value, end = re.fullmatch(r" ?(\S.*)(\.\n|\.<\|im_end\|>)", rest).groups()
    return begun, value, end


def told(text, fact):
    """What a page says behind the words of a fact, each time."""
    return [text[m.end() :] for m in re.finditer(re.escape(fact) + ":? ", text)]


def says(rest, value):
    return re.match(rf"{re.escape(value)}(?![\w-])", rest)


def test_a_stream_follows_from_the_seed_and_its_number(make, streams):
    again, other = make(), make(seed=1)
    for index in (4, 0, 3):  # in another order
        pages = again.stream(index)
        assert all(same(a, b) for a, b in zip(pages, streams[index], strict=True))
        assert not any(same(a, b) for a, b in zip(other.stream(index), pages, strict=True))
    assert not same(streams[0][0], streams[2][0])


@pytest.mark.parametrize("changes", [{}, {"size": 100, "pages": 5}])
def test_sizes_and_types(make, changes):
    source = make(**changes)
    for index in range(3):
        pages = source.stream(index)
        assert len(pages) == changes.get("pages", PAGES)
        for page in pages:
            assert page.ids.shape == page.write.shape == page.fact_of.shape == (changes.get("size", SIZE),)
            assert (page.ids.dtype, page.write.dtype, page.fact_of.dtype) == (np.int32, np.int8, np.int16)
            assert page.source.startswith("book ")


def test_every_second_stream_is_plain(streams, fact_pages):
    for index in (1, 3):
        for page in streams[index]:
            assert not page.write.any()
            assert page.questions == ()
            assert page.facts == ()
            assert (page.fact_of == -1).all()
    assert all(page.facts and page.questions for page in fact_pages)


def test_without_its_facts_a_stream_is_one_stretch_of_a_book(make, streams):
    source = make()
    for pages in streams.values():
        assert in_books(np.concatenate([page.ids[page.write == 0] for page in pages]), source)
        for page in pages:
            assert np.count_nonzero(page.write) <= ROOM * SIZE


def test_labels_are_those_of_the_values(fact_pages, real_tokenizer):
    for page in fact_pages:
        assert set(np.unique(page.write)) == {-1, 0, 1}
        labelled = [real_tokenizer.decode(page.ids[a:b]) for a, b in runs(page.write == 1)]
        for text in labelled:
            assert re.fullmatch(r" ?\S.*?(\.| \w+|'s)", text), "a value and one token behind it"
        answers = {value_of(q, real_tokenizer)[1] for q in page.questions}
        for value in answers:
            assert any(says(text.strip(), value) for text in labelled), value
        for start, _ in runs(page.write == 1):
            assert page.write[start - 1] == -1, "what stands before a value in its fact is not labelled"


def test_what_is_asked_was_told_and_the_last_is_the_answer(fact_pages, real_tokenizer):
    counts = Counter()
    for page in fact_pages:
        text = real_tokenizer.decode(page.ids)
        for question in page.questions:
            _, value, _ = value_of(question, real_tokenizer)
            fact = page.facts[question.fact]
            (answer,) = told(real_tokenizer.decode(page.ids[page.fact_of == question.fact]), fact)
            assert says(answer, value), (fact, value)
            values = told(text, fact)
            assert any(says(rest, value) for rest in values), (fact, value)
            if not fact.startswith(" Nobody is better at"):  # says who behind the value
                assert fact not in page.facts[question.fact + 1 :]
                assert says(values[-1], value), (fact, value)
                assert not any(says(rest, value) for rest in values[:-1])
                counts[len(values)] += 1
    assert set(counts) == {1, 2, 3}, "some are told again"


def test_the_facts_of_a_page_are_all_that_it_tells_in_order(fact_pages, real_tokenizer):
    for page in fact_pages:
        assert ((page.fact_of >= 0) == (page.write != 0)).all()
        assert set(page.fact_of.tolist()) == {-1, *range(len(page.facts))}
        text, end = real_tokenizer.decode(page.ids), 0
        for number, known in enumerate(page.facts):
            ((start, stop),) = runs(page.fact_of == number)
            assert start >= end, "one behind the other"
            end = stop
            (value,) = told(real_tokenizer.decode(page.ids[start:stop]), known)
            assert real_tokenizer.decode(page.ids[start:stop]).startswith(known)
            assert value.endswith((".", ";", "!")), "to its end"
        assert all(len(told(text, fact)) == page.facts.count(fact) for fact in page.facts)


def test_no_fact_of_a_page_can_be_taken_for_another(fact_pages, real_tokenizer):
    stem = re.compile(r"(?:Question: |user\n)(.+?)(?: mentioned above)?\?(?:\n|<)")
    for page in fact_pages:
        for a, b in product(page.facts, page.facts):
            assert a == b or not a.startswith(b), (a, b)
        meant = {}
        for question in page.questions:
            (asked,) = stem.findall(real_tokenizer.decode(question.exchange.prompt))
            meant.setdefault(asked, set()).add(value_of(question, real_tokenizer)[1])
        assert all(len(values) == 1 for values in meant.values())
        for a, b in product(meant, meant):
            assert a == b or not a.startswith(b), (a, b)


def test_two_ways_to_put_a_colon_are_one_fact(fact_pages):
    """Or a later page could contradict with the same words and another punctuation."""
    facts = {fact for page in fact_pages for fact in page.facts}
    assert facts
    assert not [fact for fact in facts if fact.endswith((":", " "))]


def test_questions_come_in_several_forms_behind_some_text(make, fact_pages, real_tokenizer):
    source, forms, sizes = make(), Counter(), set()
    for page in fact_pages:
        asked = Counter()
        for question in page.questions:
            begun, value, end = value_of(question, real_tokenizer)
            asked[question.fact, value] += 1
            prompt = real_tokenizer.decode(question.exchange.prompt)
            chat = end.endswith("<|im_end|>")
            assert prompt.endswith("assistant\n") if chat else re.search(r"\nAnswer:.*$", prompt)
            forms[chat, bool(begun), prompt.endswith("Answer:")] += 1
            assert in_books(question.lead, source)
            sizes.add(len(question.lead))
        assert set(asked.values()) == {QUESTIONS}
    assert set(forms) == {(True, True, False), (False, True, True), (False, False, True), (False, False, False)}
    assert min(sizes) >= LEAD[0]
    assert max(sizes) <= LEAD[1]
    assert len(sizes) > 10


def test_texts_that_are_too_short(make):
    source = make(documents=[Document("x", "The sea was calm. " * 40)])
    with pytest.raises(SampleError, match=r"the haystack has \d+ tokens and a sample needs 768") as error:
        source.stream(1)
    assert "\n" not in str(error.value)
