"""Scoring: what counts as said, what counts as exact, and when more text cannot matter."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from senri.data.samples import Question
from senri.evaluation.scoring import cut, decided, exact, score


def ask(*answers, metric="all", others=(), stop="\n"):
    return Question(0, (1,), answers, 8, {}, metric=metric, others=others, stop=stop)


@pytest.mark.parametrize(
    ("text", "answers", "value"),
    [
        ("KEY-ABC12345", ("KEY-ABC12345",), 1.0),
        (" it is key-abc12345, I think", ("KEY-ABC12345",), 1.0),
        ("KEY-ABC1234", ("KEY-ABC12345",), 0.0),
        ("", ("a",), 0.0),
        ("one and two", ("one", "two", "three", "four"), 0.5),
        ("four three two one", ("one", "two", "three", "four"), 1.0),
        ("ONE", ("one", "Two", "THREE", "four"), 0.25),
        ("the 12345678", ("1234567",), 1.0),  # RULER's: anywhere in the text
        ("", ("one", "two"), 0.0),
    ],
)
def test_all_is_the_share_that_was_said(text, answers, value):
    assert score(text, ask(*answers)) == value
    assert type(score(text, ask(*answers))) is float


def test_part_takes_one_of_them():
    question = ask("Paris", "the city of Paris", metric="part")
    assert score("In paris.", question) == 1.0
    assert score("In London.", question) == 0.0
    assert score("the city of Paris", question) == 1.0
    assert type(score("x", question)) is float


def test_label_takes_the_right_one_and_no_other():
    question = ask("kitchen", metric="label", others=("garden", "hallway"))
    assert score("The KITCHEN", question) == 1.0
    assert score("kitchen or garden", question) == 0.0
    assert score("garden", question) == 0.0
    assert score("", question) == 0.0
    assert score("kitchen. Then the garden", question) == 1.0  # the first sentence counts
    both = ask("kitchen", "garden", metric="label", others=("hallway",))
    assert score("garden, kitchen", both) == 1.0
    assert score("garden", both) == 0.0
    assert score("garden", ask("kitchen", "garden")) == 0.5  # unlike the metric all


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("KEY-1", True),
        ("  KEY-1\n", True),
        ("KEY-1.", True),
        ('"KEY-1"', True),
        ('"KEY-1."', True),
        ("'KEY-1'.", True),
        (' " KEY-1 " ', True),
        ("key-1", False),
        ("KEY-1 KEY-1", False),
        ("It is KEY-1", False),
        ("KEY-12", False),
        ("KEY-", False),
        ("KEY-1!", False),
        ("KEY-1, KEY-2", False),
        ("", False),
    ],
)
def test_exact(text, right):
    assert exact(text, ask("KEY-1")) is right


def test_exact_keeps_quotes_inside_and_asks_for_one_answer():
    assert exact('"don\'t go".', ask("don't go"))
    assert not exact("dont go", ask("don't go"))
    assert not exact("one", ask("one", "one"))
    assert not exact("one two", ask("one", "two"))


@settings(deadline=None)
@given(st.sampled_from(["KEY-ABC12345", "5.5 miles", "Ada Abbott"]), st.text(alphabet=" .\"'\n", max_size=4))
def test_an_exact_answer_is_a_right_one(answer, around):
    question = ask(answer)
    text = around + answer + around[::-1]
    assert exact(text, question) == (text.strip().strip("\"'. ") == answer)
    if exact(text, question):
        assert score(text, question) == 1.0


@pytest.mark.parametrize(
    ("text", "stop", "counts"),
    [
        (" a\nb", "\n", "a"),
        ("\n\n a\nb\nc", "\n", "a"),  # not before something was said
        ("a", "\n", "a"),
        ("", "\n", ""),
        ("\n \n", "\n", ""),
        (" a\nb ", None, "a\nb"),
        ("a END b END", "END", "a"),
        ("  \n", None, ""),
        (" a\nb ", "", "a\nb"),
    ],
)
def test_cut(text, stop, counts):
    assert cut(text, stop) == counts


def test_decided():
    line, whole = ask("one", "two"), ask("one", "two", stop=None)
    assert not decided("", line)
    assert not decided("\n\n", line)
    assert not decided("one", line)
    assert decided("none\n", line)
    assert decided("\n one\n", line)
    assert not decided("one\n", whole)
    assert decided("one\ntwo", whole)
    label = ask("kitchen", metric="label", others=("garden",), stop=None)
    assert not decided("kitchen", label)  # it may still say garden
    part = ask("one", "two", metric="part", stop=None)
    assert decided("two", part)
    assert not decided("three", part)
    assert not decided("one two", ask("one", "two", stop="")), "what else it says counts"


def test_an_answer_that_ends_itself_is_exact_or_not():
    assert exact("KEY-1.", ask("KEY-1", stop="")) is True
    assert exact("KEY-1. A key is", ask("KEY-1", stop="")) is False
    assert exact("KEY-1.", ask("KEY-1", stop=None)) is None


WORDS = st.lists(
    st.sampled_from(["one", "ONE", "two", "three", "kitchen", "Garden", "\n", " ", ".", "END", "EN", "D", "t", "wo"]),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(WORDS, st.sampled_from(["", "\n", "END", ".", "one", " kitchen two one"])).map("".join),
    st.one_of(WORDS, st.text(st.characters(max_codepoint=127), max_size=8)),
    st.sampled_from(["all", "part", "label"]),
    st.sampled_from(["\n", None, "", "END", "."]),
    st.sampled_from([("one",), ("one", "two"), ("kitchen",), ("kitchen", "two")]),
)
def test_once_decided_nothing_changes_the_score(text, more, metric, stop, answers):
    question = ask(*answers, metric=metric, others=("garden", "three") if metric == "label" else (), stop=stop)
    if not decided(text, question):
        return
    before = score(cut(text, stop), question)
    assert score(cut(text + more, stop), question) == before
    assert exact(cut(text + more, stop), question) == exact(cut(text, stop), question) or stop is None
    assert decided(text + more, question)


def test_deciding_early_is_used():
    """The property above would hold for a ``decided`` that always says no."""
    assert [decided(t, ask("one")) for t in ("o", "one", "one\n", "two\n")] == [False, False, True, True]
    assert [decided(t, ask("one", stop=None)) for t in ("o", "one", "one\n", "two\n")] == [False, True, True, False]
