"""Readers: however a state was reached, it is that of a fresh reading; controls see what they should and no more."""

from random import Random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from senri.data.samples import Question
from senri.evaluation import readers
from senri.evaluation.readers import FullAttentionReader, SenriReader, _Decided, common_prefix, generate
from senri.evaluation.scoring import cut

WINDOW, VOCABULARY = 7, 97  # the tiny models'
PIECE, INTERVAL = 5, 6
EXACT = {"rtol": 0, "atol": 1e-9}
LAYER = {"memory_readout": "layer", "update_rule": "linear", "memory_conv_size": 0}
HEAD = {"memory_readout": "head", "update_rule": "delta_token", "memory_conv_size": 2}
SURPRISE = {"memory_readout": "layer", "update_rule": "delta", "memory_conv_size": 2, "write_gate": "surprise"}
KINDS = pytest.mark.parametrize("kind", [LAYER, HEAD, SURPRISE], ids=["layer", "head", "surprise"])


class Signs:
    """One printable character a token; 0, 1 and 2 are special."""

    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens=False):
        assert skip_special_tokens
        return ["".join(chr(29 + i) for i in row.tolist() if i > 2) for row in rows]


@pytest.fixture
def fine(monkeypatch):
    """Snapshots as close as the tiny texts need them."""
    monkeypatch.setattr(readers, "FIRST_INTERVAL", INTERVAL)


@pytest.fixture
def make_reader(make_senri):
    return lambda kind, piece_size=PIECE: SenriReader(make_senri(**kind), Signs(), piece_size=piece_size)


@pytest.fixture(scope="module")
def memoryless(make_senri):
    return make_senri(num_memory_layers=0)


def text(length, seed=0):
    return np.array(Random(seed).choices(range(3, VOCABULARY), k=length), dtype=np.int32)


def question(prompt=(11, 12, 13), answers=("never said",), n=12, stop=None, metric="all"):
    return Question(0, tuple(prompt), answers, n, {}, metric=metric, stop=stop)


@torch.no_grad()
def after(model, state, probe):
    """Logits ``[T, vocabulary]`` of ``probe`` read from ``state``, which stays."""
    ids = torch.from_numpy(np.asarray(probe, dtype=np.int64))[None]
    return model(ids, past_key_values=state.fork()).logits[0]


@torch.no_grad()
def fresh(model, ids):
    """The state after one pass over ``ids``."""
    cache = model.model.new_cache()
    model.model(torch.from_numpy(ids.astype(np.int64))[None], past_key_values=cache)
    return cache


def copied(state):
    tensors = {name: t.clone() for name, t in state.named_tensors().items()}
    return tensors, (state.columns, state.offset, state.has_padding)


def assert_unchanged(state, copy):
    tensors, numbers = copied(state)
    assert numbers == copy[1]
    assert tensors.keys() == copy[0].keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, copy[0][name], rtol=0, atol=0, msg=name)


# (a) one reading for many questions ---------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_readings_in_any_order_are_fresh_readings(make_reader, memoryless, fine, kind, seed):
    reader, rng = make_reader(kind), Random(seed)
    trunk, probe = text(70, seed), text(4, 99)
    contexts = [trunk]
    for branch in range(3):
        cut_at = rng.randrange(10, 60)
        contexts.append(np.concatenate([trunk[:cut_at], text(70 - cut_at, 10 + branch)]))
    last = {True: np.empty(0, dtype=np.int32), False: np.empty(0, dtype=np.int32)}
    handed_out = []
    for _ in range(14):
        ids, at, memory = rng.choice(contexts), rng.randrange(3, 71), rng.random() < 0.6
        path = memory or kind["memory_readout"] == "head"  # the head's control is made of the reading with memory
        shared, before = common_prefix(last[path], ids[:at]), reader.tokens_read
        state = reader.read(ids, at, memory=memory)
        assert reader.tokens_read - before < at - shared + INTERVAL + PIECE
        last[path] = ids[:at]
        model = reader.model if memory else memoryless
        torch.testing.assert_close(
            after(reader.model, state, probe), after(model, fresh(model, ids[:at]), probe), **EXACT
        )
        handed_out.append((state, copied(state)))
        if rng.random() < 0.3:
            reader.answer([state, state], [question()] * 2)
    for state, copy in handed_out:
        assert_unchanged(state, copy)


