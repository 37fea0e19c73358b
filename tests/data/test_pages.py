"""Pages crowded with facts: every label, fact, question and answer is read off the finished tokens of real text."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

import senri.data.pages as module
from senri.data.corpus import Document
from senri.data.haystack import encode
from senri.data.pages import FILLER, FOLLOWS, IN_SIGHT, LATE, LEAD, MESSAGE, NO_LEAD, RIVAL, ROOM, RecallPages
from senri.data.samples import SampleError
from senri.data.training_chat import PROMPTS

SIZE, PAGES, QUESTIONS = 256, 3, 2
STREAMS = [index for index in range(18) if index % 3 != 2]  # those with facts
PLAIN, FILLED = (5, 8), (2, 17)  # without: of books, of sentences that come again
STEM = re.compile(r"(?:Question: |user\n)(.+?)(?: mentioned above)?[?.](?:\n|<)")


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
    return {index: source.stream(index) for index in [*STREAMS, *PLAIN]}


@pytest.fixture(scope="module")
def fact_pages(streams):
    return [page for index in STREAMS for page in streams[index]]


def same(a, b):
    """Whether two pages are one, to the last token."""
    questions = [
        [(q.lead.tolist(), q.fact, q.exchange) for q in page.questions] for page in (a, b)
    ]  # arrays have no equality of their own
    questions += [[(m.lead.tolist(), m.fact, m.exchange) for m in page.messages] for page in (a, b)]
    rest = [(p.ids.tolist(), p.write.tolist(), p.facts, p.fact_of.tolist(), p.source) for p in (a, b)]
    return questions[0] == questions[1] and questions[2] == questions[3] and rest[0] == rest[1]


def runs(mask):
    """[start, end) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def in_books(ids, source):
    whole = np.concatenate([source.books.ids(i) for i in (0, 1, 0)])
    return ids.astype(np.int32).tobytes() in whole.tobytes()


def value_of(question, tokenizer):
    """The value that a question is answered with, and how the answer ends."""
    answer = tokenizer.decode(question.exchange.answer)
    return re.fullmatch(r" ?(\S.*)(\.\n|\.<\|im_end\|>)", answer).groups()


def texts_of(page, tokenizer):
    """The facts of a page as it tells them."""
    return [tokenizer.decode(page.ids[page.fact_of == number]) for number in range(len(page.facts))]


def answered(question, tokenizer):
    """What stands before a question, and of it the exchange just before it, if there is one."""
    before, begins, exchange = tokenizer.decode(question.lead).partition("\n\nQuestion: ")
    if not begins:
        before, begins, exchange = before.partition("<|im_start|>system\n")
    return before, begins + exchange


def in_sight(question, page, tokenizer):
    """The book's tokens before a question, and the numbers of the facts that stand behind them."""
    seen, facts = [], texts_of(page, tokenizer)
    text, exchange = answered(question, tokenizer)
    lead = question.lead
    while exchange and len(lead) and tokenizer.decode(lead) != text:  # tokenized in parts
        lead = lead[:-1]
    while numbers := [number for number, fact in enumerate(facts) if text.endswith(fact)]:
        seen.insert(0, numbers[-1])
        text = text.removesuffix(facts[numbers[-1]])
    shown = encode(tokenizer, "".join(facts[number] for number in seen))
    assert lead[len(lead) - len(shown) :].tolist() == shown
    return lead[: len(lead) - len(shown)], seen


def holds(text, value):
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text)


def told(text, fact):
    """What a page says behind the words of a fact, each time."""
    return [text[m.end() :] for m in re.finditer(re.escape(fact) + ":? ", text)]


def says(rest, value):
    return re.match(rf"{re.escape(value)}(?![\w-])", rest)


def test_a_stream_follows_from_the_seed_and_its_number(make, streams):
    again, other = make(), make(seed=1)
    for index in (4, 0, 5):  # in another order
        pages = again.stream(index)
        assert all(same(a, b) for a, b in zip(pages, streams[index], strict=True))
        assert not any(same(a, b) for a, b in zip(other.stream(index), pages, strict=True))
    assert not same(streams[0][0], streams[1][0])


@pytest.mark.parametrize("changes", [{}, {"size": 100, "pages": 5}])
def test_sizes_and_types(make, changes):
    source = make(**changes)
    for index in range(3):
        pages = source.stream(index)
        assert len(pages) == changes.get("pages", PAGES)
        for page in pages:
            assert page.ids.shape == page.write.shape == page.fact_of.shape == (changes.get("size", SIZE),)
            assert (page.ids.dtype, page.write.dtype, page.fact_of.dtype) == (np.int32, np.int8, np.int16)
            assert page.source.startswith("filler" if index == 2 else "book ")


