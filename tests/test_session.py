"""Session: a model, a tokenizer and one running memory; the conversation's format, stopping and going on."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from senri import load_base
from senri.data import TextError
from senri.hf.convert import convert_to_senri
from senri.hf.memory_file import MemoryFileError, read_header
from senri.session import ReadingStopped, Session

MEMORY = {"sliding_window_size": 64, "chunk_size": 16, "segment_size": 50, "num_memory_layers": 1} | {
    "first_memory_layer": 1,
    "memory_num_heads": 1,
    "memory_head_dim": 32,
    "update_rule": "delta_token",
    "memory_conv_size": 2,
    "memory_readout": "head",
}
PIECE = 32


@pytest.fixture(scope="module")
def model(randomise):
    """Tiny and random, with the real tokenizer's vocabulary and a memory that speaks."""
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 49152}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    special = {"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    base = LlamaForCausalLM(LlamaConfig(**fields, **heads, **special, initializer_range=0.2))
    made = randomise(convert_to_senri(base, **MEMORY))
    for memory in made.model.memories.values():
        memory.read_gate.scale.data.fill_(4.0)  # loud enough to be heard above the base
    return made


@pytest.fixture
def session(model, real_tokenizer):
    model.end_session()
    return Session(model, real_tokenizer, piece_size=PIECE, generation={"max_new_tokens": 4})


@pytest.fixture
def book(real_text, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(real_text[:1500])
    return path


@pytest.fixture
def ids(book, real_tokenizer):
    return real_tokenizer(book.read_text())["input_ids"]


def tensors(session):
    return {name: t.clone() for name, t in session.state.named_tensors().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Says(LogitsProcessor):
    """Makes generate() answer with the given texts' tokens, one text after the other."""

    def __init__(self, *answers):
        self.tokens = iter([token for answer in answers for token in answer])

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0
        return forced


@pytest.fixture
def fed(model):
    """All ids that the model was fed."""
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.extend(args[0][0].tolist()))
    yield seen
    hook.remove()


# reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 1, 31, 32, 100])
def test_a_text_is_read_to_its_end(session, book, ids, fed, length):
    reports = []
    expected = ids[:length]
    if length is None:
        last = session.read_file(book, reports.append)
    else:
        last = session.read_tokens(iter([expected]), "book.txt", reports.append)
    assert fed == expected
    assert session.state.tokens_read == [len(expected)]
    assert [now.tokens for now in reports] == [*range(PIECE, len(expected), PIECE), len(expected)]
    assert last == reports[-1]
    assert last.state_bytes > session.state.memory_nbytes
    assert not session.state.state.valid.any(), "flushed: the window is empty"
    assert session.state.state.layers[1].memory.memory.written.tolist() == [len(expected)]
    assert session.notes["complete"]
    assert (session.notes["source"], session.notes["read_tokens"]) == ("book.txt", len(expected))
    read = tensors(session)
    session.model.reset_memory()
    session.model.read(expected, piece_size=PIECE)
    session.model.flush()
    assert same(read, tensors(session))


def test_a_question_finds_what_the_window_holds(session, ids, monkeypatch):
    """All but its newest token; asked without a memory, nothing; and asking leaves it as it was."""
    generate, seen = session.model.generate, []

    def spy(*args, **kwargs):
        seen.append(kwargs["past_key_values"].memories[1].written.tolist())
        return generate(*args, **kwargs)

    session.model.read(ids[:40])
    before = tensors(session)
    monkeypatch.setattr(session.model, "generate", spy)
    session.ask("Where is Mary?")
    session.ask("Where is Mary?", memory=False)
    assert same(before, tensors(session))
    session.say("Where is Mary?")
    assert seen == [[39], [0], [39]]


def test_texts_add_up(session, book, ids):
    session.read_tokens(iter([ids[:100]]), "book.txt")
    session.read_tokens(iter([ids[:50]]), "book.txt")
    assert session.state.tokens_read == [150], "a finished reading is not gone on with"
    assert session.notes["read_tokens"] == 50
    with pytest.raises(TextError, match="an empty list is empty: there is nothing to read"):
        session.read_tokens(iter([]), "an empty list")
    with pytest.raises(TextError, match="no such file"):
        session.read_file(book.with_name("none.txt"))
    assert session.state.tokens_read == [150]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(5, "Input/output error"), TextError("a bad byte")])
@pytest.mark.parametrize("stop", [40, 96, 130])
def test_a_stopped_reading_goes_on(session, model, real_tokenizer, book, ids, tmp_path, fault, stop):
    session.read_file(book)
    whole, notes = tensors(session), session.notes
    model.end_session()

    def broken():
        yield ids[:stop]
        raise fault

    session = Session(model, real_tokenizer, piece_size=PIECE)
    kept = stop - stop % PIECE
    with pytest.raises(ReadingStopped, match=re.escape(str(fault)) or "interrupted") as caught:
        session.read_tokens(broken(), "book.txt")
    assert caught.value.tokens == kept
    assert caught.value.reason == (str(fault) or "interrupted")
    assert session.state.tokens_read == [kept]
    session.save(tmp_path / "part.senri")
    # in the same session, and in another one from the file, whatever the text is called now
    session.read_tokens(iter([ids]), "book.txt")
    assert same(tensors(session), whole)
    assert session.notes == notes
    session = Session(model, real_tokenizer, piece_size=PIECE)
    session.resume(tmp_path / "part.senri")
    assert session.state.tokens_read == [kept]
    session.read_tokens(iter([ids]), "renamed.txt")
    assert same(tensors(session), whole)
    assert session.notes == {**notes, "source": "renamed.txt"}