@KINDS
def test_nothing_is_read_twice_on_the_way(make_reader, fine, kind):
    reader, ids, seen = make_reader(kind), text(60), []
    reader.progress = seen.append
    for at in (9, 10, 31, 31, 60, 60):
        before = reader.tokens_read
        reader.read(ids, at)
        assert reader.tokens_read - before == at - (before if before else 0)
    assert reader.tokens_read == seen[-1] == 60
    assert seen == sorted(set(seen))
    reader.read(ids, 60, memory=False)
    assert reader.tokens_read == (60 if kind["memory_readout"] == "head" else 120)
    reader.read(ids, 60, memory=False)
    reader.read(ids, 60)  # the two readings keep their snapshots apart
    assert reader.tokens_read == (60 if kind["memory_readout"] == "head" else 120)
    other = np.concatenate([ids[:40], text(20, 5)])
    before = reader.tokens_read
    reader.read(other, 60)
    assert reader.tokens_read - before == 60 - 31  # from the place asked at before they part


def test_a_state_that_its_owner_goes_on_with_does_not_spoil_the_next_reading(make_reader, fine):
    reader, ids, probe = make_reader(LAYER), text(40), text(4, 99)
    for memory in (True, False):
        expected = after(reader.model, reader.read(ids, 30, memory=memory), probe)
        for at in (30, 30, 29, 30):
            state = reader.read(ids, at, memory=memory)
            with torch.no_grad():
                reader.model.model(torch.tensor([[5, 6, 7]]), past_key_values=state)
        torch.testing.assert_close(after(reader.model, reader.read(ids, 30, memory=memory), probe), expected, **EXACT)


@pytest.mark.parametrize("memory", [True, False])
def test_snapshots_are_few_and_all_along_a_long_reading(make_reader, fine, monkeypatch, memory):
    monkeypatch.setattr(readers, "SNAPSHOTS", 6)
    reader, ids, counts = make_reader(LAYER), text(500), []
    reader.progress = lambda tokens: counts.append(len(reader._paths[memory].states))
    reader.read(ids, 500, memory=memory)
    for at in range(500, 400, -7):  # each place asked at is one more
        reader.read(ids, at, memory=memory)
    assert max(counts) <= 6
    assert max(len(path.states) for path in reader._paths.values()) <= 6
    reader.read(ids, 500, memory=memory)
    for at in (400, 300, 200):
        before = reader.tokens_read
        reader.read(ids, at, memory=memory)
        assert reader.tokens_read - before <= 200  # not from the start


def test_the_thinning_keeps_every_second_and_the_last(make_reader, monkeypatch):
    monkeypatch.setattr(readers, "SNAPSHOTS", 4)
    monkeypatch.setattr(readers, "FIRST_INTERVAL", 5)
    reader = make_reader(LAYER)
    reader.read(text(25), 25)
    assert sorted(reader._paths[True].states) == [10, 20, 25]


@pytest.mark.parametrize(
    ("a", "b", "shared"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)]
)
def test_common_prefix(a, b, shared):
    a, b = np.array(a, dtype=np.int32), np.array(b, dtype=np.int32)
    assert common_prefix(a, b) == common_prefix(b, a) == shared


# (b) without memory -------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("at", [1, 6, 7, 8, 45])
def test_without_memory_is_a_model_that_has_none(make_reader, memoryless, kind, at):
    reader, ids, probe = make_reader(kind), text(45), text(WINDOW, 99)
    state = reader.read(ids, at, memory=False)
    found = after(reader.model, state, probe)
    torch.testing.assert_close(found, after(memoryless, fresh(memoryless, ids[:at]), probe), **EXACT)
    if at > WINDOW:  # and that is a difference
        with_memory = after(reader.model, reader.read(ids, at), probe)
        assert (with_memory - found).abs().max() > 1e-3


