"""The demo's text and table, without the reading: the real model is for `make demo`."""

from types import SimpleNamespace

import pytest

from senri.cli.common import console
from senri.cli.demo import FACTS, planted_text, recall_table


@pytest.fixture
def session(real_tokenizer):
    """Knows every second fact; another answer from an emptied memory."""
    known = {fact.question: fact.answer for fact in FACTS[::2]}

    def ask(question, *, memory):
        return f"It is {known.get(question, 'nothing')}.\nAnd more." if memory else "Nobody [knows]."

    return SimpleNamespace(tokenizer=real_tokenizer, generation={"max_new_tokens": 64}, ask=ask)


def test_every_fact_is_planted_at_its_place(session):
    ids, ends = planted_text(session, 6000)
    assert len(ids) == 6000
    text = session.tokenizer.decode(ids)
    assert text.count(" The secret key is: KEY-ABC12345.") == 1
    for fact, end in zip(FACTS, ends, strict=True):
        before = session.tokenizer.decode(ids[:end])
        assert before.endswith(fact.told)
        assert len(ids) * (fact.place - 0.05) < end < len(ids) * fact.place + 60


def test_a_text_that_holds_no_facts(session):
    with pytest.raises(ValueError, match=r"the demo plants \d+ tokens of facts, 50 do not hold them: set demo"):
        planted_text(session, 50)


def test_the_table_counts_what_was_recalled_and_asks_for_the_last_value(session):
    ends = [1000 * (place + 1) for place in range(len(FACTS))]
    with console.capture() as capture:
        recall_table(session, ends, 10_000)
    shown = capture.get()
    asked = {fact.question: fact for fact in FACTS}
    right = sum(fact in FACTS[::2] for fact in asked.values())
    assert 0 < right < len(asked) < len(FACTS), "a fact is told twice, and not all are known"
    assert f"{right} of {len(asked)} recalled" in shown
    assert "And more" not in shown
    assert "[knows]" in shown
    assert FACTS[2].answer not in shown.replace(asked[FACTS[2].question].told, ""), "that was replaced"
