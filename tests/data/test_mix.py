"""The training mix: every label, weight and distance is read off the finished tokens of real text."""

import re
from collections import Counter
from copy import deepcopy
from dataclasses import fields
from itertools import pairwise, product
from random import Random

import numpy as np
import pytest

from senri.data import ruler, training_facts, words
from senri.data.babilong import TAIL, Story, instruction
from senri.data.corpus import Document, split_documents
from senri.data.haystack import BookHaystack, Stretch, encode
from senri.data.mix import PARTS, TrainingMix
from senri.data.names import find_cloze
from senri.data.needle_tasks import HELD_OUT, NIAH, RULER_NIAH
from senri.data.needle_tasks import KINDS as HELD_OUT_KINDS
from senri.data.samples import SampleError
from senri.data.training_facts import KINDS, TELLINGS
from senri.data.training_forms import OPENINGS, Forms
from senri.data.training_questions import NAMED, OTHERS, other_questions
from senri.data.training_recall import (
    ABOVE,
    LINKS,
    OTHERWISE,
    Asked,
    chain,
    labelled,
    needle,
    overwritten,
    tell,
    whereabouts,
)

LENGTH, WINDOW = 1024, 256
STORY = Story(
    ("Mary moved to the bathroom.", "John went to the hallway.", "Daniel went to the bathroom."),
    "Where is Mary?",
    "bathroom",
    (0,),
)


@pytest.fixture(scope="module")
def documents(real_text):
    starts = (0, 1_000_000, 2_000_000)
    return [Document(f"book {i}", real_text[start : start + 250_000]) for i, start in enumerate(starts)]