@KINDS
def test_the_window_of_a_reading_without_memory_is_never_written(make_reader, kind):
    reader = make_reader(kind)
    state = reader.read(text(45), 45, memory=False)
    memories = lambda: [m for m in reader.memory_of(state)[0] if m is not None]  # noqa: E731
    assert len(memories()) == 2
    for steps, written in ((WINDOW, 0), (3, 3)):  # the probe's own tokens are, when they leave the window
        with torch.no_grad():
            reader.model.model(torch.full((1, steps), 50), past_key_values=state)
        for memory in memories():
            assert memory.written.tolist() == [written]
            assert bool(memory.M.any()) == (written > 0)


# (c) another text's memory ------------------------------------------------------------------------------------


@KINDS
def test_the_memory_of_another_text_replaces_the_memory_alone(make_reader, kind):
    reader = make_reader(kind)
    off = reader.read(text(40, 1), 40, memory=False)
    stranger = reader.read(text(33, 2), 33)
    copies = copied(off), copied(stranger)
    mixed = reader.with_memory_of(off, reader.memory_of(stranger))
    swapped = 0
    own, other = off.named_tensors(), stranger.named_tensors()
    assert mixed.named_tensors().keys() == own.keys()
    for name, tensor in mixed.named_tensors().items():
        source = other if ".memory.memory." in name else own
        swapped += source is other and not torch.equal(tensor, own[name])
        torch.testing.assert_close(tensor, source[name], rtol=0, atol=0, msg=name)
    assert swapped >= 2 * 2  # M and written of both layers at least
    assert mixed.columns == off.columns
    assert_unchanged(off, copies[0])
    assert_unchanged(stranger, copies[1])


def test_it_answers_from_the_others_memory_and_its_own_window(make_reader):
    """Two texts that end alike have the same window (the head's read never enters it) at the same positions."""
    reader, ending, probe = make_reader(HEAD), text(25, 3), text(4, 99)
    # the first token alike too: it is the sink, which belongs to the window
    a, b, c = (np.concatenate([text(1, 9), text(29, seed), ending]) for seed in (1, 2, 4))
    off = reader.read(a, 55, memory=False)
    memory = reader.memory_of(reader.read(b, 55))
    expected = fresh(reader.model, b)  # b whole, but the window is not written on
    expected.state = expected.state._replace(valid=torch.zeros_like(expected.state.valid))
    mixed = after(reader.model, reader.with_memory_of(off, memory), probe)
    torch.testing.assert_close(mixed, after(reader.model, expected, probe), **EXACT)
    others = [
        off,
        reader.with_memory_of(off, reader.memory_of(reader.read(c, 55))),
        reader.with_memory_of(reader.read(text(55, 7), 55, memory=False), memory),
    ]
    for other in others:
        assert (after(reader.model, other, probe) - mixed).abs().max() > 1e-3
    nothing = reader.with_memory_of(off, reader.memory_of(off))
    torch.testing.assert_close(after(reader.model, nothing, probe), after(reader.model, off, probe), rtol=0, atol=0)


def test_a_model_without_memory_layers_can_be_read_too(memoryless):
    reader = SenriReader(memoryless, Signs(), piece_size=PIECE)
    state = reader.read(text(30), 30, memory=False)
    mixed = reader.with_memory_of(state, reader.memory_of(reader.read(text(30, 1), 30)))
    probe = text(4, 99)
    torch.testing.assert_close(after(memoryless, mixed, probe), after(memoryless, state, probe), rtol=0, atol=0)


# (d) answers --------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """``(model)`` -> a list that grows by the shape of the input of each pass."""

    def watch(model):
        seen = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple((kwargs.get("input_ids", *args)).shape)), with_kwargs=True
        )
        return seen

    return watch


