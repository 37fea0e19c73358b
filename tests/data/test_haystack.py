"""Haystacks and the hiding in them: exact lengths, real sentence boundaries, every token accounted for."""

import re
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from senri.data.corpus import Document
from senri.data.haystack import (
    FILLER,
    BookHaystack,
    Plant,
    RepeatedHaystack,
    SentenceHaystack,
    Stretch,
    encode,
    plant,
)
from senri.data.samples import SampleError

# Jane Austen, Pride and Prejudice (1813), its beginning, and two lines that tempt.
PROSE = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is \
so well fixed in the minds of the surrounding families. It is considered the rightful property of some one or other \
of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?" Mr. Bennet \
replied that he had not. "But it is," returned she; "for Mrs. Long has just been here!" He made no answer. \
She paid 3.50 for it... He knew? Why! 5 of them came. Then she went.
The next line begins here. - A dash follows.
"""


def tell(name, count, start=0):
    """Numbered sentences: which ones a stretch holds can be read off."""
    return "".join(f"{' ' if i else ''}{name} saw ship {start + i} today." for i in range(count))


@pytest.fixture(scope="module")
def books(real_tokenizer):
    names = ("Anna", "Bert", "Carl")
    documents = [Document(name, tell(name, 120 + 60 * i)) for i, name in enumerate(names)]
    return BookHaystack(documents, real_tokenizer)


def sentence_ends(text):
    """Where a sentence ends, by the text alone: before a word or a line break. (Digits are tokens without a space.)"""
    return {match.end() for match in re.finditer(r"""[.!?]["'”’)\]]*(?= [A-Za-z]|\n)""", text)}


def characters_before(cuts, ids, tokenizer):
    """How many characters of the text lie before each cut; every token here is whole characters."""
    ends = np.cumsum([0, *(len(tokenizer.decode([i])) for i in ids)])
    return {int(ends[cut]) for cut in cuts}


def total(books):
    return sum(len(books.ids(i)) for i in range(len(books.documents)))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# books -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 37, 1000, 3000])
def test_a_stretch_is_as_long_as_asked_and_the_same_for_the_same_chance(books, real_tokenizer, length):
    seen = set()
    for seed in range(20):
        one, two = books.stretch(length, Random(seed)), books.stretch(length, Random(seed))
        assert one.ids.shape == (length,)
        assert one.ids.dtype == np.int32
        assert np.array_equal(one.ids, two.ids)
        assert np.array_equal(one.cuts, two.cuts)
        assert one.source == two.source
        assert one.cuts[0] == 0
        assert one.cuts[-1] == length
        assert np.all(np.diff(one.cuts) > 0)
        seen.add(one.ids.tobytes())
    assert len(seen) > (15 if length > 10 else 0)
    fresh = BookHaystack(books.documents, real_tokenizer)  # the tokens it keeps change nothing
    assert np.array_equal(fresh.stretch(length, Random(3)).ids, books.stretch(length, Random(3)).ids)


def test_a_stretch_does_not_depend_on_the_ones_before(books):
    rng = Random(1)
    first, second = books.stretch(50, rng), books.stretch(50, rng)
    assert not np.array_equal(first.ids, second.ids)


def test_longer_ones_begin_as_shorter_ones_do(books):
    for seed in range(10):
        short, long = books.stretch(200, Random(seed)), books.stretch(2500, Random(seed))
        assert np.array_equal(short.ids, long.ids[:200])
        assert set(short.cuts[:-1]) <= set(long.cuts)


def test_no_text_comes_twice_in_one_stretch(books, real_tokenizer):
    every = total(books)
    for seed in range(25):
        stretch = books.stretch(every, Random(seed))
        # all of it, in a turned order: the multiset of tokens is the collection's
        whole = np.concatenate([books.ids(i) for i in range(3)])
        assert np.array_equal(np.sort(stretch.ids), np.sort(whole))
        text = real_tokenizer.decode(stretch.ids)
        for name, count in (("Anna", 120), ("Bert", 180), ("Carl", 240)):
            told = [f"{name} saw ship {i} today." in text for i in range(count)]
            assert sum(told) >= count - 1  # one may be cut at the stretch's start
            assert text.count(f"{name} saw") == count
        assert sorted(stretch.source.split(" + ")) == ["Anna", "Bert", "Carl"]