@pytest.fixture(scope="module")
def make(documents, real_tokenizer):
    """``(part or ratios, ...)`` -> a mix in book text; the books' tokens are shared."""
    shared = {}

    def mix(ratios, length=LENGTH, window=WINDOW, seed=0, tokenizer=real_tokenizer, **more):
        ratios = {ratios: 1.0} if isinstance(ratios, str) else ratios
        made = TrainingMix(
            more.pop("documents", documents), tokenizer, length=length, window=window, ratios=ratios, seed=seed,
            **{"babi": {"qa1": [STORY]}, **more},
        )  # fmt: skip
        if made.books.documents == documents:
            made.books = shared.setdefault("books", made.books)
        return made

    return mix


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def runs(mask):
    """[start, end) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def texts(sample, mask, tokenizer):
    return [tokenizer.decode(sample.ids[a:b]) for a, b in runs(mask)]


def question_at(sample):
    """Where the questions begin: behind the last token of the text."""
    start, stop = runs(sample.write == -1)[-1]
    assert stop == len(sample.ids)
    return start


def without(sample, spans):
    kept = np.ones(len(sample.ids), dtype=bool)
    for start, stop in spans:
        kept[start:stop] = False
    return sample.ids[kept]


def in_books(ids, mix):
    """Whether the ids stand in the books as they are, one book behind the other."""
    order = [*range(len(mix.books.documents)), 0]
    whole = np.concatenate([part for i in order for part in (mix.books.ids(i), mix.books.separator)])
    return ids.astype(np.int32).tobytes() in whole.tobytes()


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# all parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("length", [777, 1024, 2048])
def test_exact_length_types_and_determinism(make, part, length):
    mix, again, other = make(part, length), make(part, length), make(part, length, seed=1)
    order = [7, 0, 3, 11, 5]
    samples = {i: mix[i] for i in sorted(order)}
    for i in order:  # in another order, from another object
        sample = samples[i]
        assert same(sample, again[i])
        assert not same(sample, other[i])
        assert (sample.ids.dtype, sample.weight.dtype, sample.write.dtype) == (np.int32, np.float32, np.int8)
        assert sample.ids.shape == sample.weight.shape == sample.write.shape == (length,)
        assert sample.task == part
        assert sample.source.startswith("book ")
        assert set(np.unique(sample.write)) <= {-1, 0, 1}
        assert set(np.unique(sample.weight)) == {0.0, 1.0}
        assert sample.weight[0] == 0, "nothing predicts the first token"
    assert len({s.ids.tobytes() for s in samples.values()}) == len(order)


def test_at_length_is_the_mix_of_that_length(make):
    ratios = dict.fromkeys(PARTS, 1.0)
    mix, long = make(ratios), make(ratios, 1536)
    other = mix.at_length(1536)
    assert all(same(other[i], long[i]) for i in range(12))
    assert [mix[i].task for i in range(60)] == [other[i].task for i in range(60)]
    assert (mix.length, other.length, len(mix[0].ids)) == (LENGTH, 1536, LENGTH)
    assert other.digests == mix.digests
    assert other.books is mix.books, "tokenized once"


def test_the_ratios_are_those_of_the_samples(make):
    ratios = {"book": 5, "needle": 3, "repeat": 2, "names": 0}
    mix = make(ratios)
    counted = Counter(mix[i].task for i in range(600))
    assert set(counted) == {"book", "needle", "repeat"}
    for part, share in (("book", 0.5), ("needle", 0.3), ("repeat", 0.2)):
        assert abs(counted[part] / 600 - share) < 0.07


def test_digests_are_those_of_the_whole_texts(documents, make):
    one = Document("one", documents[0].text)
    (part,) = split_documents([one], "training")
    assert part.text != one.text
    assert make("book", documents=[part]).digests == (one.digest,)
    assert make("book").digests == tuple(sorted(d.digest for d in documents))


@pytest.mark.parametrize("length", [WINDOW, 100])
def test_a_length_within_the_window_is_refused(make, length):
    with pytest.raises(
        ValueError, match=rf"{length} tokens never need the memory behind a window of {WINDOW}"
    ) as error:
        make({"book": 1, "needle": 1}, length)
    assert one_line(error)
    with pytest.raises(ValueError, match="never need the memory"):
        make("needle").at_length(length)
    assert len(make("book", length)[0].ids) == length


@pytest.mark.parametrize(
    ("ratios", "more", "said"),
    [
        ({"needles": 1}, {}, r"no part needles; it has: book, needle"),
        ({"book": 0}, {}, "must be above 0"),
        ({}, {}, "must be above 0"),
        ({"book": 2, "chain": -1}, {}, "must not be negative"),
        ({"book": 1, "babi": 1}, {"babi": {"qa1": []}}, "babi needs stories"),
        ({"book": 1}, {"documents": []}, "no texts"),
    ],
)
def test_settings_that_make_no_mix(make, ratios, more, said):
    with pytest.raises(ValueError, match=said) as error:
        make(ratios, **more)
    assert one_line(error)


@pytest.mark.parametrize("part", [p for p in PARTS if p not in ("book", "babi")])
def test_a_length_just_above_the_window_says_what_is_missing(make, part):
    mix = make(part, WINDOW + 10, documents=[Document("x", "a calm sea and no name in it. " * 3000)])
    with pytest.raises(SampleError, match=r"\d+") as error:
        _ = mix[0]
    assert len(one_line(error)) < 250


@pytest.mark.parametrize("part", ["needle", "overwritten", "chain"])
def test_little_room_makes_smaller_samples_not_errors(make, part):
    mix = make(part, WINDOW + 150)
    for i in range(40):
        assert len(mix[i].ids) == WINDOW + 150


# books -----------------------------------------------------------------------------------------------------------


def test_books_are_packed_with_separators_and_all_of_it_is_scored(make, real_tokenizer):
    mix = make("book")
    for i in range(5):
        assert in_books(mix[i].ids, mix)
        assert mix[i].weight[1:].all()
        assert not mix[i].write.any()
    short = [Document(str(i), f"Ship {i} went to sea. " * (20 + i)) for i in range(9)]
    packed = make("book", 700, documents=short)
    separator = real_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for i in range(5):
        parts = real_tokenizer.decode(packed[i].ids).split("<|endoftext|>")
        assert np.count_nonzero(packed[i].ids == separator) == len(parts) - 1 >= 3
        assert packed[i].weight[1:].all(), "the separator is predicted too"
        for part in parts[1:-1]:
            assert part == short[int(part.split()[1])].text, "whole texts between"
        assert len(parts) == len({part.split()[1] for part in parts if part})


# facts -----------------------------------------------------------------------------------------------------------


FORMS = {
    "text": re.compile(r"\n\nQuestion: (.+[?.])\nAnswer:(?: (\S.*))?"),
    "chat": re.compile(r"(?:<\|im_start\|>system\n.*<\|im_end\|>)?\n<\|im_start\|>user\n(.+[?.])<\|im_end\|>\n"
                       r"<\|im_start\|>assistant\n(\S.*)?"),
}  # fmt: skip


def exchanges(sample, tokenizer):
    """(form, question, begun part, answer) of each question, by its tokens alone."""
    found, start = [], question_at(sample)
    for a, b in runs(sample.weight > 0):
        prompt, answer = tokenizer.decode(sample.ids[start:a]), tokenizer.decode(sample.ids[a:b])
        if found:
            prompt = ("\n" if prompt.startswith("\nQ") else "") + prompt
        form = next(name for name, pattern in FORMS.items() if pattern.fullmatch(prompt))
        groups = FORMS[form].fullmatch(prompt).groups()
        found.append((form, groups[0], groups[1] or "", answer))
        start = b
    assert start == len(sample.ids), "the sample ends with an answer"
    return found


def values(sample, tokenizer):
    """Every told value, what stands behind it, and its place with that, in order."""
    return [
        (tokenizer.decode(sample.ids[a : b - 1]).strip(), tokenizer.decode(sample.ids[b - 1 : b]), (a, b))
        for a, b in runs(sample.write == 1)
    ]


def answered(answer, value):
    """Whether the answer is the value, and ends as answers do."""
    return re.fullmatch(rf" {re.escape(value)}\.(\n|<\|im_end\|>)", answer)


@pytest.mark.parametrize("part", ["needle", "overwritten", "chain"])
def test_what_is_answered_was_told_beyond_the_window(make, real_tokenizer, part):
    mix = make(part)
    forms = Counter()
    for i in range(150):
        sample = mix[i]
        told, at = values(sample, real_tokenizer), question_at(sample)
        # nothing but facts is in the text: without them it is the book's
        facts = [span for span in runs(sample.write != 0) if span[0] < at]
        assert in_books(without(sample, [*facts, (at, LENGTH)]), mix)
        for _, behind, (start, stop) in told:
            assert stop <= at
            assert re.fullmatch(r"\.| \w+|'s", behind), "one token behind a value is labelled too"
            assert sample.write[start - 1] == -1, "what stands before it in the fact is not labelled"
        for form, _, begun, answer in exchanges(sample, real_tokenizer):
            places = [span for value, _, span in told if answered(answer, value)]
            start, stop = places[-1 if part == "overwritten" else 0]
            assert at - stop >= WINDOW
            assert stop - start < 40
            forms[form, begun != ""] += 1
            assert answer.endswith(".<|im_end|>" if form == "chat" else ".\n")
            assert not begun.endswith(" ")
    assert set(forms) == set(product(FORMS, (True, False)))


def test_needles_tell_one_two_or_four_facts_and_ask_for_some(make, real_tokenizer):
    mix = make("needle", chat=0.0)
    facts, questions, depths = Counter(), Counter(), []
    for i in range(200):
        sample = mix[i]
        told = {value for value, *_ in values(sample, real_tokenizer)}
        asked = exchanges(sample, real_tokenizer)
        facts[len(told)] += 1
        questions[len(asked)] += 1
        assert len({question for _, question, _, _ in asked}) == len(asked)
        depths += [a for v, _, (a, _) in values(sample, real_tokenizer) if answered(asked[0][3], v)]
    assert set(facts) == {1, 2, 4}
    assert set(questions) == {1, 2, 3}
    limit = LENGTH - WINDOW
    assert min(depths) < 0.1 * limit
    assert max(depths) > 0.75 * limit


def test_values_and_answers_are_the_tellings_own(make, real_tokenizer):
    """The secret key, told and asked in the words of the evaluation."""
    mix, above = make("needle"), "What is the secret key mentioned above?"
    key = re.compile(r"KEY-[A-Z]{3}\d{5}")
    spoken = "The secret key is", "The secret key mentioned above is"
    seen = Counter()
    wanted = {(above, begun, f" VALUE.{end}") for begun, end in product((True, False), ("\n", "<|im_end|>"))}
    for i in range(8000):
        if wanted <= seen.keys():
            break
        sample = mix[i]
        whole = real_tokenizer.decode(sample.ids)
        for value, _, (_, stop) in values(sample, real_tokenizer):
            before = real_tokenizer.decode(sample.ids[stop - 40 : stop])
            if before.endswith(f" The secret key is: {value}."):
                assert key.fullmatch(value)
                for _, question, begun, answer in exchanges(sample, real_tokenizer):
                    if answered(answer, value):
                        assert question in (above, "What is the secret key?", *OTHERS[above])
                        seen[question, begun != "", answer.replace(value, "VALUE")] += 1
                        assert begun.removesuffix(":") in ("", *OPENINGS, *spoken)
                        assert whole.count(value) == 2
    assert wanted <= seen.keys()


@pytest.mark.parametrize("value", ["5512", "a cook", "KEY-ABC12345", "copper-falcon"])
def test_what_is_labelled_is_what_the_answer_says(real_tokenizer, value):
    for fact in (" It belongs to {key}: {value}.", " It belongs to {key}, and is {value}."):
        ids, labels = labelled(real_tokenizer, tell(fact, "Bo", value))
        assert [i for i, label in zip(ids, labels, strict=True) if label == 1] == encode(real_tokenizer, f" {value}.")
        assert set(labels.tolist()) == {1, -1}


def test_the_passkeys_number_is_labelled_both_times(make, real_tokenizer):
    mix, seen = make("needle"), 0
    for i in range(300):
        spans = values(mix[i], real_tokenizer)
        for (one, dot, (_, stop)), (two, verb, (start, _)) in pairwise(spans):
            between = real_tokenizer.decode(mix[i].ids[stop:start])
            if between.strip() == "Remember it.":
                assert (one, dot, verb) == (two, ".", " is")
                seen += 1
    assert seen >= 3


def test_the_last_of_an_overwritten_fact_is_asked_for(make, real_tokenizer):
    mix = make("overwritten", chat=0.0)
    counts, last = Counter(), 0
    for i in range(150):
        sample = mix[i]
        distinct = list(dict.fromkeys(value for value, *_ in values(sample, real_tokenizer)))
        ((_, question, _, answer),) = exchanges(sample, real_tokenizer)
        assert answered(answer, distinct[-1])
        assert not any(answered(answer, v) for v in distinct[:-1])
        counts[len(distinct)] += 1
        last += "last" in question.replace("last winter", "")
    assert set(counts) == {2, 3}
    assert 50 < last < 100


def test_the_last_secret_key_is_asked_for_as_the_evaluation_does():
    wanted = NIAH["overwritten"].wordings[0].question
    found = set()
    for i in range(1000):
        (asked,) = overwritten(Random(i)).asked
        found.add(re.sub(r"of \w+ \w+", "of {key}", f"\n\nQuestion: {asked.question}\nAnswer: {asked.begun}"))
    assert wanted in found


def test_a_chain_can_be_followed_from_its_text_alone(make, real_tokenizer):
    mix = make("chain", chat=0.0)
    hops = Counter()
    for i in range(150):
        sample = mix[i]
        at, known = question_at(sample), {}
        ((_, question, _, answer),) = exchanges(sample, real_tokenizer)
        for start, stop in runs(sample.write != 0):
            for fact in re.findall(r"[^.]+\.", real_tokenizer.decode(sample.ids[start:stop]) if stop <= at else ""):
                name, value = re.findall(r"\b(?:[A-Z]{1,4}\d{0,2}|\d+)\b", fact)
                number, depth = known.get(value, (value, -1))
                assert number.isdigit(), "told before it is used"
                known[name] = number, depth + 1
        (name,) = (n for n in known if re.search(rf"\b{n}\b", question))
        assert answered(answer, known[name][0])
        hops[known[name][1]] += 1
    assert set(hops) == {1, 2, 3, 4}


@pytest.mark.parametrize("make_recall", [needle, overwritten, chain, whereabouts])
def test_facts_and_questions_fit_together(make_recall):
    for i in range(500):
        recall = make_recall(Random(i))
        assert all(told.text.startswith(" ") and "{" not in told.text for told in recall.told)
        told = [told.text[a:b] for told in recall.told for a, b in told.values]
        for asked in recall.asked:
            assert asked.value in told
            assert asked.question[-1] in "?."
            assert "{" not in asked.question + asked.begun
            assert asked.question.count("mentioned above") <= 1
        stems = [asked.question.removesuffix("?").removesuffix(" mentioned above") for asked in recall.asked]
        assert not any(a != b and a.startswith(b) for a, b in product(stems, stems)), "no question means two facts"
        small = make_recall(Random(i), small=True)
        assert (len(small.told), len(small.asked)) == (1 if make_recall is needle else 2, 1)


def test_a_person_is_where_the_last_move_went():
    persons, rooms = Counter(), set()
    for i in range(300):
        recall = whereabouts(Random(i))
        moves = [re.fullmatch(r" (\w+) .* the (\w+)\.", told.text).groups() for told in recall.told]
        persons[len(dict(moves))] += 1
        rooms |= {room for _, room in moves}
        assert recall.ordered
        assert all(
            told.text[slice(*span)] == room
            for told, (_, room) in zip(recall.told, moves, strict=True)
            for span in told.values
        )
        for name in dict(moves):
            assert all(a != b for a, b in pairwise(room for who, room in moves if who == name)), "each is a move"
        assert [told.about for told in recall.told] == [f" {name} is in" for name, _ in moves]
        asked = [re.fullmatch(r"Where is (\w+)\?", asked.question).group(1) for asked in recall.asked]
        assert len(set(asked)) == len(asked) <= 2
        for name, question in zip(asked, recall.asked, strict=True):
            assert question.value == dict(moves)[name]
            assert question.begun == f"{name} is in the"
            assert question.fact == max(n for n, (who, _) in enumerate(moves) if who == name)
        assert recall.needed == {question.fact for question in recall.asked}
    assert set(persons) == {1, 2, 3, 4}
    assert rooms == set(training_facts.ROOMS)


def test_the_same_is_told_again_with_another_value():
    """What facts are about decides which of them is no longer true."""
    for i in range(300):
        first, *others = overwritten(Random(i)).told
        assert others
        assert {told.about for told in others} == {first.about}
        assert all(told.text != first.text for told in others)
        assert first.text.startswith(first.about) or first.text[slice(*first.values[0])] not in first.about


# how answers begin -----------------------------------------------------------------------------------------------


def test_some_answers_begin_in_other_words(real_tokenizer):
    forms, asked = Forms(real_tokenizer, chat=0.0), Asked("Where is Ann?", "Ann is in the", "kitchen", 0)
    begun = Counter()
    for i in range(400):
        (exchange,) = forms.exchanges([asked], Random(i))
        whole = real_tokenizer.decode([*exchange.prompt, *exchange.answer])
        assert real_tokenizer.decode(exchange.answer) == " kitchen.\n"
        begun[whole.removeprefix("\n\nQuestion: Where is Ann?\nAnswer:").removesuffix(" kitchen.\n").strip()] += 1
    assert set(begun) == {"", asked.begun, *OPENINGS}
    opened = sum(begun[words] for words in OPENINGS)
    assert 0.15 < opened / (opened + begun[asked.begun]) < 0.35
    assert 0.4 < begun[""] / 400 < 0.6


def test_chat_answers_begin_in_other_words_too(real_tokenizer):
    forms, asked = Forms(real_tokenizer, chat=1.0), Asked("Where is Ann?", "Ann is in the", "kitchen", 0)
    begun, turn = Counter(), forms.prompts("Where is Ann?")[-1]
    for i in range(200):
        (exchange,) = forms.exchanges([asked], Random(i))
        assert real_tokenizer.decode(exchange.answer) == " kitchen.<|im_end|>"
        assert exchange.prompt[: len(turn)] == turn
        begun[real_tokenizer.decode(exchange.prompt[len(turn) :])] += 1
    assert set(begun) == {"", asked.begun, *OPENINGS}
    assert begun[asked.begun] > 50
    assert 0.4 < begun[""] / 200 < 0.6


@pytest.mark.parametrize("chat", [0.0, 0.3])
def test_a_prompt_that_leaves_the_answer_open(real_tokenizer, chat):
    found = [real_tokenizer.decode(ids) for ids in Forms(real_tokenizer, chat).prompts("Who are you?")]
    turns = [{"role": "user", "content": "Who are you?"}]
    turn = real_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert found == ["\n\nQuestion: Who are you?\nAnswer:", turn][: 2 if chat else 1]


# chat ------------------------------------------------------------------------------------------------------------


def test_chat_questions_are_what_the_session_asks(make, real_tokenizer):
    mix = make("needle", chat=1.0)
    several = 0
    for i in range(40):
        sample = mix[i]
        asked = exchanges(sample, real_tokenizer)
        tail = sample.ids[question_at(sample) :].tolist()
        question = asked[0][1]
        turns = [{"role": "user", "content": question}]
        prompt = real_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = encode(real_tokenizer, prompt)
        assert tail[: len(ids)] == ids
        assert sample.ids[-1] == real_tokenizer.eos_token_id
        assert sample.weight[-1] == 1
        for (_, _, *reply), (_, question, *after) in pairwise(asked):
            several += 1
            turns += [{"role": "assistant", "content": "".join(reply).removesuffix("<|im_end|>")}]
            turns += [{"role": "user", "content": question}]
            whole = real_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            whole += "".join(after)
            assert real_tokenizer.decode(tail).startswith(whole)
    assert several


def test_without_a_chat_template_none_is_used(make, real_tokenizer):
    plain = deepcopy(real_tokenizer)
    plain.chat_template = None
    mix = make("needle", chat=1.0, tokenizer=plain)
    for i in range(20):
        assert {form for form, *_ in exchanges(mix[i], plain)} == {"text"}


# the text itself -------------------------------------------------------------------------------------------------


def test_a_repeated_passage_comes_again_beyond_the_window(make):
    mix = make("repeat")
    sizes = set()
    for i in range(60):
        sample = mix[i]
        ((first, stop),) = runs(sample.write == -1)
        ((scored, end),) = runs(sample.weight > 0)
        again = end - (stop - first)
        assert scored == again + 8
        assert again - stop >= WINDOW
        assert np.array_equal(sample.ids[first:stop], sample.ids[again:end])
        assert in_books(without(sample, [(again, end)]), mix)
        sizes.add(stop - first)
    assert min(sizes) >= 64
    assert max(sizes) <= 384
    assert len(sizes) > 30
    long = make("repeat", 4096)
    assert max((long[i].write == -1).sum() for i in range(60)) in range(480, 513)


def test_a_name_comes_again_beyond_the_window(make, real_tokenizer):
    mix = make("names")
    for i in range(40):
        sample = mix[i]
        assert in_books(sample.ids, mix)
        ((start, stop),) = runs(sample.weight > 0)
        name = real_tokenizer.decode(sample.ids[start:stop])
        assert re.fullmatch(r" [A-Z][a-z]{2,}", name)
        before = real_tokenizer.decode(sample.ids[:start])
        assert not re.search(r"[.!?][\"')]*$", before), "not at a sentence's start"
        whole = re.compile(rf"\b{name.strip()}\b")
        assert not whole.search(real_tokenizer.decode(sample.ids[start - WINDOW : start]))
        earlier = texts(sample, sample.write == 1, real_tokenizer)
        assert len(whole.findall(before)) == sum(len(whole.findall(text)) for text in earlier) > 0
        assert "".join(earlier).replace(name.strip(), "").strip() == "", "the name alone"
        assert not re.search(rf"\b{name.strip().lower()}\b", before)
        after = real_tokenizer.decode(sample.ids[stop:]).rstrip()
        assert re.search(r"[.!?][\"')]*$", after), "a whole sentence"
        assert (sample.write[start:stop] == -1).all()


def test_a_name_behind_a_quotation_mark_is_seen_too(real_tokenizer):
    calm = " The sea was calm and the wind was low." * 30
    for between, expected in ((calm, True), (f'{calm} "Netherfield is let," he said.', False)):
        text = f"They left for Netherfield at last.{calm}{between} Then they saw Netherfield again. Nobody spoke."
        books = BookHaystack([Document("x", text)], real_tokenizer)
        ids = books.ids(0)
        stretch = Stretch(ids, books.cuts(ids), "x")
        assert (find_cloze(stretch, real_tokenizer, len(ids) - 4, 200, Random(0)) is not None) == expected


def test_a_story_is_told_in_the_text_and_asked_as_in_the_evaluation(make, real_tokenizer):
    mix = make("babi")
    head = instruction("qa1")
    for i in range(20):
        sample = mix[i]
        text = real_tokenizer.decode(sample.ids)
        assert text.startswith(head)
        assert text.endswith(TAIL.format(question=STORY.question) + " bathroom\n")
        assert texts(sample, sample.weight > 0, real_tokenizer) == [" bathroom\n"]
        assert texts(sample, sample.write == 1, real_tokenizer) == [" bathroom."], "of the supporting fact alone"
        places = [text.index(f" {fact}", len(head)) for fact in STORY.facts]
        assert places == sorted(places)
        unlabelled = "".join(texts(sample, sample.write != 0, real_tokenizer))
        assert (
            unlabelled
            == head + "".join(f" {f}" for f in STORY.facts) + TAIL.format(question=STORY.question) + " bathroom\n"
        )


def test_a_story_that_is_too_long_is_left_for_another(make):
    long = Story(STORY.facts * 100, STORY.question, STORY.answer, (0,))
    mix = make("babi", babi={"qa1": [long, STORY]})
    assert [len(mix[i].ids) for i in range(10)] == [LENGTH] * 10
    with pytest.raises(SampleError, match="this story of qa1 needs"):
        _ = make("babi", babi={"qa1": [long]})[0]


# held out --------------------------------------------------------------------------------------------------------

LISTS = ("FIRST", "LAST", "PLACES", "THINGS", "ANIMALS", "COLOURS", "TRADES", "DISHES", "CALLINGS", "ROOMS", "WORDS")
HELD_LISTS = ("FIRST_NAMES", "LAST_NAMES", "CITIES", "FOODS", "JOBS")


@pytest.mark.parametrize(("ours", "held"), list(product(LISTS, HELD_LISTS)))
def test_no_list_has_a_held_out_name(ours, held):
    both = [
        {re.sub(r"^an? ", "", item.lower()) for item in getattr(module, name)}
        for module, name in ((training_facts, ours), (words, held))
    ]
    assert all(both)
    assert not both[0] & both[1]


def test_no_common_word_could_stand_in_a_held_out_password():
    ours = training_facts.common_words()
    assert len({*ours}) == len(ours) > 3900
    assert {*ours}.isdisjoint(words.words_of("noun"))
    assert {*ours}.isdisjoint(words.words_of("adjective"))


def test_no_value_is_a_held_out_one():
    pytest.importorskip("wonderwords")
    adjectives = set(words.words_of("adjective"))
    firsts, lasts = set(words.FIRST_NAMES), set(words.LAST_NAMES)
    listed = {*words.CITIES, *words.FOODS, *words.JOBS}
    drawn = {KINDS[kind](Random(f"{kind}/{i}")) for kind in KINDS for i in range(4000)}
    assert not drawn & listed
    assert not [v for v in drawn if len(v.split()) == 2 and (v.split()[0] in firsts or v.split()[1] in lasts)]
    assert not [v for v in drawn if re.fullmatch(r"\d{7}", v)], "a telephone number"
    assert not [v for v in drawn if "-" in v and v.partition("-")[0] in adjectives], "an adjective and a noun"
    held = {HELD_OUT_KINDS[kind](Random(i)) for kind, _ in HELD_OUT for i in range(4000)}
    assert not drawn & held


def test_no_wording_is_a_held_out_one():
    ours = [text for t in TELLINGS for text in (t.fact, t.question, t.begun, *other_questions(t))]
    ours += [text for link in LINKS for text in link]
    plain = [re.sub(r"\{\w+\}", "", text).lower() for text in ours]
    phrases = (
        "born",
        "city was",
        "likes to eat",
        "like to eat",
        "earn",
        "a living",
        "telephone",
        "password",
        "enter the",
        # as one may ask for the same without the facts' own words
        "birthplace",
        "food",
        "job",
        "profession",
        "phone",
    )
    assert not [(phrase, text) for phrase in phrases for text in plain if re.search(rf"\b{phrase}", text)]
    for _, wording in HELD_OUT:
        assert any(phrase in wording.fact.lower() for phrase in phrases), "the phrases above are those of all of them"
        asked = wording.question.partition("Question: ")[2].partition("\n")[0]
        assert not {wording.fact, asked, *wording.reworded} & {*ours}
    assert not {text for task in NIAH.values() for wording in task.wordings for text in wording.reworded} & {*ours}
    for task in RULER_NIAH.values():
        assert all(wording.fact not in ours for wording in task.wordings)
    assert not [text for text in ours if "VAR" in text or "variable" in text.lower()], "variable tracking's words"
    assert "VAR" in ruler._assignments(["A"], "1")[0]


def test_each_telling_is_asked_for_in_other_words_too():
    questions = {telling.question for telling in TELLINGS}
    assert {*OTHERS} <= questions
    for telling in TELLINGS:
        others = other_questions(telling)
        assert len({*others, telling.question}) == len(others) + 1 >= 4
        assert all(("{key}" in text) == (telling.key != "") and text[-1] in "?." for text in others), others
        assert not any("{noun}" in text for text in others)
    assert other_questions(next(t for t in TELLINGS if "middle name" in t.question))[0] == NAMED[0].replace(
        "{noun}", "middle name"
    )


def test_questions_are_often_in_other_words_than_the_facts():
    asked = [needle(Random(i), small=True).asked[0].question for i in range(600)]
    plain = [
        re.compile(re.sub(r"\\{key\\}", r"[\\w ]+", re.escape(t.question[:-1].removesuffix(ABOVE)))) for t in TELLINGS
    ]
    share = sum(any(p.match(question) for p in plain) for question in asked) / len(asked)
    assert abs(1 - share - OTHERWISE) < 0.08


def test_no_sample_tells_a_held_out_name(make, real_tokenizer):
    names = re.compile(rf"\b({'|'.join((*words.FIRST_NAMES, *words.LAST_NAMES, *words.CITIES))})\b")
    for part in ("needle", "overwritten", "chain"):
        mix = make(part)
        for i in range(60):
            told = "".join(texts(mix[i], mix[i].write != 0, real_tokenizer))
            assert not names.search(told), told


# speed -----------------------------------------------------------------------------------------------------------


def test_books_are_tokenized_once(make, monkeypatch):
    mix = make(dict.fromkeys(PARTS, 1.0))
    for i in range(len(mix.books.documents)):
        mix.books.ids(i)
    lengths = []
    inner = type(mix.tokenizer).__call__
    monkeypatch.setattr(
        type(mix.tokenizer),
        "__call__",
        lambda self, text, **more: lengths.append(len(text)) or inner(self, text, **more),
    )
    for i in range(30):
        _ = mix[i]
    assert lengths
    assert max(lengths) < 2000


def test_a_separator_stands_between_the_texts_of_a_stretch(real_tokenizer):
    documents = [Document(name, f"{name} saw a ship. " * 30) for name in ("Anna", "Bert", "Carl")]
    books, plain = BookHaystack(documents, real_tokenizer, separator=0), BookHaystack(documents, real_tokenizer)
    for seed in range(10):
        with_separator, without_one = books.stretch(300, Random(seed)), plain.stretch(300, Random(seed))
        kept = with_separator.ids[with_separator.ids != 0]
        assert np.array_equal(kept, without_one.ids[: len(kept)])
        assert 1 <= 300 - len(kept) <= 2
        assert not set(np.flatnonzero(with_separator.ids == 0)) & set(with_separator.cuts[1:-1] - 1)
