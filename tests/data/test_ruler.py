"""RULER's tasks: every answer is worked out again from the text that the model reads."""

import json
import re
import sys
from collections import Counter
from random import Random

import pytest

from senri.data import ruler
from senri.data.samples import SampleError
from senri.data.text import TextError

LENGTHS = [1024, 1500, 2048, 4096, 8192, 32768]
ARTICLES = ("Bridges", "Rivers", "Owls")


def paragraphs(count=400, articles=ARTICLES):
    """Made-up paragraphs of different lengths; every third one has a question, and its last one has no answer."""
    made = []
    for index in range(count):
        facts = " ".join(f"Part {index}.{n} was finished in {1000 + 7 * index + n}." for n in range(3 + index % 5))
        asked = ((f"When was part {index}.1 finished?", (str(1001 + 7 * index), f"in {1001 + 7 * index}")),)
        made.append(ruler.Paragraph(articles[index % len(articles)], facts, asked if index % 3 == 0 else ()))
    return made


def enough(length):
    return paragraphs(400 if length < 20_000 else 900)


def answer_questions(tokenizer, length, rng):
    return ruler.question_answering(tokenizer, length, rng, enough(length))


TASKS = {
    "vt": ruler.variable_tracking,
    "cwe": ruler.common_words,
    "fwe": ruler.frequent_words,
    "qa": answer_questions,
}


def texts(tokenizer, context):
    """The text read, the question's text, and the question."""
    (question,) = context.questions
    assert question.at == len(context.ids), "the question comes at the end"
    assert str(context.ids.dtype) == "int32"
    return tokenizer.decode(context.ids), tokenizer.decode(question.prompt), question


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_count_the_room_for_the_answer(real_tokenizer, task, length):
    # At most what one more unit takes: a word in the list, the counts that rise together, a paragraph.
    slack = {"vt": 0, "cwe": 10 if length < 4096 else 40, "fwe": 40, "qa": 170}[task]
    for seed in range(3):
        (question,) = TASKS[task](real_tokenizer, length, Random(seed)).questions
        used = question.at + len(question.prompt) + question.max_new_tokens
        assert length - slack <= used <= length
        assert question.cell == {"task": task, "length": length, "depth": None}
        assert question.max_new_tokens == {"vt": 30, "cwe": 120, "fwe": 50, "qa": 32}[task]
        assert question.metric == ("part" if task == "qa" else "all")
        assert question.stop is None


@pytest.mark.parametrize("task", TASKS)
def test_the_same_state_gives_the_same_sample_and_another_one_another(real_tokenizer, task):
    first, again, other = (TASKS[task](real_tokenizer, 2048, Random(seed)) for seed in (5, 5, 6))
    assert first.ids.tolist() == again.ids.tolist()
    assert first.questions == again.questions
    assert first.questions[0].answers != other.questions[0].answers
    assert first.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize("task", TASKS)
def test_too_short_says_the_smallest_length_and_that_one_works(real_tokenizer, task):
    with pytest.raises(SampleError) as info:
        TASKS[task](real_tokenizer, 60, Random(2))
    assert "\n" not in str(info.value)
    smallest = int(re.search(r"needs ([\d,]+) tokens at least, not 60", str(info.value))[1].replace(",", ""))
    (question,) = TASKS[task](real_tokenizer, smallest, Random(2)).questions
    assert question.at + len(question.prompt) + question.max_new_tokens == smallest
    with pytest.raises(SampleError, match=f"needs {smallest:,} tokens"):
        TASKS[task](real_tokenizer, smallest - 1, Random(2))


@pytest.mark.parametrize("length", [700, *LENGTHS])
def test_the_chain_leads_from_the_number_to_every_name(real_tokenizer, length):
    for seed in range(4):
        text, asked, question = texts(real_tokenizer, ruler.variable_tracking(real_tokenizer, length, Random(seed)))
        example, own = text.split(ruler.VT_HEAD.strip())[1:]
        for part, letters in ((example, 3), (own, 5)):
            lines = re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", part)
            assert len(lines) == 5
            values = {}
            for name, source, number in lines:  # in order: what a name is set to is known by then
                values[name] = number or values[source]
            assert {len(name) for name in values} == {letters}
            assert len(values) == 5, "names differ"
            assert [source for _, source, _ in lines[1:]] == [name for name, _, _ in lines[:-1]], "one chain, four hops"
            (value,) = set(values.values())
            assert 10000 <= int(value) <= 99999
            if part is own:
                assert question.answers == tuple(values)
                assert asked.count(value) == 2, "in the question and in front of the answer"
            else:
                assert f"{value}. They are: {' '.join(values)}\n" in part, "the example is solved"
        assert len(real_tokenizer(text[: text.rindex(ruler.VT_HEAD.strip())])["input_ids"]) <= 500


