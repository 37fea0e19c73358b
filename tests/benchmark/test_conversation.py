"""The script of facts told anew: what it tells and asks, and how it counts."""

from random import Random

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("conversation")


def test_facts_are_of_different_people_and_change(script):
    facts = script.make_facts(Random(0))
    assert len(facts) == len(script.WORDINGS) == 6
    assert facts == script.make_facts(Random(0)) != script.make_facts(Random(1))
    for fact in facts:
        assert fact.old in fact.told
        assert fact.new in fact.anew
        assert fact.old not in fact.anew
        assert fact.question.endswith("?")
        assert fact.old not in fact.question
        assert "mentioned above" not in fact.question
    people = {fact.told.strip().replace(fact.old, "") for fact in facts}
    assert len(people) == 6


class Parrot:
    """Says what it is given, in turn."""

    def __init__(self, *answers):
        self.answers, self.heard = list(answers), []

    def say(self, message):
        self.heard.append(message)
        return self.answers.pop(0)

    ask = say


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("It is {new}.", "{new}", "Paris", "{other}"), (True, False, False, True, True, True)),
        (("", "{new}. A key is", "", "'{other}'."), (True, False, False, True, False, True)),
        (("No, {old}!", "{old}", "Paris", "{new}"), (False, True, True, False, False, False)),
        (("", "", "{new}", "{old}"), (False, False, False, False, False, False)),
    ],
)
def test_each_count_looks_at_its_own_answer(script, answers, right):
    fact, other, *_ = script.make_facts(Random(0))
    session = Parrot(*(text.format(new=fact.new, old=fact.old, other=other.old) for text in answers))
    found = script.converse(session, fact, other)
    assert tuple(found[name] for name in script.COUNTS) == right
    assert session.heard == [fact.anew, fact.question, script.ASIDE, other.question]