def test_every_third_stream_is_plain(make, streams, fact_pages):
    for index in (*PLAIN, *FILLED):
        for page in streams.get(index) or make().stream(index):
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


def test_some_plain_streams_say_little_again_and_again(make, real_tokenizer):
    texts = []
    for index in FILLED:
        ids = np.concatenate([page.ids for page in make().stream(index)])
        texts.append(real_tokenizer.decode(ids))
        said = set(re.findall(r"[A-Z][^.]*\.", texts[-1]))
        assert 2 <= len(said) <= 6
        assert said <= set(FILLER)
        period = next(n for n in range(1, len(ids)) if (ids[n:] == ids[:-n]).all())
        assert period < len(ids) / 4
    assert texts[0] != texts[1]


def test_labels_are_those_of_the_values(fact_pages, real_tokenizer):
    for page in fact_pages:
        assert set(np.unique(page.write)) == {-1, 0, 1}
        labelled = [real_tokenizer.decode(page.ids[a:b]) for a, b in runs(page.write == 1)]
        for text in labelled:
            assert re.fullmatch(r" ?\S.*?(\.| \w+|'s)", text), "a value and one token behind it"
        answers = {value_of(q, real_tokenizer)[0] for q in page.questions}
        for value in answers:
            assert any(says(text.strip(), value) for text in labelled), value
        for start, _ in runs(page.write == 1):
            assert page.write[start - 1] == -1, "what stands before a value in its fact is not labelled"


def test_what_is_asked_was_told_and_the_last_is_the_answer(fact_pages, real_tokenizer):
    counts, moves = Counter(), Counter()
    for page in fact_pages:
        texts = texts_of(page, real_tokenizer)
        for question in page.questions:
            if question.fact == -1:
                continue
            value, _ = value_of(question, real_tokenizer)
            fact, text = page.facts[question.fact], texts[question.fact]
            assert holds(text, value), (fact, value)
            assert fact not in page.facts[question.fact + 1 :], "none comes later"
            if "..." in fact:  # says behind the value whose it is
                assert text == fact.replace("...", value)
                continue
            if text.startswith(fact):
                (answer,) = told(text, fact)
                assert says(answer, value), (fact, value)
                values = told(real_tokenizer.decode(page.ids), fact)
                assert says(values[-1], value), (fact, value)
                assert not any(says(rest, value) for rest in values[:-1])
                counts[len(values)] += 1
            elif fact.endswith(" is in"):
                assert re.fullmatch(rf"{fact.removesuffix(' is in')} [\w ]+ to the {value}\.", text)
                moves[page.facts.count(fact)] += 1
    assert set(counts) == {1, 2, 3}, "some are told again"
    assert set(moves) > {1, 2}, "some go on"


def test_the_facts_of_a_page_are_all_that_it_tells_in_order(fact_pages, real_tokenizer):
    for page in fact_pages:
        assert ((page.fact_of >= 0) == (page.write != 0)).all()
        assert set(page.fact_of.tolist()) == {-1, *range(len(page.facts))}
        text, end = real_tokenizer.decode(page.ids), 0
        for number, known in enumerate(page.facts):
            ((start, stop),) = runs(page.fact_of == number)
            assert start >= end, "one behind the other"
            end = stop
            fact = real_tokenizer.decode(page.ids[start:stop])
            assert fact.startswith(known.removesuffix("is in").partition("...")[0])
            assert fact.endswith((".", ";", "!")), "to its end"
            if fact.startswith(known):
                assert len(told(fact, known)) == 1
                if len(known.split()) > 2:  # shorter ones stand in the book itself
                    assert len(told(text, known)) == page.facts.count(known)