def test_the_shortest_chain_has_an_assignment_in_every_line(real_tokenizer):
    with pytest.raises(SampleError) as info:
        ruler.variable_tracking(real_tokenizer, 100, Random(0))
    smallest = int(re.search(r"needs (\d+)", str(info.value))[1])
    text, _, _ = texts(real_tokenizer, ruler.variable_tracking(real_tokenizer, smallest, Random(0)))
    lines = text[text.rindex(ruler.VT_HEAD.strip()) :].split("\n")[2:]
    assert [line[:5] for line in lines] == [" VAR "] * 5
    assert lines[-1].endswith(" The"), "one token of filler"


def test_assignments_are_the_evidence_and_stand_in_order_before_filler_sentences(real_tokenizer):
    places = []
    for seed in range(40):
        context = ruler.variable_tracking(real_tokenizer, 2048, Random(seed))
        text, asked, question = texts(real_tokenizer, context)
        told = [real_tokenizer.decode(context.ids[start:stop]) for start, stop in question.evidence]
        names = question.answers
        number = re.search(r"value (\d+)", asked)[1]
        assert told == [f" VAR {a} = {b}" for a, b in zip(names, [number, *(f"VAR {n}" for n in names)], strict=False)]
        assert sorted(question.evidence) == list(question.evidence)
        for fact in told:
            assert re.search(rf"(again\.\n|\n\n){re.escape(fact)} The (grass|$)", text), "at the start of a line"
        places += [start / question.at for start, _ in question.evidence]
    example = text[: text.rindex(ruler.VT_HEAD.strip())] + ruler.VT_HEAD
    first = len(real_tokenizer(example)["input_ids"]) / question.at
    assert first - 0.02 < min(places) < first + 0.05, "none in the example"
    assert max(places) > 0.97
    assert 70 < sum(place < (1 + first) / 2 for place in places) < 130, "spread over the whole text"


@pytest.mark.parametrize("length", LENGTHS)
def test_the_common_words_are_the_ones_counted_most_often(real_tokenizer, length):
    context = ruler.common_words(real_tokenizer, length, Random(length))
    text, asked, question = texts(real_tokenizer, context)
    example, own = text.split(ruler.CWE_HEAD)[1:]
    example, solution = example.split("\nQuestion:")
    often, seldom, shown = (6, 1, {3: 10, 1: 10}) if length < 4096 else (30, 3, {10: 10, 3: 30})
    for part in (example, own):
        labels, words = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", part), strict=True)
        assert list(map(int, labels)) == list(range(1, len(labels) + 1))
        counts = Counter(words)
        if part is own:
            assert {word for word, count in counts.items() if count == often} == set(question.answers)
            assert len(question.answers) == 10
            assert set(counts.values()) == {often, seldom}
            assert not set(words[: 10 * often]) <= set(question.answers), "not all of them in front"
        else:
            assert Counter(counts.values()) == shown
            top = re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", solution.split("are:")[1])
            assert set(top) == {word for word, _ in counts.most_common(10)}
    assert asked == ruler.CWE_TAIL
    assert real_tokenizer(text, verbose=False)["input_ids"] == context.ids.tolist(), "no odd tokens"


@pytest.mark.parametrize("length", LENGTHS)
def test_the_frequent_words_follow_the_zeta_law(real_tokenizer, length):
    context = ruler.frequent_words(real_tokenizer, length, Random(length))
    text, _, question = texts(real_tokenizer, context)
    words = text.removeprefix(ruler.FWE_HEAD).split()
    counts = Counter(words).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == question.answers
    assert counts[3][1] > counts[4][1], "the three are not to be argued about"
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    assert len(counts) <= length // 50
    draws = counts[0][1] / 0.6079271  # 1 / zeta(2)
    for rank, (_, count) in enumerate(counts[:8], start=1):
        assert count == pytest.approx(draws * 0.6079271 / rank**2, abs=2)
    assert "... ... ... ... ... ..." in text or length < 2048
    assert words != sorted(words, key=words.index), "not in blocks"
    assert real_tokenizer(text, verbose=False)["input_ids"] == context.ids.tolist(), "no odd tokens"


