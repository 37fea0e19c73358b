"""Collections of texts: what is taken, how it is split, and that the two sides never meet."""

import hashlib
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from senri.data.corpus import Document, check_disjoint, load_documents, split_documents
from senri.data.text import TextError


def write(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(*objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


def refusal(call, *arguments):
    """The message of the TextError, which is one line."""
    with pytest.raises(TextError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.strip() == message
    assert "\n" not in message
    return message


# loading ---------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_and_a_json_line_too(tmp_path):
    book = write(tmp_path, "book.txt", "One.\n\nTwo — 千里.\r\n")
    many = write(tmp_path, "many.jsonl", lines({"text": "first", "id": 1}) + "\n  \n" + lines({"text": "second\nline"}))
    found = load_documents([book, str(many)])
    assert [d.text for d in found] == ["One.\n\nTwo — 千里.\r\n", "first", "second\nline"]
    assert [d.name for d in found] == ["book.txt", "many.jsonl:1", "many.jsonl:4"]


def test_folders_are_searched_all_the_way_down_in_order_of_names(tmp_path):
    for name, text in {
        "b.txt": "B",
        "a/z/deep.txt": "deep",
        "a/c.jsonl": lines({"text": "line"}),
        "a/note.md": "no text to take",
        "a/data.json": "{}",
        "c.txt/inner.txt": "inner",  # a folder with a file's name
    }.items():
        write(tmp_path, name, text)
    assert [d.text for d in load_documents([tmp_path])] == ["line", "deep", "B", "inner"]


def test_a_text_that_comes_twice_is_taken_once(tmp_path):
    first = write(tmp_path, "x/first.txt", "the same")
    write(tmp_path, "x/second.txt", "the same")
    write(tmp_path, "x/third.jsonl", lines({"text": "the same"}, {"text": "another"}, {"text": "another"}))
    found = load_documents([tmp_path / "x", first])
    assert [(d.name, d.text) for d in found] == [("first.txt", "the same"), ("third.jsonl:2", "another")]
    assert found[0].digest == hashlib.sha256(b"the same").hexdigest()


def test_a_place_that_holds_only_known_texts_is_no_mistake(tmp_path):
    first, second = write(tmp_path, "1/a.txt", "same"), write(tmp_path, "2/a.txt", "same")
    assert len(load_documents([first.parent, second.parent])) == 1


def test_empty_files_of_a_folder_are_passed_over(tmp_path):
    write(tmp_path, "empty.txt", "")
    write(tmp_path, "empty.jsonl", "")
    write(tmp_path, "blank.txt", " \n\t\n")
    write(tmp_path, "blank.jsonl", lines({"text": "  "}))
    write(tmp_path, "full.txt", "text")
    assert [d.text for d in load_documents([tmp_path])] == ["text"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("blank.txt", " \n", "holds no text"),
        ("blank.jsonl", "\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", r"is not UTF-8 text (byte 3)"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "is not UTF-8 text (byte 27)"),
        ("half.jsonl", '{"text": "a"}\n{"text": "b"', 'line 2 is no JSON object with a field "text"'),
        ("other.jsonl", '{"text": "a"}\n\n{"content": "b"}', 'line 3 is no JSON object with a field "text"'),
        ("number.jsonl", '{"text": 5}', 'line 1 is no JSON object with a field "text"'),
        ("null.jsonl", '{"text": null}', 'line 1 is no JSON object with a field "text"'),
        ("list.jsonl", '["text"]', 'line 1 is no JSON object with a field "text"'),
        ("string.jsonl", '"text"', 'line 1 is no JSON object with a field "text"'),
        ("plain.jsonl", "just prose", 'line 1 is no JSON object with a field "text"'),
    ],
)
def test_what_cannot_be_taken_is_named_in_one_line(tmp_path, name, data, message):
    path = write(tmp_path, f"sub/{name}", data)
    good = write(tmp_path, "good.txt", "text")
    said = refusal(load_documents, [good, path])
    assert said.startswith(str(path))
    assert message in said
    if message not in ("is empty", "holds no text"):  # in a folder too
        assert refusal(load_documents, [tmp_path]) == said


def test_places_without_texts_are_named(tmp_path):
    missing, hollow = tmp_path / "nowhere", tmp_path / "hollow"
    hollow.mkdir()
    write(hollow, "empty.txt", "")
    write(hollow, "readme.md", "text")
    good = write(tmp_path, "good.txt", "text")
    assert refusal(load_documents, [good, missing]) == f"{missing}: no such file"
    assert refusal(load_documents, [good, hollow]).startswith(f"{hollow} holds no text")
    assert refusal(load_documents, [tmp_path / "none.jsonl"]).endswith("no such file")


def test_without_paths_the_shipped_text(real_text):
    (bible,) = load_documents([])
    assert bible.name == "King James Bible"
    assert bible.text.split() == real_text.split()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_json_lines_end_at_newlines_only(tmp_path, separator):
    text = f"one{separator}two"
    path = write(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert [d.text for d in load_documents([path])] == [text]


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d"])
def test_half_a_surrogate_pair_is_named(tmp_path, half):
    path = write(tmp_path, "a.jsonl", '{"text": "whole: \\ud83d\\ude00"}\n{"text": "cut off: ' + half + '"}')
    assert refusal(load_documents, [path]) == f'{path}: line 2 is no JSON object with a field "text"'
    path = write(tmp_path, "b.jsonl", '{"text": "whole: \\ud83d\\ude00"}\n')
    assert [d.text for d in load_documents([path])] == ["whole: 😀"]


# splitting -------------------------------------------------------------------------------------------------------

TINY_TEXTS = st.text(alphabet="ab .\nÉ", min_size=1, max_size=40)
# long enough for two sides at any of the shares, and with a letter at both ends
TEXTS = st.text(alphabet="ab .\nÉ", min_size=26, max_size=66).map("a{}b".format)


def collections(texts):
    return st.lists(texts, min_size=1, max_size=25, unique=True).map(
        lambda texts: [Document(f"d{i}", text) for i, text in enumerate(texts)]
    )


COLLECTIONS = collections(TEXTS)
SHARES = st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.9])


def both(documents, share):
    return (split_documents(documents, "training", share), split_documents(documents, "evaluation", share))


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def one_sided(documents, share):
    """All documents are on one side, by the documented rule: so they are cut."""
    return len({int(sha256(d.text), 16) / 2**256 < share for d in documents}) == 1


def was_cut(documents, training):
    return training[0] not in documents


@settings(deadline=None)
@given(COLLECTIONS, SHARES)
def test_the_sides_never_meet_and_together_are_everything(documents, share):
    training, evaluation = both(documents, share)
    assert both(documents, share) == (training, evaluation)
    assert was_cut(documents, training) == one_sided(documents, share)
    if was_cut(documents, training):
        assert len(training) == len(evaluation) == len(documents)
        for document, first, last in zip(documents, training, evaluation, strict=True):
            assert first.text + last.text == document.text  # so no character is on both sides
            assert first.text.strip()
            assert last.text.strip()
            assert first.digest == last.digest == document.digest == sha256(document.text), "the whole text's"
            assert first.name != last.name
            assert document.name in first.name
            assert document.name in last.name
            # nearly the share asked for: the cut moves forwards by half of it at most, to a place to end at
            most = len(document.text) - round(len(document.text) * (1 - share))
            assert (most + 1) // 2 - 1 <= len(last.text) <= most
    else:
        assert {d.digest for d in training}.isdisjoint(d.digest for d in evaluation)
        assert all(d.digest == sha256(d.text) for d in training + evaluation)
        assert sorted(d.name for d in training + evaluation) == sorted(d.name for d in documents)
        assert training
        assert evaluation
        for side in (training, evaluation):  # as they are, in their order
            assert side == [d for d in documents if d in side]


TOO_LITTLE = "there is too little text to keep a part of it for evaluation: give more, or longer, texts"


@settings(deadline=None)
@given(collections(TINY_TEXTS), SHARES, st.sampled_from(["training", "evaluation"]))
def test_parts_without_text_are_left_out_and_no_part_at_all_is_said(documents, share, part):
    """Of tiny texts; the cut moves forwards by half of the evaluation's share at most."""
    first = {d.name: round(len(d.text) * (1 - share)) for d in documents}
    later = {d.name: first[d.name] + (len(d.text) - first[d.name]) // 2 + 1 for d in documents}
    surely = {  # text that this part has wherever the cut is, and text that it may have
        d.name: (d.text[: first[d.name]] if part == "training" else d.text[later[d.name] :]).strip() for d in documents
    }
    perhaps = {
        d.name: (d.text[: later[d.name]] if part == "training" else d.text[first[d.name] :]).strip() for d in documents
    }
    try:
        side = split_documents(documents, part, share)
    except TextError as e:
        assert str(e) == TOO_LITTLE  # noqa: PT017 (refused or not, both are checked)
        assert one_sided(documents, share)
        assert not any(surely.values())
        return
    assert side
    if not one_sided(documents, share):
        assert side == [d for d in documents if d in side]
        return
    assert all(d.text.strip() for d in side)
    wholes = {sha256(d.text): d for d in documents}
    names = [wholes[d.digest].name for d in side]
    assert names == [d.name for d in documents if d.name in names], "each once, in their order"
    assert {name for name, text in surely.items() if text} <= set(names)
    assert set(names) <= {name for name, text in perhaps.items() if text}
    for d in side:
        whole = wholes[d.digest].text
        assert whole.startswith(d.text) if part == "training" else whole.endswith(d.text)


@settings(deadline=None)
@given(COLLECTIONS, TEXTS, SHARES, st.integers(0, 24))
def test_adding_a_document_moves_none_of_the_old_ones(documents, text, share, place):
    assume(text not in [d.text for d in documents])
    training, evaluation = both(documents, share)
    more = [*documents[:place], Document("new", text), *documents[place:]]
    more_training, more_evaluation = both(more, share)
    if was_cut(documents, training):
        return
    assert [d for d in more_training if d.name != "new"] == training
    assert [d for d in more_evaluation if d.name != "new"] == evaluation


@settings(deadline=None)
@given(COLLECTIONS, SHARES)
def test_the_side_is_the_digests_not_the_names_or_the_neighbours(documents, share):
    training, _ = both(documents, share)
    renamed = [Document(f"other {i}", d.text) for i, d in enumerate(reversed(documents))]
    again, _ = both(renamed, share)
    assert sorted(d.text for d in again) == sorted(d.text for d in training)


def test_the_share_is_kept_and_the_rule_is_the_documented_one():
    documents = [Document(str(i), f"text number {i}") for i in range(4000)]
    training, evaluation = both(documents, 0.1)
    assert 0.08 < len(evaluation) / 4000 < 0.12
    assert len(training) + len(evaluation) == 4000
    for document in documents[:200]:
        fraction = int(hashlib.sha256(document.text.encode()).hexdigest(), 16) / 2**256
        assert (document in evaluation) == (fraction < 0.1)
    assert both(documents, 0.1) == both(documents, share=0.1)
    assert split_documents(documents, "evaluation") == evaluation  # the default
    wider = split_documents(documents, "evaluation", 0.2)
    assert [d for d in evaluation if d not in wider] == []


def test_one_text_is_cut_near_its_end_at_a_line_or_sentence():
    text = "".join(f"Line {i} of the book. It goes on.\n" for i in range(300))
    training, evaluation = both([Document("book", text)], 0.1)
    assert training[0].text + evaluation[0].text == text
    assert training[0].text.endswith("\n")
    assert 0.09 < len(evaluation[0].text) / len(text) < 0.1
    sentences = text.replace("\n", " ")
    training, evaluation = both([Document("book", sentences)], 0.1)
    assert training[0].text.endswith(". ")
    assert evaluation[0].text.startswith(("Line", "It"))
    words = text.replace("\n", " ").replace(".", "")
    training, evaluation = both([Document("book", words)], 0.25)
    assert training[0].text.endswith(" ")
    assert both([Document("book", "x" * 100)], 0.1)[1][0].text == "x" * 10
    late = "x" * 96 + "\n" + "y" * 3  # the line's end would leave less than half of the evaluation
    assert len(both([Document("book", late)], 0.1)[1][0].text) == 10


def test_no_documents_no_sides():
    for part in ("training", "evaluation"):
        assert refusal(split_documents, [], part) == TOO_LITTLE


def of_side(side, texts):
    """The first of the texts that belongs to a side."""
    for i, text in enumerate(texts):
        if (int(sha256(text), 16) / 2**256 < 0.1) == (side == "evaluation"):
            return Document(f"{side} {i}", text)
    raise AssertionError


def test_a_cut_leaves_text_on_both_sides_or_is_refused():
    tiny = of_side("training", [3 * letter for letter in "abcdef"])
    assert [d.text for d in split_documents([tiny], "training")] == [tiny.text]
    assert refusal(split_documents, [tiny], "evaluation") == TOO_LITTLE
    blank_end = of_side("training", [f"{i} words. " + "\n \t" * 20 for i in range(20)])
    assert refusal(split_documents, [blank_end, tiny], "evaluation") == TOO_LITTLE
    blank_start = of_side("training", ["\n \t" * 200 + f"{i} words." for i in range(20)])
    assert refusal(split_documents, [blank_start], "training") == TOO_LITTLE
    story = of_side("training", [f"A story of {i} words. " * 40 for i in range(20)])
    documents = [tiny, story, blank_end, blank_start]  # what has no text for a side is left out of it
    training, evaluation = both(documents, 0.1)
    assert [d.digest for d in training] == [tiny.digest, story.digest, blank_end.digest]
    assert [d.digest for d in evaluation] == [story.digest, blank_start.digest]
    assert all(d.text.strip() for d in training + evaluation)


# refusing --------------------------------------------------------------------------------------------------------


def test_texts_that_were_trained_on_are_refused_by_name():
    documents = [Document("one", "1"), Document("two", "2"), Document("three", "3")]
    check_disjoint(documents, [], "run 7")
    check_disjoint([], [d.digest for d in documents], "run 7")
    check_disjoint(documents[:1], (d.digest for d in documents[1:]), "run 7")
    digests = iter([Document("elsewhere", "3").digest, documents[1].digest])  # once through only
    message = refusal(check_disjoint, documents, digests, "run 7")
    assert message == "two was trained on (run 7): evaluate on other texts"


@settings(deadline=None)
@given(COLLECTIONS, SHARES)
def test_the_two_sides_pass_and_one_side_does_not(documents, share):
    training, evaluation = both(documents, share)
    digests = [d.digest for d in training]
    if was_cut(documents, training):  # parts of the very texts that were trained on
        for document in (*evaluation, *documents):
            said = refusal(check_disjoint, [document], digests, "it")
            assert said == f"{document.name} was trained on (it): evaluate on other texts"
    else:
        check_disjoint(evaluation, digests, "it")
        said = refusal(check_disjoint, evaluation + training, digests, "it")
        assert said.startswith(f"{training[0].name} was")


def test_a_text_that_was_cut_for_training_is_not_evaluated_whole_later():
    stories = [f"A story of {i} words. " * 40 for i in range(1000)]
    book, other = of_side("evaluation", stories), of_side("training", stories)
    trained = split_documents([book], "training")  # alone: cut, its first 90 % are trained on
    assert trained[0].text != book.text
    assert trained[0].digest == book.digest
    later = split_documents([book, other], "evaluation")
    assert later == [book]
    said = refusal(check_disjoint, later, [d.digest for d in trained], "an adapter")
    assert said == f"{book.name} was trained on (an adapter): evaluate on other texts"
    check_disjoint([other], [d.digest for d in trained], "an adapter")
    parts = split_documents(trained, "evaluation")  # a part of a part is of the same text
    assert [d.digest for d in parts] == [book.digest]