def test_a_fault_before_the_first_piece_is_told_as_it_is(session, ids):
    def broken():
        yield ids[:20]
        raise TextError("a bad byte")

    with pytest.raises(TextError, match="a bad byte"):
        session.read_tokens(broken(), "book.txt")
    assert session.notes == {}


def test_ctrl_c_in_the_display_keeps_the_piece(session, ids):
    def display(now):
        if now.tokens == 64:
            raise KeyboardInterrupt

    with pytest.raises(ReadingStopped) as caught:
        session.read_tokens(iter([ids]), "book.txt", display)
    assert caught.value.tokens == 64
    assert session.state.tokens_read == [64]


def test_what_cannot_be_resumed(session, book, ids, tmp_path):
    path = tmp_path / "a.senri"
    session.read_file(book)
    session.save(path)
    with pytest.raises(MemoryFileError, match=r"a\.senri holds a finished reading: there is nothing to resume"):
        session.resume(path)
    with pytest.raises(MemoryFileError, match="no such file"):
        session.resume(tmp_path / "none.senri")

    def broken(ids):
        yield ids
        raise KeyboardInterrupt

    session.model.end_session()
    with pytest.raises(ReadingStopped):
        session.read_tokens(broken(ids[:100]), "book.txt")
    session.save(path)
    for wrong in ([*ids[:50], 7, *ids[51:]], ids[:95], [], ids[1:]):
        session.resume(path)
        before = tensors(session)
        with pytest.raises(TextError, match="b is not the text whose reading was stopped: name that one"):
            session.read_tokens(iter([wrong]), "b")
        assert same(before, tensors(session))
    session.load(path)  # not resumed: another text is a text of its own
    session.read_tokens(iter([ids[:10]]), "b")
    assert session.state.tokens_read == [106]


def test_saved_notes_come_back(session, book, tmp_path, real_tokenizer):
    session.read_file(book)
    session.save(tmp_path / "a.senri")
    other = Session(session.model, real_tokenizer)
    header = other.load(tmp_path / "a.senri")
    assert other.notes == session.notes
    assert header == read_header(tmp_path / "a.senri")
    assert header["source"] == "book.txt"


# answering -------------------------------------------------------------------------------------------------------


def test_ask_leaves_the_memory_and_say_does_not(session, book, real_tokenizer):
    session.read_file(book)
    before = tensors(session)
    answer = session.ask("Who made the heaven?")
    assert same(before, tensors(session))
    assert session.ask("Who made the heaven?") == answer
    assert session.say("Who made the heaven?") == answer
    assert not same(before, tensors(session))
    fresh = Session(session.model, real_tokenizer, generation={"max_new_tokens": 4})
    fresh.model.reset_memory()
    assert fresh.ask("Who made the heaven?") != answer, "this question does not show that the memory is used"


def test_an_answer_from_an_emptied_memory_is_that_of_one_that_read_nothing(session, book):
    session.model.reset_memory()
    nothing = session.ask("Who made the heaven?")
    assert session.ask("Who made the heaven?", memory=False) == nothing
    session.read_file(book)
    before = tensors(session)
    assert session.ask("Who made the heaven?") != nothing
    assert session.ask("Who made the heaven?", memory=False) == nothing
    assert same(before, tensors(session))


def test_what_the_model_says_itself_is_not_written(session, real_tokenizer):
    told, said = 0, 0
    for message, answer in (("Who made the heaven?", "God did, in the beginning."), ("And then?", "The earth.")):
        tokens = [*real_tokenizer(answer)["input_ids"], 2]
        told += session.prompt(message, first=told == 0).shape[1]
        said += len(tokens) - 1  # the next turn's format brings the end
        session.generation = {"max_new_tokens": len(tokens), "logits_processor": [Says(tokens)]}
        session.say(message)
    assert session.state.tokens_read == [told + said]
    session.model.flush()
    assert session.state.memories[1].written.tolist() == [told]


@pytest.mark.slow
def test_what_a_message_says_anew_is_answered_from_then_on(real_text):
    """The model that ships: a number in the memory, then another one told in the conversation."""
    model, tokenizer = load_base("float32")
    session = Session(model, tokenizer, generation={"max_new_tokens": 20})
    fact, question = "The telephone number of Edwin Cole is {}.", "What is the telephone number of Edwin Cole?"
    old, new = "5550173", "7771234"
    model.read(f"{real_text[:6000]} {fact.format(old)} {real_text[6000:9000]}", tokenizer)
    model.flush()
    assert session.ask(question) == f"{old}."
    session.say(fact.format(new))
    assert session.say(question) == f"{new}."
    assert session.ask(question) == f"{new}."