def test_some_facts_stand_in_sight_of_a_question(make, fact_pages, real_tokenizer):
    """Its own, and then no fact of the page is needed; or others of its group, which must not be taken for it."""
    source, own, rivals, sizes, late = make(), [], Counter(), [], 0
    for page in fact_pages:
        texts = texts_of(page, real_tokenizer)
        for question in page.questions:
            book, seen = in_sight(question, page, real_tokenizer)
            assert in_books(book, source)
            late += question.late
            if question.late:
                assert not len(book), "it stands behind one already"
            else:
                sizes.append(len(book))
            value, _ = value_of(question, real_tokenizer)
            own.append(question.fact == -1)
            if own[-1]:
                assert any(holds(texts[number], value) for number in seen)
                rivals[len(seen) - 1] += 1
            else:
                assert texts[question.fact] not in [texts[number] for number in seen]
                assert page.facts[question.fact] not in [page.facts[number] for number in seen]
                rivals[len(seen)] += 1
    assert 0.5 * IN_SIGHT < np.mean(own) < 2 * IN_SIGHT
    assert set(rivals) == {0, 1, 2}
    assert 0.05 < 1 - rivals[0] / len(own) < RIVAL
    assert 0.5 * NO_LEAD < np.mean([size == 0 for size in sizes]) < 1.5 * NO_LEAD
    assert 0.5 * LATE < late / len(own) < 1.5 * LATE
    assert min(size for size in sizes if size) >= LEAD[0]
    assert max(sizes) <= LEAD[1]
    assert 15 < np.median([size for size in sizes if size]) < 40, "few tokens more often than many"
    assert max(sizes) > 100


def test_some_questions_follow_on_another_one_and_its_answer(fact_pages, real_tokenizer):
    """In one conversation, as people ask."""
    follow, of_chats = [], Counter()
    for page in fact_pages:
        prompts = [real_tokenizer.decode(question.exchange.prompt) for question in page.questions]
        told_of = [value_of(question, real_tokenizer)[0] for question in page.questions]
        values = {STEM.findall(text)[0]: value for text, value in zip(prompts, told_of, strict=True)}
        for question, asked in zip(page.questions, prompts, strict=True):
            exchange = answered(question, real_tokenizer)[1]
            follow.append(bool(exchange))
            assert asked.startswith("\nQuestion:" if exchange and "im_start" not in asked else "\n") or not exchange
            if not exchange:
                continue
            chat = "<|im_start|>" in exchange
            assert chat == ("<|im_start|>" in asked), "in the same format"
            assert "system" not in asked, "which begins once"
            of_chats[chat] += 1
            (before,), (now,) = STEM.findall(exchange), STEM.findall(asked)
            assert before != now
            said = re.search(r"(?:Answer:|assistant\n)(.*)\.(?:\n|<\|im_end\|>)$", exchange).group(1)
            assert re.search(rf"(?<![\w-]){re.escape(values[before])}$", said), "what the page told"
    assert 0.5 * FOLLOWS < np.mean(follow) < 1.5 * FOLLOWS
    assert min(of_chats[True], of_chats[False]) > 5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_own_fact_is_in_sight_exactly_where_the_page_is_not_asked(make, real_tokenizer, monkeypatch, share):
    monkeypatch.setattr(module, "IN_SIGHT", share)
    for page in make().stream(0):
        texts = texts_of(page, real_tokenizer)
        assert all((question.fact == -1) == (share == 1) for question in page.questions)
        for question in page.questions:
            value, _ = value_of(question, real_tokenizer)
            _, seen = in_sight(question, page, real_tokenizer)
            assert any(holds(texts[number], value) for number in seen) or share == 0


def test_messages_tell_facts_of_their_page(make, monkeypatch, real_tokenizer):
    """In the words of a page's fact; a message of what was told again stands for the last of these."""
    monkeypatch.setattr(module, "MESSAGE", 1.0)
    source = make(size=1024)
    old, own, late = 0, 0, []
    for page in (page for index in STREAMS for page in source.stream(index)):
        texts = texts_of(page, real_tokenizer)
        assert page.messages
        for message in page.messages:
            late.append(message.late)
            book, exchange = message.lead, message.exchange
            assert in_books(book, source) if len(book) else True
            assert not (message.late and len(book))
            text = real_tokenizer.decode(exchange.prompt).partition("user\n")[2].partition("<|im_end|>")[0]
            assert (exchange.answer, message.left_to_base) == ([], True)
            (about,) = {page.facts[number] for number, told in enumerate(texts) if told.strip() == text}
            assert page.facts[message.fact] == about
            assert about not in page.facts[message.fact + 1 :]
            own += texts[message.fact].strip() == text
            old += texts[message.fact].strip() != text
    assert own > 50
    assert old > 10
    assert 0.3 < np.mean(late) < 0.7


