"""Facts in two directions: both say the same, the published files are read, foreign ones are refused in one line."""

import json
from random import Random

import pytest

from senri.data.haystack import encode
from senri.data.reversal import (
    DESCRIPTIONS_FOLDER,
    PARENTS_FILE,
    Pair,
    description_pairs,
    load_new_pairs,
    load_pairs,
    made_up_pairs,
    own_pairs,
    parent_child_pairs,
)
from senri.data.samples import SampleError
from senri.data.text import TextError

CSV = "child,parent,parent_type,child_prediction,can_reverse\n"
PARENTS = CSV + 'Ann Lee,Mary Lee,mother,,False\nBob Ray,"Tom Ray, Sr.",father,Bob Ray,True\n'


def directions(pair):
    return (pair.forward_prompt, pair.forward_completion), (pair.backward_prompt, pair.backward_completion)


def rows(*pairs):
    return "".join(json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs)


@pytest.fixture
def published(tmp_path):
    """A folder like the published one, with two facts of each kind."""
    (tmp_path / PARENTS_FILE).parent.mkdir(parents=True)
    (tmp_path / PARENTS_FILE).write_text(PARENTS, encoding="utf-8")
    folder = tmp_path / DESCRIPTIONS_FOLDER
    folder.mkdir(parents=True)
    for name, people in (("p2d", ("Ada A", "Bea B")), ("d2p_reverse", ("Cy C", "Di D"))):
        facts = [
            row
            for who in people
            for row in (
                (f"The trailblazer known as {who} was once", f' the maker of "The {who}.".'),
                (f"In the annals of uniqueness, {who} shines as", " something else."),
            )
        ]
        (folder / f"{name}_prompts_test.jsonl").write_text(rows(*facts), encoding="utf-8")
    return tmp_path


def test_own_facts_are_the_same_in_both_directions():
    pairs = own_pairs()
    assert len(pairs) == 60
    for pair in pairs:
        (prompt, completion), (back_prompt, back_completion) = directions(pair)
        assert completion[0] == back_completion[0] == " "
        assert completion.strip() in back_prompt, "the answer of one direction is what the other is told"
        assert back_completion.strip() in prompt
        assert completion.strip() not in prompt
        assert back_completion.strip() not in back_prompt
    assert len({d for pair in pairs for d in directions(pair)}) == 120
    # one relation never has one answer for two questions, or both directions could not be known
    told = [(pair.source, text) for pair in pairs for _, text in directions(pair)]
    assert len(set(told)) == 120


def test_prompt_and_completion_are_cut_where_tokens_are(real_tokenizer):
    for pair in [*own_pairs(), *made_up_pairs(9, Random(0))]:
        for prompt, completion in directions(pair):
            apart = encode(real_tokenizer, prompt) + encode(real_tokenizer, completion)
            assert apart == encode(real_tokenizer, prompt + completion)


def test_sentence_and_turned():
    pair = Pair("A is", " B", "B is", " A", "s")
    assert pair.sentence == "A is B."
    assert pair.turned == Pair("B is", " A", "A is", " B", "s")
    assert pair.turned.sentence == "B is A."


def test_made_up_facts_share_nothing_and_begin_with_either_side():
    pairs = made_up_pairs(50, Random(3))
    assert pairs == made_up_pairs(50, Random(3))
    assert pairs != made_up_pairs(50, Random(4))
    assert [p.sentence.startswith("The person known as the ") for p in pairs] == [False, True] * 25
    names = [(p.turned if i % 2 else p).backward_completion.split() for i, p in enumerate(pairs)]
    assert len({part for name in names for part in name}) == 100
    with pytest.raises(SampleError, match=r"51 .* at most"):
        made_up_pairs(51, Random(3))


def test_published_parents(published):
    pairs = load_pairs(published)
    assert pairs == parent_child_pairs(published / PARENTS_FILE)
    assert directions(pairs[1]) == (
        ("The father of Bob Ray is", " Tom Ray, Sr."),
        ("Tom Ray, Sr. is the father of", " Bob Ray"),
    )
    assert [p.sentence for p in pairs[:1]] == ["The mother of Ann Lee is Mary Lee."]
    assert load_pairs(None) == own_pairs()


def test_published_descriptions_alternate_as_they_were_published(published):
    pairs = description_pairs(published / DESCRIPTIONS_FOLDER)
    assert [p.sentence for p in pairs] == [
        'Ada A is known as the maker of "The Ada A".',
        'The person known as the maker of "The Cy C" is Cy C.',
        'Bea B is known as the maker of "The Bea B".',
        'The person known as the maker of "The Di D" is Di D.',
    ]
    assert pairs[0].turned.sentence == 'The person known as the maker of "The Ada A" is Ada A.'
    assert load_new_pairs(published, 3, Random(0)) == pairs[:3]
    with pytest.raises(SampleError, match="4 made-up facts, not 5"):
        load_new_pairs(published, 5, Random(0))
    assert load_new_pairs(None, 5, Random(0)) == made_up_pairs(5, Random(0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("a,b\n1,2\n", "line 2 names no"),
        (CSV + "Ann,Mary,mother,,False\nBob,,father,,True\n", "line 3 names no"),
        (CSV + "Ann,Mary,aunt,,False\n", "line 2 names no"),
    ],
)
def test_foreign_parent_files(tmp_path, text, reason):
    path = tmp_path / "pairs.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(TextError, match=reason) as caught:
        parent_child_pairs(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("{}\n", "line 1 is no JSON object"),
        ("[1]\n", "line 1 is no JSON object"),
        (rows(("a", "b")) + "nonsense\n", "line 2 is no JSON object"),
        ('{"prompt": "a", "completion": 3}\n', "line 1 is no JSON object"),
        (rows(("a", "b")), "not the published file"),
    ],
)
def test_foreign_description_files(published, text, reason):
    path = published / DESCRIPTIONS_FOLDER / "d2p_reverse_prompts_test.jsonl"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises(TextError, match=reason) as caught:
        description_pairs(path.parent)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