def test_it_goes_on_through_the_next_texts_in_order(books, real_tokenizer):
    turns = set()
    for seed in range(40):
        stretch = books.stretch(len(books.ids(0)) + len(books.ids(1)), Random(seed))
        text = real_tokenizer.decode(stretch.ids)
        names = stretch.source.split(" + ")
        first = ["Anna", "Bert", "Carl"].index(names[0])
        assert names == [["Anna", "Bert", "Carl"][(first + i) % 3] for i in range(len(names))]
        places = [text.index(f"{name} saw") for name in names]
        assert places == sorted(places)
        assert all(f"{name} saw ship 0 today." in text for name in names[1:])  # each further one from its beginning
        turns.add(names[0])
    assert turns == {"Anna", "Bert", "Carl"}


def test_a_short_stretch_lies_in_one_text_and_names_only_it(books, real_tokenizer):
    for seed in range(20):
        stretch = books.stretch(20, Random(seed))
        text = real_tokenizer.decode(stretch.ids)
        assert [name for name in ("Anna", "Bert", "Carl") if name in text] == stretch.source.split(" + ")


def test_it_starts_at_a_sentence(books, real_tokenizer):
    """Except behind a text's last sentence start, where there is none to go on to."""
    early = 0
    for seed in range(150):
        stretch = books.stretch(15, Random(seed))
        text = real_tokenizer.decode(stretch.ids)
        if text.startswith((" Anna saw ship", " Bert saw ship", " Carl saw ship")):
            early += 1
        else:
            assert stretch.source.count("+") == 1, text
    assert early >= 145


def test_a_long_text_is_as_likely_as_its_length(real_tokenizer):
    books = BookHaystack([Document("short", tell("Anna", 40)), Document("long", tell("Bert", 360))], real_tokenizer)
    firsts = [books.stretch(5, Random(seed)).source.split(" + ")[0] for seed in range(400)]
    assert 15 < firsts.count("short") < 70  # 40 expected


def test_too_little_text_says_how_much_there_is(books):
    every = total(books)
    for seed in range(10):
        with pytest.raises(SampleError) as caught:
            books.stretch(every + 1, Random(seed))
        message = one_line(caught)
        assert f"has {every:,} tokens" in message
        assert f"needs {every + 1:,}" in message


def test_one_text_without_sentences_is_enough(real_tokenizer):
    books = BookHaystack([Document("list", "apple pear plum " * 50)], real_tokenizer)
    whole = len(books.ids(0))
    stretch = books.stretch(whole, Random(5))
    assert np.array_equal(np.sort(stretch.ids), np.sort(books.ids(0)))
    assert list(stretch.cuts) == [0, whole]
    assert stretch.source == "list"


def test_cuts_are_where_a_sentence_ends_before_another_or_the_lines_end(real_tokenizer):
    ids = np.array(encode(real_tokenizer, PROSE), dtype=np.int32)
    cuts = BookHaystack([Document("p", PROSE)], real_tokenizer).cuts(ids)
    assert cuts[0] == 0
    assert cuts[-1] == len(ids)
    around = []
    for cut in cuts[1:-1]:
        before, after = real_tokenizer.decode(ids[:cut]), real_tokenizer.decode(ids[cut:])
        assert before + after == PROSE
        around.append((before[-9:], after[:7]))
    for before, after in around:
        assert before.rstrip("\"')”’").endswith((".", "!", "?"))
        assert after[0] == "\n" or (after[0] == " " and after[1].isalnum())
    starts = [after for _, after in around]
    for wanted in (" It is ", " Mr. Be", " He mad", " She pa", " He kne", " Why! 5", " Then s"):
        assert wanted in starts, wanted
    for wanted in ("\n\nHowev", '\n\n"My d', "\nThe ne", "\n"):  # before the line's break, not behind it
        assert wanted in starts, wanted
    for unwanted in (" single", "Howeve", "\nHoweve", '"My dea', "The nex", " - A da", "50 for "):
        assert not any(start.startswith(unwanted) for start in starts), unwanted
    assert characters_before(cuts, ids, real_tokenizer) == sentence_ends(PROSE) | {0, len(PROSE)}