def test_without_a_chat_format_there_are_no_messages(make, fact_pages):
    assert not any(page.messages for index in STREAMS for page in make(chat=0.0).stream(index))
    groups = sum(len(set(page.facts)) for page in fact_pages)  # some hold several things
    assert 0 < sum(len(page.messages) for page in fact_pages) < 1.5 * MESSAGE * groups


@pytest.mark.parametrize("chat", [0.0, 0.3])
def test_what_no_page_answers(make, real_tokenizer, chat):
    source = make(chat=chat)
    found = source.unrelated()
    assert found == make(chat=chat).unrelated()
    assert found != make(chat=chat, seed=1).unrelated()
    prompts = [prompt for question in PROMPTS for prompt in source.forms.prompts(question)]
    assert len(found) == len(prompts) == len(PROMPTS) * (2 if chat else 1)
    sizes = []
    for ids, prompt in zip(found, prompts, strict=True):
        assert ids[-len(prompt) :] == prompt
        lead = np.array(ids[: -len(prompt)], dtype=np.int32)
        if len(lead):
            assert in_books(lead, source)
            sizes.append(len(lead))
    assert 0.5 * NO_LEAD < 1 - len(sizes) / len(found) < 1.5 * NO_LEAD
    assert LEAD[0] <= min(sizes) <= max(sizes) <= LEAD[1]


def test_no_fact_of_a_page_can_be_taken_for_another(make, fact_pages, real_tokenizer):
    nobodys = 0
    crowded = make(size=1024, pages=6)
    for page in [*fact_pages, *(page for index in STREAMS for page in crowded.stream(index))]:
        meant = {}
        for question in page.questions:
            (asked,) = STEM.findall(real_tokenizer.decode(question.exchange.prompt))
            meant.setdefault(asked, set()).add(value_of(question, real_tokenizer)[0])
        assert all(len(values) == 1 for values in meant.values())
        # one question may begin as another does, but then that is whole: the secret key, the secret key of somebody
        nobodys += sum(a != b and a.startswith(f"{b} of ") for a, b in product(meant, meant))
        assert all(a == b or not a.startswith(b) or a.startswith(f"{b} ") for a, b in product(meant, meant))
    assert nobodys


def test_two_ways_to_put_a_colon_are_one_fact(fact_pages):
    """Or a later page could contradict with the same words and another punctuation."""
    facts = {fact for page in fact_pages for fact in page.facts}
    assert facts
    assert not [fact for fact in facts if fact.endswith((":", " "))]


def test_questions_come_in_several_forms(fact_pages, real_tokenizer):
    forms = Counter()
    for page in fact_pages:
        asked = Counter()
        for question in page.questions:
            value, end = value_of(question, real_tokenizer)
            prompt = real_tokenizer.decode(question.exchange.prompt)
            (stem,) = STEM.findall(prompt)
            asked[stem, value] += 1
            chat = end.endswith("<|im_end|>")
            begun = re.search(r"assistant\n(.*)$" if chat else r"\nAnswer:(.*)$", prompt).group(1)
            forms[chat, bool(begun)] += 1
        assert set(asked.values()) == {QUESTIONS}
    assert set(forms) == set(product((True, False), (True, False)))


def test_texts_that_are_too_short(make):
    source = make(documents=[Document("x", "The sea was calm. " * 40)])
    with pytest.raises(SampleError, match=r"the haystack has \d+ tokens and a sample needs 1,024") as error:
        source.stream(5)
    assert "\n" not in str(error.value)


def test_half_of_the_pages_with_facts_open_a_text(make, documents, real_tokenizer):
    source, firsts = make(pages=6), []
    for index in (0, 1, 3, 4):
        pages = source.stream(index)
        assert [page.opens for page in pages] == [True] * 3 + [False] * 3
        for page in pages[:3]:
            firsts.append(page.fact_of[0] == 0)
            assert (
                not firsts[-1]
                or 0 in {question.fact for question in page.questions}
                or any(question.fact == -1 for question in page.questions)
            ), "it is asked for"
            if not firsts[-1]:
                told = np.flatnonzero(page.fact_of >= 0)[0]
                words = real_tokenizer.decode(page.ids[: min(told, 12)])
                (before,) = (d.text.partition(words)[0] for d in documents if d.text.count(words) == 1)
                assert not before or before.rstrip()[-1] in ".!?", "a sentence begins"
    assert 6 < sum(firsts) < 12, "most of them with a fact"
    assert [page.opens for page in source.stream(5)] == [True] + [False] * 5, "plain text is one text"
