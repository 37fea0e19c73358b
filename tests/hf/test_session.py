"""The session: one memory over many calls, until the caller says otherwise."""

import pytest
import torch

from senri import load_base
from senri.data import iter_bible
from senri.hf.cache import SenriCache, without_memory
from senri.memory import RULES
from senri.memory.state import named_tensors

from ..conftest import STORES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
CASES = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": gate, "memory_conv_size": 3}
    for rule in RULES
    for readout, gate in [("layer", "hidden"), ("head", "surprise")]
]
CASES += [
    {"update_rule": rule, "memory_readout": "head", "write_gate": "surprise", "memory_context_size": 5}
    for rule in RULES
]
CASES += [{"memory_readout": "head", "write_gate": "hidden", "memory_context_size": 5} | store for store in STORES]


def name(options) -> str:
    return "-".join(map(str, options.values()))


def memories(model):
    return list(model.session.memories.values())


def assert_states_equal(left, right):
    left, right = left.named_tensors(), right.named_tensors()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(tensor, right[key], msg=lambda m, key=key: f"{key}: {m}", **EXACT)


@torch.no_grad()
def test_calls_of_a_session_go_on_and_others_do_not(make_senri, tokens):
    model, ids = make_senri(), tokens(2, 40)
    whole = model(ids).logits
    model.reset_memory(2)
    parts = [model(ids[:, :13]).logits, model(ids[:, 13:14]).logits, model(ids[:, 14:]).logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert model.session.tokens_read == [40, 40]
    model.reset_memory(2)
    assert model.session.tokens_read == [0, 0]
    torch.testing.assert_close(model(ids[:, :13]).logits, whole[:, :13], **EXACT)
    model.end_session()
    assert model.session is None
    torch.testing.assert_close(model(ids[:, :20]).logits, model(ids[:, :20]).logits)


@torch.no_grad()
def test_train_leaves_the_session_alone(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 20)
    stateless = model(ids).logits
    model.read(tokens(1, 20, seed=4))
    before = model.get_memory_state()
    model.train()
    torch.testing.assert_close(model(ids).logits, stateless, **EXACT)
    assert_states_equal(model.session, before)
    model.eval()
    assert (model(ids).logits - stateless).abs().max() > 1e-3


@torch.no_grad()
def test_generate_goes_on_from_the_session(make_senri, tokens):
    model, ids, prompt = make_senri(), tokens(1, 40), tokens(1, 9, seed=3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(torch.cat([ids, prompt], 1), **options)[:, 40:]
    model.read(ids)
    kept = model.get_memory_state()
    assert torch.equal(model.generate(prompt, **options), expected)
    assert model.session.tokens_read == [40 + 9 + 5]
    # a second turn: what the first one made is part of the text, but for its last token, which was never read
    text = torch.cat([ids, expected[:, :-1], prompt], 1)
    torch.testing.assert_close(model.generate(prompt, **options), model_alone(model, text, options)[:, -15:])
    # the state kept from before is as it was, and can be gone on from as often as one likes
    assert kept.tokens_read == [40]
    assert torch.equal(model.generate(prompt, past_key_values=kept.fork(), **options), expected)
    assert torch.equal(model.generate(prompt, past_key_values=kept, **options), expected)


def model_alone(model, ids, options):
    session, model.session = model.session, None
    try:
        return model.generate(ids, **options)
    finally:
        model.session = session


@torch.no_grad()
def test_beams_on_a_copy_of_the_session(make_senri, tokens):
    model, ids, prompt = make_senri(), tokens(1, 40), tokens(1, 9, seed=3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    expected = model.generate(torch.cat([ids, prompt], 1), **options)[:, 40:]
    model.read(ids)
    with pytest.raises(ValueError, match=r"split the session's memory: call end_session\(\)"):
        model.generate(prompt, **options)
    with pytest.raises(ValueError, match="num_return_sequences > 1 would split"):
        model.generate(prompt, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache=False would read the prompt again"):
        model.generate(prompt, use_cache=False, max_new_tokens=2)
    state = model.get_memory_state()
    assert torch.equal(model.generate(prompt, past_key_values=state, **options), expected)
    assert state.tokens_read == [40], "beams go on from a copy"
    assert model.session.tokens_read == [40]


@torch.no_grad()
def test_wrong_use_is_refused(make_senri, tokens):
    model = make_senri()
    for call in (model.get_memory_state, model.flush, lambda: model.save_memory("x")):
        with pytest.raises(RuntimeError, match=r"no session is open: call reset_memory\(\), read\(\) or load_memory"):
            call()
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        model.reset_memory(0)
    with pytest.raises(ValueError, match=r"the model computes in torch\.float64, not in torch\.float16"):
        model.reset_memory(dtype=torch.float16)
    with pytest.raises(ValueError, match="the model is on cpu, not on cuda"):
        model.reset_memory(device="cuda")
    model.reset_memory(2, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the input has 1 row\(s\) but the running state has 2"):
        model(tokens(1, 5))
    with pytest.raises(ValueError, match="other shapes than the model"):
        model.set_memory_state(make_senri(memory_head_dim=4)(tokens(1, 5)).past_key_values)
    with pytest.raises(ValueError, match="other shapes than the model"):
        model.set_memory_state(make_senri(num_sink_tokens=2)(tokens(1, 5)).past_key_values)
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.read(tokens(1, 5))


@torch.no_grad()
def test_a_state_taken_out_is_independent_and_can_be_put_back(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 50)
    model.read(ids[:, :25])
    state = model.get_memory_state()
    copy = {key: tensor.clone() for key, tensor in state.named_tensors().items()}
    rest = model(ids[:, 25:]).logits
    assert all(torch.equal(tensor, copy[key]) for key, tensor in state.named_tensors().items())
    other = make_senri()
    other.set_memory_state(state)
    torch.testing.assert_close(other(ids[:, 25:]).logits, rest, **EXACT)
    assert state.tokens_read == [25], "the session goes on from a copy"


@pytest.mark.parametrize("options", CASES, ids=name)
@torch.no_grad()
def test_flush_writes_what_the_window_holds_once(make_senri, tokens, options):
    """The same writes as when padding pushes the window out, for nothing follows a text's last token."""
    model, ids = make_senri(**options), tokens(2, 33)
    model.reset_memory(2)
    model(ids)
    number = 1 if options.get("memory_sharing") else 2
    assert [m.written.tolist() for m in memories(model)] == [[26, 26]] * number
    on = model.get_memory_state()
    model(tokens(2, 7, seed=5), attention_mask=torch.zeros(2, 7), past_key_values=on)
    model.flush()
    for flushed, layer in zip(memories(model), on.memories.values(), strict=True):
        assert flushed.written.tolist() == [33, 33]
        torch.testing.assert_close(flushed.M, layer.M, **EXACT)
        if flushed.z is not None:
            torch.testing.assert_close(flushed.z, layer.z, **EXACT)
    assert model.session.state.layers[0].keys.shape[2] == 0
    assert not model.session.state.valid.any()
    before = model.get_memory_state()
    model.flush()  # nothing is left to write
    assert_states_equal(model.session, before)
    model(tokens(2, 10, seed=6))
    assert [m.written.tolist() for m in memories(model)] == [[36, 36]] * number
    model.flush()
    assert [m.written.tolist() for m in memories(model)] == [[43, 43]] * number
    assert model.session.tokens_read == [43, 43]


@pytest.mark.parametrize("keys", [{"memory_conv_size": 3}, {"memory_context_size": 5}], ids=["conv", "context"])
@torch.no_grad()
def test_a_short_text_is_whole_in_the_memory_after_flush(make_senri, tokens, keys):
    model = make_senri(memory_readout="head", update_rule="delta_token", **keys)
    ids = torch.full((2, 5), 55)
    ids[0], ids[1, 2:] = tokens(1, 5)[0], tokens(1, 3)[0]
    model.reset_memory(2)
    model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    assert [m.written.tolist() for m in memories(model)] == [[0, 0]] * 2
    model.flush()
    assert [m.written.tolist() for m in memories(model)] == [[5, 3]] * 2
    alone = model.get_memory_state()
    model.reset_memory(1)
    model(ids[1:, 2:])
    model.flush()
    torch.testing.assert_close(memories(model)[0].M[0], alone.state.layers[1].memory.memory.M[1], **EXACT)
    assert not model.session.has_padding


@pytest.mark.parametrize("options", CASES, ids=name)
@torch.no_grad()
def test_what_the_window_holds_can_be_written_before_it_leaves(make_senri, tokens, options):
    """But for the newest token, and once: what was written so is left out later."""
    model, ids = make_senri(**options), tokens(2, 33)
    model.reset_memory(2)
    model(ids)
    on = model.get_memory_state()
    model.write_window()
    number = 1 if options.get("memory_sharing") else 2
    assert [m.written.tolist() for m in memories(model)] == [[32, 32]] * number
    assert model.session.state.valid.all(), "the window stays"
    before = model.get_memory_state()
    model.write_window()
    assert_states_equal(model.session, before)
    model.flush()
    model.model.flush(on)
    assert_states_equal(model.session, on)


@pytest.mark.parametrize("options", [case for case in CASES if case["memory_readout"] == "head"], ids=name)
@torch.no_grad()
def test_writing_the_window_early_changes_no_memory_in_the_end(make_senri, tokens, options):
    """Nor do the rows' lengths; with the head read-out nothing that is written depends on what was read."""
    model, ids = make_senri(**options), tokens(2, 60)
    mask = torch.ones(2, 60)
    mask[0, :4] = 0
    results = []
    for early in (False, True):
        model.reset_memory(2)
        for start, stop in ((0, 5), (5, 17), (17, 18), (18, 40), (40, 60)):
            model(ids[:, start:stop], attention_mask=mask[:, start:stop])
            if early:
                model.write_window()
                assert next(m.written.tolist() for m in memories(model)) == [max(stop - 5, 0), stop - 1]
        model.flush()
        results.append(model.get_memory_state())
    assert_states_equal(*results)


@torch.no_grad()
def test_a_written_window_is_in_reach_of_a_question(make_senri, tokens):
    """Of what is read and of nothing else: an emptied memory stays empty."""
    model, ids = make_senri(update_rule="slot", memory_readout="head"), tokens(1, 7)
    cache = model(ids).past_key_values
    assert not any(m.M.any() for m in cache.memories.values()), "all of it is in the window"
    empty = without_memory(cache)
    for state in (cache, empty, model.model.new_cache()):
        model.model.write_window(state)
    assert all(m.M.any() for m in cache.memories.values())
    assert not any(tensor.any() for m in empty.memories.values() for tensor in named_tensors(m).values())


@torch.no_grad()
@pytest.mark.slow
def test_what_was_told_last_counts_while_it_is_in_the_window():
    """The model that ships: a fact in the memory, and in the window what replaced it."""
    model, tokenizer = load_base("float32")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    book = encode("".join(verse for verse, _ in zip(iter_bible(), range(140), strict=False)))
    first, last = encode(" Mary moved to the kitchen."), encode(" Mary went back to the garden.")
    model.read([*book[:200], *first, *book[200:1700], *last, *book[1700:1900]])
    said = []
    for early in (False, True):
        cache = model.get_memory_state()
        if early:
            model.model.write_window(cache)
        logits = model(torch.tensor([encode(" Mary is in the")]), past_key_values=cache).logits
        said.append(tokenizer.decode(logits[0, -1].argmax()))
    assert said == [" kitchen", " garden"]


@pytest.mark.parametrize("options", CASES, ids=name)
@torch.no_grad()
def test_an_emptied_memory_is_one_that_holds_nothing(make_senri, tokens, options):
    model = make_senri(**options)
    cache = model(tokens(1, 30)).past_key_values
    for empty in (without_memory(cache), model.model.new_cache()):
        if empty.state is None:
            empty.state = model.model.empty_state(1, model.dtype)
        held = [layer.memory for layer in empty.state.layers if layer.memory is not None]
        assert len(held) == 2
        for memory in held:
            assert not any(tensor.any() for tensor in named_tensors(memory.memory).values())


@torch.no_grad()
def test_flush_ends_the_run_of_slots(make_senri, tokens):
    """The last token of a text and the first of the next are not one value."""
    model = make_senri(update_rule="slot", memory_readout="head", write_gate="hidden")  # its gates stay open
    cache = model(tokens(1, 20)).past_key_values
    before = [layer.memory.memory.slots for layer in cache.state.layers if layer.memory is not None]
    assert all(slots.running.all() for slots in before)
    model.model.flush(cache)
    model(tokens(1, 25, seed=2), past_key_values=cache)
    for old, layer in zip(before, [x for x in cache.state.layers if x.memory is not None], strict=True):
        slots = layer.memory.memory.slots
        assert (slots.run.amax(-1) > old.run.amax(-1)).all(), "the next text is written in another run"


@torch.no_grad()
def test_flush_ends_the_sinks_too(make_senri, tokens):
    """Without a memory, what follows is a text of its own, row by row."""
    model, ids, more = make_senri(num_memory_layers=0, num_sink_tokens=2), tokens(2, 20), tokens(2, 25, seed=2)
    model.reset_memory(2)
    model(ids)
    model.flush()
    flushed = model.get_memory_state()
    assert flushed.state.since_flush.tolist() == [0, 0]
    assert not any(layer.sink_keys.any() or layer.sink_values.any() for layer in flushed.state.layers)
    assert (model(more).logits - model(more, past_key_values=model.model.new_cache()).logits).abs().max() < 1e-4
    mask = torch.ones(2, 25)
    mask[0, :6] = 0
    padded = model(more, attention_mask=mask, past_key_values=flushed).logits
    assert (padded[0, 6:] - model(more[:1, 6:], past_key_values=model.model.new_cache()).logits[0]).abs().max() < 1e-4


@torch.no_grad()
def test_rows_flushed_at_different_times_in_one_cache(make_senri, tokens):
    model, ids, more = make_senri(num_sink_tokens=2), tokens(2, 30), tokens(2, 9, seed=2)
    caches = []
    for row, flush_at in enumerate((12, 18)):
        model.reset_memory()
        model(ids[row : row + 1, :flush_at])
        model.flush()
        model(ids[row : row + 1, flush_at:])
        caches.append(model.session)
    model.end_session()
    both = SenriCache.concat(caches)
    logits = torch.cat([model(part, past_key_values=both).logits for part in more.split([1, 8], 1)], 1)
    for row, cache in enumerate(caches):
        torch.testing.assert_close(logits[row], model(more[row : row + 1], past_key_values=cache).logits[0], **EXACT)


@torch.no_grad()
def test_after_flush_only_the_memory_knows(make_senri, tokens):
    ids, question = tokens(1, 20), tokens(1, 6, seed=2)
    for random in (True, False):
        model = make_senri(random=random)
        plain = model(question).logits
        model.read(ids)
        model.flush()
        heard = (model(question).logits - plain).abs().max()
        # rotary phases are relative: without memory nothing of the text is left
        assert heard > 1e-2 if random else heard < 1e-6


def test_a_row_that_ends_early_is_not_written_further(make_senri, tokens):
    model = make_senri(sliding_window_size=4)
    ids = tokens(2, 6)
    made = model.generate(ids, max_new_tokens=12, do_sample=False)
    eos = int(made[0, 8])  # row 0 ends at its third new token at the latest
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    alone = []
    for row in range(2):
        model.reset_memory()
        model.generate(ids[row : row + 1], **options)
        alone.append(model.session)
    model.reset_memory(2)
    model.generate(ids, **options)
    assert model.session.tokens_read == [alone[0].tokens_read[0], alone[1].tokens_read[0]]
    assert model.session.tokens_read[0] <= 8
    together = model.session.named_tensors()
    for row in range(2):
        single = alone[row].named_tensors()
        if row == 1:  # the row that went on to the end has the same state as alone
            for name, tensor in together.items():
                torch.testing.assert_close(tensor[1:], single[name], rtol=0, atol=1e-9, msg=name)


def test_a_state_of_another_precision_is_converted(make_senri, tokens):
    model = make_senri().float()
    model.reset_memory()
    model.read(tokens(1, 50))
    state = model.get_memory_state()
    model.bfloat16()
    model.set_memory_state(state)
    model(tokens(1, 3))
    assert model.session.state.layers[0].keys.dtype == torch.bfloat16
    assert model.session.state.layers[1].memory.memory.M.dtype == torch.float32