def test_the_three_most_frequent_are_clear_however_short_the_text(real_tokenizer):
    made = 0
    for length in range(150, 420):
        try:
            text, _, question = texts(real_tokenizer, ruler.frequent_words(real_tokenizer, length, Random(3)))
        except SampleError:
            continue
        counts = Counter(text.removeprefix(ruler.FWE_HEAD).split()).most_common()
        assert tuple(word for word, _ in counts[1:4]) == question.answers
        assert len({count for _, count in counts[:5]}) == len(counts[:5]) >= 4
        made += 1
    assert made > 150


@pytest.mark.parametrize("length", LENGTHS)
def test_the_questions_paragraph_is_among_numbered_ones(real_tokenizer, length):
    known = {p.text: p for p in enough(length)}
    places = []
    for seed in range(6):
        context = answer_questions(real_tokenizer, length, Random(seed))
        text, asked, question = texts(real_tokenizer, context)
        documents = re.findall(r"Document (\d+):\n(.+)\n\n", text)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        shown = [document for _, document in documents]
        assert len(set(shown)) == len(shown)
        assert set(shown) <= set(known), "whole paragraphs"
        ((start, stop),) = question.evidence
        gold = real_tokenizer.decode(context.ids[start:stop])
        assert gold in shown
        index = int(re.search(r"When was part (\d+)\.1 finished", asked)[1])
        assert f"Part {index}.1 was finished in {question.answers[0]}." in gold
        assert question.answers == (str(1001 + 7 * index), f"in {1001 + 7 * index}")
        places.append(shown.index(gold) / len(shown))
        same = sum(known[document].article == known[gold].article for document in shown)
        assert same == min(len(shown), sum(p.article == known[gold].article for p in enough(length)))
    assert max(places) - min(places) > 0.2, "anywhere"


def test_too_few_texts_are_told_and_not_hidden(real_tokenizer, monkeypatch):
    with pytest.raises(SampleError, match=r"qa has paragraphs for [\d,]+ tokens, not 8,192"):
        ruler.question_answering(real_tokenizer, 8192, Random(0), paragraphs(20))
    with pytest.raises(SampleError, match="no paragraph comes with a question"):
        ruler.question_answering(real_tokenizer, 8192, Random(0), paragraphs(20)[1:3])
    with pytest.raises(SampleError, match=r"cwe has words for 1\d\d,\d\d\d tokens, not 400,000"):
        ruler.common_words(real_tokenizer, 400_000, Random(0))
    ruler._listed.cache_clear()
    ruler.words_of.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ValueError, match=r"wonderwords: pip install 'senri\[eval\]'"):
        ruler.common_words(real_tokenizer, 4096, Random(0))


def squad(version):
    answer = {"text": "Denver", "answer_start": 0}
    asked = [{"question": "Where?", "answers": [answer, answer, {"text": "in Denver", "answer_start": 3}]}]
    if version == "v2.0":
        asked[0]["is_impossible"] = False
        asked.append({"question": "Who?", "answers": [], "is_impossible": True})
    other = {"context": "It rains.", "qas": []}
    paragraph = {"context": "Denver won.", "qas": asked}
    return {"version": version, "data": [{"title": "Bowl", "paragraphs": [paragraph, other]}]}


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_squad_files_without_what_has_no_answer(tmp_path, version):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad(version)))
    assert ruler.load_squad(path) == [
        ruler.Paragraph("Bowl", "Denver won.", (("Where?", ("Denver", "in Denver")),)),
        ruler.Paragraph("Bowl", "It rains.", ()),
    ]


@pytest.mark.parametrize("content", ["no json", "[1]", '{"data": 1}', '{"data": [{"title": "x"}]}'])
def test_files_that_are_no_squad_are_refused(tmp_path, content):
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(TextError, match=r"squad\.json is no SQuAD file"):
        ruler.load_squad(path)
    with pytest.raises(TextError, match=r"none\.json"):
        ruler.load_squad(tmp_path / "none.json")
