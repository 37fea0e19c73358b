"""BABILong: stories read as bAbI tells them, hidden in order in real text, and scored as the paper's script does."""

import re
from random import Random

import numpy as np
import pytest

from senri.data import babilong
from senri.data.babilong import Story, babilong_context, babilong_correct, instruction, load_babi
from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, RepeatedHaystack
from senri.data.samples import SampleError
from senri.data.text import TextError
from senri.evaluation.scoring import score

QA1 = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
7 John moved to the office.
8 Mary travelled to the kitchen.
9 Where is Mary? \tkitchen\t8
1 Sandra travelled to the office.
2 Sandra went to the bathroom.
3 Where is Sandra? \tbathroom\t2
"""
QA1_FACTS = tuple(line.split(" ", 1)[1] for line in QA1.splitlines()[:9] if "\t" not in line)
QA2 = """1 Mary got the milk there.
2 John moved to the bedroom.
3 Mary travelled to the hallway.
4 Where is the milk? \thallway\t1 3
5 Mary dropped the milk.
6 Mary went to the garden.
7 Where is the milk? \thallway\t5 3
"""
QA8 = """1 Mary got the milk there.
2 Mary took the apple.
3 John moved to the bathroom.
4 What is Mary carrying? \tmilk,apple\t1 2
"""


@pytest.fixture(scope="module")
def babi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babi")
    for name, text in {"qa1_one": QA1, "qa2_two": QA2, "qa8_lists": QA8, "qa10_more": "1 Not read.\n"}.items():
        (folder / f"{name}_test.txt").write_text(text)
    (folder / "qa1_one_train.txt").write_text(QA1.split("1 Sandra")[0])
    return folder


@pytest.fixture(scope="module")
def books(real_text, real_tokenizer):
    halves = [real_text[:300_000], real_text[1_000_000:1_300_000]]
    documents = [Document(f"book {i}", half.replace("\n", " ")) for i, half in enumerate(halves)]
    return BookHaystack(documents, real_tokenizer)


@pytest.fixture(scope="module")
def make(books, real_tokenizer):
    """``(story, length, seed, task)`` -> a sample in book text."""

    def context(story, length=2048, seed=0, task="qa1"):
        return babilong_context(story, books, real_tokenizer, length, Random(seed), task)

    return context


def test_one_story_a_question_with_the_facts_before_it(babi):
    first, second, third, other = load_babi(babi, "qa1", "test")
    assert first == Story(QA1_FACTS[:2], "Where is Mary?", "bathroom", (0,))
    assert second == Story(QA1_FACTS[:4], "Where is Daniel?", "hallway", (2,))
    assert third == Story(QA1_FACTS, "Where is Mary?", "kitchen", (5,))
    assert other == Story(
        ("Sandra travelled to the office.", "Sandra went to the bathroom."), "Where is Sandra?", "bathroom", (1,)
    )
    assert load_babi(str(babi), "qa1", "train") == [first, second, third]
    assert [story.supporting for story in load_babi(babi, "qa2", "test")] == [(0, 2), (3, 2)]


def test_the_answer_is_where_the_person_went_last(babi):
    for story in load_babi(babi, "qa1", "test"):
        person = re.fullmatch(r"Where is (\w+)\?", story.question)[1]
        last = [fact for fact in story.facts if fact.startswith(person)][-1]
        assert last.endswith(f" {story.answer}.")
        assert story.facts[story.supporting[0]] == last


@pytest.mark.parametrize("line", ["no number here", "3 Where is Mary? \tbathroom", "3 Where? \tbathroom\t9", "4"])
def test_lines_that_are_not_babis_are_named(tmp_path, line):
    (tmp_path / "qa1_x_test.txt").write_text(f"1 Mary moved to the bathroom.\n2 John left.\n{line}\n")
    with pytest.raises(TextError, match=r"qa1_x_test\.txt: line 3 is not a line of bAbI"):
        load_babi(tmp_path, "qa1", "test")


def test_a_missing_task_says_what_to_give(tmp_path):
    with pytest.raises(TextError, match=r"has no qa1_\*_test\.txt: give a folder like"):
        load_babi(tmp_path, "qa1", "test")


@pytest.mark.parametrize("length", [1024, 2048, 8192, 32768])
def test_exact_lengths_and_facts_in_order_in_untouched_book_text(babi, make, books, real_tokenizer, length):
    story = load_babi(babi, "qa1", "test")[2]
    story = Story(story.facts, story.question, story.answer, tuple(range(6)))  # so that every fact's place is known
    for seed in range(3):
        context = make(story, length, seed)
        (question,) = context.questions
        assert question.at == len(context.ids)
        assert question.at + len(question.prompt) + 8 == length
        assert question.max_new_tokens == 8
        told = [real_tokenizer.decode(context.ids[start:stop]) for start, stop in question.evidence]
        assert told == [f" {fact}" for fact in story.facts]
        assert sorted(question.evidence) == list(question.evidence), "order kept"
        rest = np.delete(context.ids, [i for start, stop in question.evidence for i in range(start, stop)])
        text = real_tokenizer.decode(rest)
        assert text.startswith(instruction("qa1"))
        one, two = (document.text for document in books.documents)
        assert text.removeprefix(instruction("qa1")) in one + two + one, "a stretch of the books, as it stands there"
        assert context.source.startswith("book")


def test_the_question_stands_behind_the_text_with_its_answers(babi, make, real_tokenizer):
    story = load_babi(babi, "qa1", "test")[1]
    context = make(story)
    (question,) = context.questions
    assert real_tokenizer.decode(question.prompt) == "\n\nQuestion: Where is Daniel?\nAnswer:"
    assert question.answers == ("hallway",)
    assert set(question.others) == {"bathroom", "bedroom", "garden", "kitchen", "office"}
    assert question.cell == {"task": "qa1", "length": 2048, "depth": None}
    assert (question.metric, question.stop) == ("label", "\n")
    ((start, stop),) = question.evidence
    assert real_tokenizer.decode(context.ids[start:stop]) == " Daniel went back to the hallway."


def test_facts_fall_anywhere(babi, make):
    story = load_babi(babi, "qa1", "test")[3]
    story = Story(story.facts, story.question, story.answer, (0, 1))
    places = [start / q.at for seed in range(60) for q in make(story, 4096, seed).questions for start, _ in q.evidence]
    assert min(places) < 0.15
    assert max(places) > 0.9
    assert sum(place < 0.5 for place in places) in range(35, 75)


def test_several_answers_and_labels_of_the_question(babi, make):
    (question,) = make(load_babi(babi, "qa8", "test")[0], task="qa8").questions
    assert (question.answers, question.others, question.metric) == (("milk", "apple"), ("football", "nothing"), "label")
    before = Story(("Mary moved to the kitchen.",), "Where was the milk before the kitchen?", "garden", (0,))
    assert set(make(before, task="qa3").questions[0].others) == {"bathroom", "bedroom", "hallway", "office"}
    counted = Story(("Mary left.",), "How many objects is Mary carrying?", "none", (0,))
    assert set(make(counted, task="qa7").questions[0].others) == {"two", "three"}, "'one' stands in 'none'"


def test_the_same_state_gives_the_same_sample_and_another_one_another(babi, make):
    story = load_babi(babi, "qa1", "test")[2]
    first, again, other = (make(story, seed=seed) for seed in (1, 1, 2))
    assert first.ids.tolist() == again.ids.tolist()
    assert first.questions == again.questions
    assert first.ids.tolist() != other.ids.tolist()
    assert first.questions[0].evidence != other.questions[0].evidence


def test_too_short_says_the_smallest_length_and_that_one_works(babi, make, real_tokenizer):
    story = load_babi(babi, "qa1", "test")[2]
    with pytest.raises(SampleError, match=r"^this story of qa1 needs \d+ tokens at least, not 60$") as info:
        make(story, 60)
    smallest = int(re.search(r"\d+ tokens", str(info.value))[0].split()[0])
    with pytest.raises(SampleError, match=f"needs {smallest} tokens"):
        make(story, smallest - 1)
    (question,) = make(story, smallest).questions
    assert question.at + len(question.prompt) + question.max_new_tokens == smallest
    filler = RepeatedHaystack(real_tokenizer)
    context = babilong_context(story, filler, real_tokenizer, smallest, Random(0), "qa1")
    assert real_tokenizer.decode(context.ids).endswith("Text:\n " + " ".join(story.facts))
    with pytest.raises(SampleError, match="qa1, qa2"):
        make(story, task="qa11")


def test_no_example_can_be_taken_for_a_fact():
    known = {label for task in ("qa1", "qa5") for label in babilong.TASKS[task].labels}
    known |= {"John", "Sandra", "Daniel", "Julie", "park", "school", "cinema"}
    assert len(babilong.TASKS) == 10
    for task, spec in babilong.TASKS.items():
        text = instruction(task)
        assert not [name for name in known if re.search(rf"\b{name}\b", text)]
        assert text.count("\nAnswer: ") == len(spec.examples) == 2
        assert "  " not in text
        assert text.endswith("\n\nText:\n")


@pytest.mark.parametrize(
    ("answer", "targets", "others", "right"),
    [
        (" Kitchen", ("kitchen",), ("garden", "office"), True),
        ("The kitchen. Not the garden.", ("kitchen",), ("garden", "office"), True),
        ("the kitchen or the garden", ("kitchen",), ("garden", "office"), False),
        ("It is. The kitchen", ("kitchen",), ("garden", "office"), False),
        ("office", ("kitchen",), ("garden", "office"), False),
        ("", ("kitchen",), ("garden",), False),
        ("kitchen <example> garden", ("kitchen",), ("garden",), True),
        ("fred gave it", ("Fred",), ("Bill", "milk"), True),
        ("apple, milk", ("milk", "apple"), ("football", "nothing"), True),
        ("milk", ("milk", "apple"), ("football", "nothing"), False),
        ("milk, apple, football", ("milk", "apple"), ("football", "nothing"), False),
        ("none", ("none",), ("two", "three"), True),
        ("none", ("one",), ("none", "two", "three"), False),
        ("one", ("one",), ("none", "two", "three"), True),
        ("kitchens", ("kitchen",), ("garden",), True),
    ],
)
def test_right_label_and_no_other_one(answer, targets, others, right):
    assert babilong_correct(answer, targets, others) is right


def test_answers_score_as_questions_do(babi, make):
    for task in ("qa1", "qa2", "qa8"):
        for story in load_babi(babi, task, "test"):
            (question,) = make(story, task=task).questions
            assert score(story.answer, question) == 1
            assert babilong_correct(story.answer, question.answers, question.others)
            for other in question.others:
                assert score(f"{story.answer} or {other}", question) == 0
                assert not babilong_correct(f"{story.answer} or {other}", question.answers, question.others)