@KINDS
def test_states_answered_together_are_answered_alone(make_reader, kind):
    reader, ids = make_reader(kind), text(40, 1)
    for memory in reader.model.model.memories.values():
        if memory.readout == "head":
            memory.read_gate.scale.data.mul_(3.0)  # loud enough for another memory to change the answer
    on, off = reader.read(ids, 40), reader.read(ids, 40, memory=False)
    states = [on, off, reader.with_memory_of(off, reader.memory_of(reader.read(text(40, 3), 40)))]
    copies = [copied(s) for s in states]
    free = question(n=20)
    together = reader.answer(states, [free] * len(states))
    assert together == [reader.answer([s], [free])[0] for s in states]
    assert len(set(together)) == 3
    for state in states:  # written out: greedy, one token after the other
        fork, said, prompt = state.fork(), [], list(free.prompt)
        while len(said) < 20 and (not said or said[-1] != 2):
            with torch.no_grad():
                logits = reader.model(torch.tensor([prompt]), past_key_values=fork).logits
            said.append(int(logits[0, -1].argmax()))
            prompt = said[-1:]
        assert together[states.index(state)] == Signs().batch_decode([torch.tensor(said)], True)[0].strip()
    # one row's stop is not the others'
    stop = question(n=20, stop=together[0][4])
    stopped = reader.answer(states, [stop] * len(states))
    assert stopped == [cut(t, stop.stop) for t in together] == [reader.answer([s], [stop])[0] for s in states]
    for state, copy in zip(states, copies, strict=True):
        assert_unchanged(state, copy)


def test_an_answer_ends_when_it_is_decided(make_reader, steps):
    reader = make_reader(HEAD)
    for seed in range(1, 20):  # an answer that does not repeat itself from the start
        state = reader.read(text(40, seed), 40)
        free = reader.answer([state], [question(n=20)])[0]
        if len(free) == 20 and len(set(free[:8])) > 3 and free.find(free[2:5]) == 2 and set(free[3:]) - set(free[:3]):
            break
    assert len(set(free[:8])) > 3, free
    seen = steps(reader.model)
    reader.answer([state], [question(n=20)])
    assert seen == [(1, 3), *[(1, 1)] * 19]
    sign = next(c for c in free[3:] if c not in free[:3])
    seen.clear()
    assert reader.answer([state], [question(n=20, stop=sign)]) == [free.split(sign)[0].strip()]
    assert len(seen) == free.index(sign) + 1
    seen.clear()
    assert reader.answer([state], [question(n=20, answers=(free[2:5],))]) == [free[:5].strip()]
    assert len(seen) == 5
    seen.clear()
    reader.answer([state], [question(n=20, answers=(free[2:5],), metric="label")])
    assert len(seen) == 20  # a further label would make it wrong


def test_a_blank_state_answers_from_the_question_alone(make_reader, memoryless):
    reader = make_reader(LAYER)
    asked = question(n=3)  # within the window: no memory is at work
    before = reader.answer([reader.blank()], [asked])
    reader.read(text(40), 40)
    assert reader.answer([reader.blank()], [asked]) == before
    assert before == SenriReader(memoryless, Signs()).answer([reader.blank()], [asked])


def test_states_of_different_lengths_are_not_answered_together(make_reader):
    reader = make_reader(LAYER)
    with pytest.raises(ValueError, match="same number of tokens"):
        reader.answer([reader.read(text(20), 20), reader.read(text(20), 19)], [question()] * 2)


# (e) full attention -------------------------------------------------------------------------------------------


@pytest.fixture
def full(make_base):
    return FullAttentionReader(make_base("llama"), Signs(), piece_size=PIECE)