def test_an_answer_longer_than_the_window_is_left_out_as_far_as_it_can_be(session, real_tokenizer):
    tokens = real_tokenizer("the earth " * 50)["input_ids"][:70]
    session.generation = {"max_new_tokens": 70, "logits_processor": [Says(tokens)]}
    session.say("Who made the heaven?")
    before = session.state.memories[1].written.tolist()
    session.model.flush()
    assert session.state.memories[1].written.tolist() == before


@pytest.mark.parametrize("ends", [True, False])
def test_turns_are_fed_in_the_chat_format_each_token_once(session, real_tokenizer, fed, ends):
    messages = ["Who made the heaven?", "And then?", "one \x00 two"]
    answers = ["God did, in the beginning.", "The earth.", "I see."]
    encoded = [real_tokenizer(a, add_special_tokens=False)["input_ids"] + [2] * ends for a in answers]
    for message, answer, tokens in zip(messages, answers, encoded, strict=True):
        session.generation = {"max_new_tokens": len(tokens), "logits_processor": [Says(tokens)]}
        assert session.say(message) == answer
        so_far = len(fed)
        session.generation["logits_processor"] = [Says(tokens)]
        session.ask("A question aside?")  # leaves no trace
        del fed[so_far:]
    turns = [
        turn
        for message, answer in zip(messages, answers, strict=True)
        for turn in ({"role": "user", "content": message}, {"role": "assistant", "content": answer})
    ]
    text = real_tokenizer.apply_chat_template(turns, tokenize=False)
    expected = real_tokenizer(text.removesuffix("<|im_end|>\n"), add_special_tokens=False)["input_ids"]
    # generate() never feeds the last token it made: the next turn does
    assert fed == (expected if ends else expected[:-1])
    assert fed.count(2) == 1 + 3 + 2, "an end after the system's, each user's and each earlier assistant's turn"
    assert session.state.tokens_read == [len(fed)]


def test_a_turn_cut_short_leaves_no_trace(session, model, fed, monkeypatch):
    session.say("Who made the heaven?")
    before = tensors(session)
    forward, calls = model.model.forward, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **options)

    with monkeypatch.context() as context:
        context.setattr(model.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.say("And then?")
    assert len(calls) == 3
    assert same(before, tensors(session))
    fed.clear()
    session.say("And then?")
    once = list(fed)
    model.end_session()
    session._unfed = None
    session.say("Who made the heaven?")
    fed.clear()
    session.say("And then?")
    assert fed == once, "as if it had not been asked before"


@pytest.mark.parametrize("how", ["read", "load", "new session"])
def test_a_conversation_is_over_after_reading_or_loading(session, book, tmp_path, fed, how, real_tokenizer):
    session.say("Who made the heaven?")
    session.save(tmp_path / "a.senri")
    if how == "read":
        session.read_file(book)
    if how == "load":
        session.load(tmp_path / "a.senri")
    if how == "new session":
        session = Session(session.model, real_tokenizer, generation={"max_new_tokens": 4})
    fed.clear()
    session.say("And then?")
    start = real_tokenizer.decode(fed)
    assert start.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n" in start


def test_without_a_chat_template(session, fed, monkeypatch, real_tokenizer):
    monkeypatch.setattr(real_tokenizer, "chat_template", None)
    answer = real_tokenizer(" God did.")["input_ids"]
    session.generation = {"max_new_tokens": len(answer), "logits_processor": [Says(answer, answer)]}
    assert session.say("Who made the heaven?") == "God did."
    session.say("And then?")
    text = "Question: Who made the heaven?\nAnswer: God did.\n\nQuestion: And then?\nAnswer: God did."
    assert real_tokenizer.decode(fed) == text.removesuffix(".")


def test_the_streamer_gets_the_answer(session, book, capsys, real_tokenizer):
    from transformers import TextStreamer

    session.read_file(book)
    streamer = TextStreamer(real_tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert capsys.readouterr().out == ""
    answer = session.say("Who made the heaven?", streamer)
    assert capsys.readouterr().out.strip() == answer


def test_what_cannot_be_asked(session, book):
    with pytest.raises(RuntimeError, match="no session is open"):
        session.ask("Who made the heaven?")
    session.read_file(book)
    before = tensors(session)
    for method in (session.ask, session.say):
        for question in ("", " \n"):
            with pytest.raises(ValueError, match="the question is empty: ask something"):
                method(question)
        with pytest.raises(ValueError, match=r"the question has 1\d\d tokens, more than the window of 64: shorten it"):
            method("why " * 80)
    assert same(before, tensors(session))


def test_other_rows_are_refused(session):
    session.model.reset_memory(2)
    with pytest.raises(ValueError, match=r"the input has 1 row\(s\) but the running state has 2"):
        session.ask("Who made the heaven?")