@pytest.mark.parametrize("verse_end", [" ", "\n"])  # the first as senri.data.bible gives it
def test_cuts_in_a_real_text(real_text, real_tokenizer, verse_end):
    text = real_text[300_000:400_000].replace("\n", verse_end)
    books = BookHaystack([Document("verses", text)], real_tokenizer)
    ids = books.ids(0)
    cuts = books.cuts(ids)
    assert len(cuts) > 300
    for cut in cuts[1:-1]:
        before, after = real_tokenizer.decode(ids[max(cut - 3, 0) : cut]), real_tokenizer.decode(ids[cut : cut + 2])
        assert before.rstrip("\"')").endswith((".", "!", "?")), (before, after)
        assert after[0] == "\n" or (after[0] == " " and after[1].isalnum())
    assert characters_before(cuts, ids, real_tokenizer) == sentence_ends(text) | {0, len(text)}
    at_lines_end = sum(text[end] == "\n" for end in sentence_ends(text))
    assert at_lines_end > 300 if verse_end == "\n" else at_lines_end == 0


@pytest.mark.parametrize("ids", [[], [5]])
def test_cuts_of_next_to_nothing(books, ids):
    assert list(books.cuts(np.array(ids, dtype=np.int32))) == sorted({0, len(ids)})


# made haystacks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 24, 25, 26, 500, 1003])
def test_the_filler_over_and_over(real_tokenizer, length):
    haystack = RepeatedHaystack(real_tokenizer)
    stretch = haystack.stretch(length, Random(0))
    text = real_tokenizer.decode(stretch.ids)
    assert len(stretch.ids) == length
    assert stretch.ids.dtype == np.int32
    assert (FILLER * (length // 20 + 1)).startswith(text)
    assert stretch.cuts[0] == 0
    assert stretch.cuts[-1] == length
    assert np.all(np.diff(stretch.cuts) > 0)
    for cut in stretch.cuts[:-1]:
        assert real_tokenizer.decode(stretch.ids[cut : cut + 3]) in (" The grass is", " The grass", " The")
    assert len(stretch.cuts) == -(-length // len(haystack.unit)) + 1
    other = RepeatedHaystack(real_tokenizer, " Yes.").stretch(length, Random(1))
    assert set(real_tokenizer.decode(other.ids).split()) <= {"Yes.", "Yes"}


def test_sentences_made_one_by_one(real_tokenizer):
    haystack = SentenceHaystack(real_tokenizer, lambda rng: f" Box {rng.randrange(10**6)} is blue.")
    for length in (1, 11, 12, 400):
        stretch, again = haystack.stretch(length, Random(2)), haystack.stretch(length, Random(2))
        assert len(stretch.ids) == length
        assert stretch.ids.dtype == np.int32
        assert np.array_equal(stretch.ids, again.ids)
        assert stretch.cuts[0] == 0
        assert stretch.cuts[-1] == length
        assert np.all(np.diff(stretch.cuts) > 0)
        for cut in stretch.cuts[:-1]:
            assert real_tokenizer.decode(stretch.ids[cut:]).startswith(" Box")
        assert real_tokenizer.decode(stretch.ids).count(" Box") == len(stretch.cuts) - 1
    assert not np.array_equal(haystack.stretch(400, Random(3)).ids, stretch.ids)


# planting --------------------------------------------------------------------------------------------------------


@st.composite
def plantings(draw):
    """A stretch of the tokens 0, 1, 2, ...; plants and head of tokens that occur nowhere else."""
    size = draw(st.integers(1, 60))
    inner = draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=12)) if size > 1 else set()
    stretch = Stretch(np.arange(size, dtype=np.int32), np.array(sorted({0, *inner, size})), "numbers")
    head = tuple(range(500, 500 + draw(st.integers(0, 4))))
    places = st.one_of(st.floats(-5, 90, allow_nan=False), st.integers(0, 80).map(float), st.sampled_from([0.0, 20.0]))
    plants = [
        Plant(draw(places), tuple(range(1000 + 10 * i, 1000 + 10 * i + draw(st.integers(1, 6)))))
        for i in range(draw(st.integers(0, 6)))
    ]
    room = draw(st.integers(0, size))
    return stretch, plants, len(head) + sum(len(p.ids) for p in plants) + room, head, room


@settings(deadline=None)
@given(plantings())
def test_planting(planting):
    stretch, plants, length, head, room = planting
    ids, spans = plant(stretch, plants, length, head)
    assert ids.shape == (length,)
    assert ids.dtype == np.int32
    assert tuple(ids[: len(head)]) == head
    assert len(spans) == len(plants)
    for p, (start, stop) in zip(plants, spans, strict=True):
        assert tuple(ids[start:stop]) == p.ids
    rest = [t for t in ids if t < 500]
    assert rest == list(range(room)), "the haystack in order and complete"
    # where they stand: `hay` tokens of the haystack lie before each
    boundaries = [c for c in stretch.cuts if c < room] or [room]  # the end itself may cut a sentence
    order = sorted(range(len(plants)), key=lambda i: plants[i].position)  # stable: equal ones in the order given
    starts = [spans[i][0] for i in order]
    assert starts == sorted(starts)
    before = 0
    for i in order:
        start = spans[i][0]
        hay = sum(t < 500 for t in ids[:start])
        assert hay in boundaries
        # at or before the place asked for; behind it only where the plants before it leave no room
        assert start <= plants[i].position or hay == before
        # and at the last boundary that is
        assert all(start + later - hay > plants[i].position for later in boundaries if later > hay)
        before = hay


@settings(deadline=None)
@given(plantings(), st.integers(0, 20), st.integers(1, 5))
def test_what_comes_later_moves_nothing(planting, extra, size):
    stretch, plants, length, head, room = planting
    ids, spans = plant(stretch, plants, length, head)
    last = max([p.position for p in plants], default=0.0)
    longer = Stretch(np.arange(room + extra + 5, dtype=np.int32), np.array([*stretch.cuts, room + extra + 5]), "more")
    longer = longer._replace(cuts=np.unique(longer.cuts[longer.cuts <= room + extra + 5]))
    more = [*plants, Plant(last + 3, tuple(range(2000, 2000 + size)))]
    ids_2, spans_2 = plant(longer, more, length + extra + size, head)
    # Only plants that go behind the first context's text, for which it had no place, may stand elsewhere.
    order = sorted(range(len(plants)), key=lambda i: plants[i].position)
    behind = [i for i in order if sum(t < 500 for t in ids_2[: spans_2[i][0]]) >= room]
    same = min([length, spans_2[-1][0], *(min(spans[i][0], spans_2[i][0]) for i in behind)])
    assert np.array_equal(ids[:same], ids_2[:same])
    assert all(spans[i] == spans_2[i] for i in range(len(plants)) if i not in behind)
    assert behind == order[len(order) - len(behind) :]
    if behind:
        start, _ = spans[behind[0]]
        rest = room - sum(t < 500 for t in ids[:start])  # tokens of the text from it to the end
        assert room == 0 or plants[behind[0]].position >= start + rest, "it was to stand there"


@settings(deadline=None)
@given(plantings())
def test_plants_in_any_order_land_in_the_same_places(planting):
    stretch, plants, length, head, _ = planting
    if len({p.position for p in plants}) < len(plants):
        return
    ids, spans = plant(stretch, plants, length, head)
    ids_2, spans_2 = plant(stretch, plants[::-1], length, head)
    assert np.array_equal(ids, ids_2)
    assert spans == spans_2[::-1]


def test_an_example_by_hand():
    stretch = Stretch(np.arange(10, dtype=np.int32), np.array([0, 3, 6, 10]), "numbers")
    ids, spans = plant(stretch, [Plant(7.0, (91, 92)), Plant(3.9, (81,))], 12, (70,))
    assert list(ids) == [70, 81, 0, 1, 2, 91, 92, 3, 4, 5, 6, 7]
    assert spans == [(5, 7), (1, 2)]
    ids, spans = plant(stretch, [Plant(8.0, (91, 92)), Plant(4.0, (81,))], 12, (70,))
    assert list(ids) == [70, 0, 1, 2, 81, 3, 4, 5, 91, 92, 6, 7]
    assert spans == [(8, 10), (4, 5)]


def test_a_plant_at_the_end_stands_at_the_last_sentences_end():
    """The context's end may cut a sentence, so it is no place for another one."""
    stretch = Stretch(np.arange(10, dtype=np.int32), np.array([0, 3, 6, 10]), "numbers")
    for room, end in ((10, 6), (8, 6), (7, 6), (6, 3), (4, 3), (3, 0), (1, 0), (0, 0)):
        for position in (float(room), room + 2.0, 99.0):
            ids, spans = plant(stretch, [Plant(position, (91, 92)), Plant(position + 1, (81,))], room + 4, (70,))
            assert list(ids) == [70, *range(end), 91, 92, 81, *range(end, room)]
            assert spans == [(end + 1, end + 3), (end + 3, end + 4)]
    nothing = Stretch(np.arange(0, dtype=np.int32), np.array([0]), "numbers")
    assert list(plant(nothing, [Plant(5.0, (91,))], 2, (70,))[0]) == [70, 91]
    whole = Stretch(np.arange(10, dtype=np.int32), np.array([0, 10]), "numbers")
    assert list(plant(whole, [Plant(99.0, (91,))], 11)[0]) == [91, *range(10)]


def test_a_plant_at_a_lines_end_stands_before_the_break(real_tokenizer):
    text = "".join(f"Anna saw ship {i} today.\n" for i in range(200))
    books = BookHaystack([Document("lines", text)], real_tokenizer)
    fact = tuple(encode(real_tokenizer, " The secret is told."))
    for seed in range(10):
        stretch = books.stretch(300, Random(seed))
        for position in range(20, 310, 29):
            ids, ((start, stop),) = plant(stretch, [Plant(float(position), fact)], 300 + len(fact))
            assert 0 <= position - start <= 12 or position > 300 - 12, "a line is 9 to 11 tokens long"
            before, after = real_tokenizer.decode(ids[:start]), real_tokenizer.decode(ids[stop:])
            assert before.endswith(" today.")
            assert after.startswith("\nAnna saw ship")


def test_what_does_not_fit_is_said_in_one_line():
    stretch = Stretch(np.arange(10, dtype=np.int32), np.array([0, 10]), "numbers")
    facts = [Plant(0.0, (91,) * 600), Plant(1.0, (92,) * 700)]
    ids, _ = plant(stretch, facts, 1304, (1, 2, 3, 4))
    assert len(ids) == 1304
    with pytest.raises(SampleError) as caught:
        plant(stretch, facts, 1303, (1, 2, 3, 4))
    assert "a context of 1,303 tokens does not hold its facts and instructions (1,304 tokens)" in one_line(caught)
    with pytest.raises(SampleError) as caught:
        plant(stretch, facts, -7)
    assert "does not hold its facts" in one_line(caught)
    assert len(plant(stretch, facts, 1310)[0]) == 1310
    with pytest.raises(SampleError) as caught:
        plant(stretch, facts, 1311)
    assert one_line(caught) == "the stretch has 10 tokens and the context needs 11"