@torch.no_grad()
def written_out(base, ids, prompt, n):
    """Greedy answer of the base to the whole text, without any cache."""
    row = [*ids.tolist(), *prompt]
    for _ in range(n):
        row.append(int(base(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == 2:
            break
    return Signs().batch_decode([torch.tensor(row[len(ids) + len(prompt) :])], True)[0].strip()


def test_full_attention_in_any_order_is_a_fresh_forward(full):
    rng, trunk = Random(3), text(60)
    assert (full.longest, full.window) == (256, None)
    contexts = [trunk, np.concatenate([trunk[:30], text(30, 1)]), np.concatenate([trunk[:45], text(15, 2)])]
    last, answers = trunk[:0], set()
    for _ in range(12):
        ids, at = rng.choice(contexts), rng.randrange(3, 61)
        before = full.tokens_read
        state = full.read(ids, at)
        assert full.tokens_read - before == at - common_prefix(last, ids[:at])
        last = ids[:at]
        said = full.answer([state], [question(n=6)])
        assert said == [written_out(full.model, ids[:at], (11, 12, 13), 6)]
        assert full._cache.get_seq_length() == at
        answers.add(said[0])
        if rng.random() < 0.5:  # again, with another question
            assert full.answer([state], [question((20, 21), n=4)]) == [written_out(full.model, ids[:at], (20, 21), 4)]
    assert len(answers) > 3


def test_full_attention_has_no_memory_to_swap_and_may_begin_with_nothing(full):
    assert full.memory_of(3) is None
    with pytest.raises(TypeError, match="no memory"):
        full.with_memory_of(3, None)
    assert full.answer([full.blank()], [question(n=5)]) == [written_out(full.model, text(0), (11, 12, 13), 5)]
    state = full.read(text(20), 20)
    assert full.answer([state], [question(n=5)]) == [written_out(full.model, text(20), (11, 12, 13), 5)]


def test_a_failed_answer_leaves_the_full_cache_as_it_was(full, monkeypatch):
    state = full.read(text(20), 20)

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Decided, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            full.answer([state], [question(n=5)])
    assert full._cache.get_seq_length() == 20
    assert full.answer([state], [question(n=5)]) == [written_out(full.model, text(20), (11, 12, 13), 5)]


def test_full_attention_knows_the_blank_state_after_a_reading(full):
    full.read(text(20), 20)
    assert full.answer([full.blank()], [question(n=5)]) == [written_out(full.model, text(0), (11, 12, 13), 5)]


def test_an_interrupted_reading_of_full_attention_is_not_taken_for_a_whole_one(full, monkeypatch):
    a, b = text(60), np.concatenate([text(30), text(30, 1)])
    full.read(a, 60)
    whole, calls = full.model.model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(full.model.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            full.read(b, 60)
    assert full.answer([full.read(a, 60)], [question(n=5)]) == [written_out(full.model, a, (11, 12, 13), 5)]


def test_an_interrupted_reading_is_taken_up_again(make_reader, fine):
    reader, a, b = make_reader(LAYER), text(60), np.concatenate([text(30), text(30, 1)])
    reader.read(a, 60)

    def interrupt(tokens):
        if tokens > 75:
            raise KeyboardInterrupt

    reader.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        reader.read(b, 60)
    reader.progress = lambda tokens: None
    for ids in (b, a):
        found = after(reader.model, reader.read(ids, 60), [3, 4])
        torch.testing.assert_close(found, after(reader.model, fresh(reader.model, ids), [3, 4]), **EXACT)


# (f) generate -------------------------------------------------------------------------------------------------


class Scripted:
    """Says what is written, row by row, as transformers' greedy search would."""

    def __init__(self, *rows):
        self.rows, self.steps = rows, 0
        self.generation_config = GenerationConfig(eos_token_id=2, repetition_penalty=1.5)

    def generate(self, ids, *, attention_mask, past_key_values, generation_config, **options):
        assert not generation_config.do_sample
        assert generation_config.repetition_penalty in (None, 1.0), "the model's own settings stay out"
        assert generation_config.eos_token_id == 2
        max_new_tokens, pad_token_id = generation_config.max_new_tokens, generation_config.pad_token_id
        assert attention_mask.shape == ids.shape
        assert attention_mask.all()
        criteria = options.pop("stopping_criteria")
        assert not options
        running = torch.ones(len(ids), dtype=torch.bool)
        for step in range(max_new_tokens):
            new = torch.tensor([ord(row[step]) - 29 if ord(row[step]) > 31 else ord(row[step]) for row in self.rows])
            ids = torch.cat([ids, torch.where(running, new, pad_token_id)[:, None]], dim=1)
            self.steps += 1
            running &= ~criteria(ids, None)
            if not running.any():
                break
        return ids


def say(model, asked):
    prompt = torch.tensor([asked.prompt] * len(model.rows))
    return generate(model, Signs(), prompt, None, [asked] * len(prompt))


def test_each_row_has_a_question_of_its_own():
    asked = [question(n=8, stop=";"), question(n=3), question(n=8, answers=("see",))]
    model = Scripted("ab;xxxxx", "cdefghij", "I see no")
    prompt = torch.tensor([asked[0].prompt] * 3)
    assert generate(model, Signs(), prompt, None, asked) == ["ab", "cde", "I see"]
    assert model.steps == 5  # the last one's


def test_each_row_ends_at_its_own_stop():
    model = Scripted("  one; two", "three; fou", "\x01five six")
    assert say(model, question(n=8, stop=";")) == ["one", "three", "five six"[:7].strip()]
    assert model.steps == 8  # the third never came to an end
    model = Scripted("a;xxxxxxx", "bbb;xxxxx")
    assert say(model, question(n=9, stop=";")) == ["a", "bbb"]
    assert model.steps == 4
    assert say(Scripted("   ;a;bcd"), question(n=9, stop=";")) == [""]  # (the stop itself is something said)


def test_the_prompt_is_no_part_of_the_answer():
    asked = question(prompt=(ord(";") - 29, ord("x") - 29), n=6, stop=";", answers=("x",))
    assert say(Scripted("ab;cde"), asked) == ["ab"]


def test_without_a_stop_the_answer_ends_once_it_is_right():
    model = Scripted("it is seven, eight or so", "nothing of the kind here")
    right = question(n=24, answers=("seven",))
    assert say(model, right) == ["it is seven", "nothing of the kind here"]
    assert model.steps == 24
    model = Scripted("it is seven, eight or so")
    assert say(model, right) == ["it is seven"]
    assert model.steps == len("it is seven")
    model = Scripted("it is seven, eight or so")
    assert say(model, question(n=24, answers=("eight", "seven"))) == ["it is seven, eight"]
    model = Scripted("it is seven, eight or so")
    assert say(model, question(n=16, answers=("seven",), stop="")) == ["it is seven, eig"], "to the model's own end"
    assert model.steps == 16


def test_decided_is_said_row_by_row():
    decided = _Decided(Signs(), 2, [question(stop=";")] * 4)
    signs = lambda said: [ord(c) - 29 for c in said]  # noqa: E731
    rows = torch.tensor([signs(";;ab"), signs("xxa;"), signs("xx;a"), signs("xx  ")])
    assert decided(rows, None).tolist() == [False, True, True, False]


@torch.no_grad()
def test_a_question_finds_what_the_window_holds(make_reader, monkeypatch):
    """But for the newest token; the control that is without memory stays so, and the state as it was."""
    seen = []
    monkeypatch.setattr(readers, "generate", lambda model, tokenizer, prompts, cache, questions: seen.append(cache))
    reader, ids = make_reader(HEAD), text(30)
    for memory in (True, False):
        state = reader.read(ids, 30, memory=memory)
        before = [m.written.tolist() for m in state.memories.values()]
        reader.answer([state], [question()])
        assert [m.written.tolist() for m in state.memories.values()] == before
    assert [[m.written.tolist() for m in cache.memories.values()] for cache in seen] == [[[29]] * 2, [[0]] * 2]
