"""The memory's gates, its count of pairs and its addresses by themselves: what opens them, how they start."""

import pytest
import torch
import torch.nn.functional as F

from senri.layers import MemoryAttention, MemoryStream, WriteGate, taps_of
from senri.layers.memory_attention import ReadGate

EXACT = {"rtol": 1e-12, "atol": 1e-12}
EMPTY = torch.zeros(1, 1, 2, dtype=torch.float64)  # the fill of a memory that holds nothing


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_write_gate():
    """``(bias)`` -> a write gate of two memories whose logits are all ``bias``."""

    def make(bias, surprise=False):
        gate = WriteGate(4, 2, surprise=surprise).double()
        gate.reset_parameters()
        with torch.no_grad():
            gate.out_proj.bias.fill_(bias)
        return gate

    return make


@pytest.fixture
def make_memory():
    """``(**options)`` -> a small memory with random parameters that speaks."""

    def make(start=False, **options):
        options = {"rule": "delta_token", "write_gate": "hidden", "readout": "head", "conv_size": 2, **options}
        memory = MemoryAttention(8, 2, 1, 4, 3, **options).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in [] if start else memory.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        return memory

    return make


# write gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "expected"), [(-50, 0.0), (-2.5, 0.0), (-2.3, 0.00935), (0, 0.5), (2.3, 0.99065), (2.5, 1.0), (50, 1.0)]
)
def test_a_write_gate_reaches_0_and_1(make_write_gate, logit, expected):
    gate = make_write_gate(logit)
    strength = gate.strength(gate(random(1, 5, 4), random(1, 5, 4, seed=1)))
    assert strength.shape == (1, 5, 2)
    if expected in (0.0, 1.0):
        assert (strength == expected).all(), "to the last bit"
    torch.testing.assert_close(strength, torch.full_like(strength, expected), rtol=0, atol=1e-4)
    strength.sum().backward()
    assert (gate.out_proj.bias.grad.abs() > 1e-2).all() == (expected not in (0.0, 1.0))


def test_the_logits_learn_where_the_gate_is_shut(make_write_gate):
    gate = make_write_gate(-50.0)
    gate(random(1, 5, 4), random(1, 5, 4, seed=1)).sum().backward()
    assert (gate.out_proj.bias.grad == 5).all()


def test_a_new_write_gate_writes_everything(make_write_gate):
    gate = make_write_gate(0.0)
    gate.reset_parameters()
    strength = gate.strength(gate(random(1, 50, 4), random(1, 50, 4, seed=1)))
    assert strength.min() > 0.9


def test_a_write_gate_sees_the_token_the_next_one_and_the_surprise(make_write_gate):
    gate = make_write_gate(0.0, surprise=True)
    torch.nn.init.normal_(gate.out_proj.weight)
    now, after, surprise = random(1, 3, 4), random(1, 3, 4, seed=1), random(1, 3, seed=2).abs()
    first = gate(now, after, surprise)
    for changed in ((now + 1, after, surprise), (now, after + 1, surprise), (now, after, surprise + 1)):
        assert (gate(*changed) - first).abs().min() > 1e-4


def test_what_the_gate_is_surest_of_stays_though_all_gates_are_1(make_memory):
    memory = make_memory(rule="slot", num_slots=4, conv_size=0, start=True)
    logits = torch.tensor([9.0, 4.0, 25.0, 3.0, 6.0, 12.0, 5.0, 3.0, 7.0, 200.0])
    memory.write_gate.forward = lambda hidden, following, surprise=None: logits[None, :, None].double()
    steps = len(logits)
    assert (memory.write_gate.strength(logits) == 1).all()
    inputs = MemoryStream(torch.ones(1, memory.window + steps, dtype=torch.bool), torch.arange(13)[None] % 11, None)
    state = memory.init_state(1, torch.float64, torch.device("cpu"))
    state = state._replace(recent=random(1, memory.window, 8))
    _, after = memory(random(1, steps, 8, seed=1), inputs, state, random(11, 8, seed=3))
    kept = after.memory.slots.importance[0, 0]
    torch.testing.assert_close(kept, torch.tensor([9.0, 25.0, 12.0, 200.0]).double())
    assert memory.write(
        random(1, steps, 8, seed=1), inputs, state, random(11, 8, seed=3)
    ).memory.slots.importance.equal(after.memory.slots.importance), "and so it is when nothing is read"


def test_a_run_is_read_by_the_token_that_was_just_said(make_memory):
    memory = make_memory(rule="slot", num_slots=8, conv_size=0)
    memory.write_gate.forward = lambda hidden, following, surprise=None: 9 * hidden.new_ones(*hidden.shape[:2], 1)
    embedding, valid = random(11, 8, seed=3), torch.ones(1, 8, dtype=torch.bool)
    state = memory.init_state(1, torch.float64, torch.device("cpu"))
    _, state = memory(random(1, 5, 8), MemoryStream(valid, torch.arange(8)[None], None), state, embedding)
    added = []
    for cost in (0.0, 3.0):
        memory.slot_gate.jump_cost.data.fill_(cost)
        for token in (1, 9):  # of the window's last; the pairs that leave are others
            ids = torch.tensor([[5, 6, 7, token]])
            out, _ = memory(random(1, 1, 8, seed=1), MemoryStream(valid[:, :4], ids, None), state, embedding)
            added.append(out)
    torch.testing.assert_close(added[0], added[1], **EXACT)
    assert (added[2] - added[3]).abs().max() > 1e-3


def test_gates_are_not_left_to_half_precision(make_write_gate):
    gate = make_write_gate(0.3).bfloat16()
    assert gate(random(1, 2, 4).bfloat16(), random(1, 2, 4).bfloat16()).dtype == torch.float32
    read_gate = ReadGate(4, 2).bfloat16()
    assert read_gate(random(1, 2, 4).bfloat16(), random(1, 2, 2, 3).bfloat16(), EMPTY.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("keys", [{"conv_size": 0}, {"conv_size": 4}, {"conv_size": 0, "context_size": 3}], ids=str)
def test_what_follows_the_last_token_counts_as_zeros(make_memory, keys):
    """Whatever padding holds there."""
    memory = make_memory(**keys)
    memory.write_gate.out_proj.weight.data *= 3
    seen = []
    memory.write_gate.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    state = memory.init_state(1, torch.float64, torch.device("cpu"))
    slots, length, steps = state.recent.shape[1], 5, 12
    hidden = random(1, steps, 8)
    valid = torch.zeros(1, slots + steps, dtype=torch.bool)
    valid[:, slots : slots + length] = True
    embedding, ids = random(11, 8, seed=3), torch.arange(slots + steps)[None] % 11
    stream = MemoryStream(valid, ids, None)
    _, after = memory(hidden, stream, state, embedding)
    ((now, following),) = seen
    first = 3  # the window: the first token leaves when the fourth comes
    torch.testing.assert_close(now[:, first : first + length], hidden[:, :length], **EXACT)
    torch.testing.assert_close(following[:, first : first + length - 1], hidden[:, 1:length], **EXACT)
    assert not following[:, first + length - 1].any(), "padding follows"
    assert after.memory.written.tolist() == [length]
    other = torch.where(valid[:, slots:, None], hidden, random(1, steps, 8, seed=9))
    _, again = memory(other, stream, state, embedding)
    assert after.memory.M.abs().max() > 1e-3
    torch.testing.assert_close(again.memory.M, after.memory.M, **EXACT)


# read gate -------------------------------------------------------------------------------------------------------


def make_read_gate():
    gate = ReadGate(4, 2).double()
    gate.reset_parameters()
    return gate


def test_a_new_read_gate_is_silent():
    assert not make_read_gate()(random(1, 3, 4), random(1, 3, 2, 5), EMPTY).any()


def reads(*lengths):
    """Reads of these lengths in one direction a head ``[1, T, 2, 5]``; the directions; the lengths."""
    direction = torch.nn.functional.normalize(random(1, 1, 2, 5), dim=-1)
    lengths = torch.tensor(lengths, dtype=torch.float64)
    return direction * lengths[:, None, None], direction, lengths


def test_a_read_gate_opens_with_the_length_of_the_read():
    gate = make_read_gate()
    torch.nn.init.constant_(gate.scale, 3.0)
    read, direction, lengths = reads(0.05, 0.15, 0.25, 0.35, 0.5)
    said = gate(random(1, 5, 4), read, EMPTY)
    assert said.shape == (1, 5, 2, 5)
    loud = said.norm(dim=-1)
    torch.testing.assert_close(said, loud[..., None] * direction, **EXACT)
    for head in loud[0].T:
        assert (head.diff() > 0.1).all()
        torch.testing.assert_close(head, 3 * (24 * lengths.square() - 2).sigmoid(), **EXACT)


def test_what_chance_reads_opens_no_read_gate():
    """From a full memory even an unknown query reads much: what is no longer than chance has it is no find."""
    gate = make_read_gate()
    with torch.no_grad():
        gate.scale.fill_(3.0)
        gate.chance.copy_(torch.tensor([1.0, 0.5]))
    fills = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)
    fill = fills[None, :, None].expand(1, 4, 2)
    read, _, lengths = reads(*fills.clamp(min=0.01).sqrt().tolist())
    loud = gate(random(1, 4, 4), read, fill).norm(dim=-1)[0]
    for head, chance in zip(loud.T, (1.0, 0.5), strict=True):
        torch.testing.assert_close(head, 3 * (24 * (lengths.square() - chance * fills) - 2).sigmoid(), **EXACT)
    shut = torch.full((3,), 3 * torch.tensor(-2.0).sigmoid().item(), dtype=torch.float64)
    torch.testing.assert_close(loud[1:, 0], shut, rtol=1e-6, atol=0)
    assert (loud[1:, 1].diff() > 0.1).all(), "each head has its own"


def test_what_is_read_is_said_at_one_loudness():
    """But for what the gate makes of its length; and the shortest reads fade to nothing."""
    gate = make_read_gate()
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([3.0, 2.0]))
        gate.proj.weight.copy_(random(2, 4, seed=3))
        gate.match.zero_()
    hidden = random(1, 1, 4).expand(1, 6, 4)
    read, direction, lengths = reads(0.0, 0.005, 0.01, 0.1, 1.0, 50.0)
    said = gate(hidden, read, EMPTY)
    loud = torch.tensor([3.0, 2.0], dtype=torch.float64) * gate.proj(hidden[0, 0]).sigmoid()
    assert (loud[0] - loud[1]).abs() > 1e-3, "each head has its own"
    expected = (lengths / 0.01).clamp(max=1)[:, None, None] * loud[:, None] * direction
    torch.testing.assert_close(said, expected, **EXACT)
    assert (said[:, 0] == 0).all()


def test_each_head_has_its_own_read_gate():
    gate = make_read_gate()
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([1.0, 0.0]))
    opened = gate(random(1, 3, 4), random(1, 3, 2, 5), EMPTY)
    assert (opened[..., 0, :].norm(dim=-1) > 0.1).all()
    assert not opened[..., 1, :].any()


def test_gradients_at_an_empty_memory_are_numbers():
    gate = make_read_gate()
    torch.nn.init.constant_(gate.scale, 1.0)
    read = torch.zeros(1, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    hidden = random(1, 3, 4).requires_grad_()
    fill = torch.full((1, 3, 2), 0.3, dtype=torch.float64, requires_grad=True)
    said = gate(hidden, read, fill)
    assert (said == 0).all(), "an empty memory says nothing"
    said.sum().backward()
    for parameter in (*gate.parameters(), read, hidden, fill):
        assert parameter.grad.isfinite().all()
    assert (read.grad > 0).all()


# short convolution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taps", "queries", "keys"),
    [(2, [0.0, 1.0], [1.0, 0.0]), (4, [0.0, 0.25, 0.5, 1.0], [0.25, 0.5, 1.0, 0.0])],
)
@pytest.mark.parametrize("readout", ["head", "layer"])
def test_start_values_of_the_convolution(make_memory, taps, queries, keys, readout):
    memory = make_memory(start=True, conv_size=taps, readout=readout)
    for weights, row in ((memory.q_conv, queries), (memory.k_conv, keys)):
        expected = torch.tensor(row, dtype=torch.float64).expand(weights.shape)
        torch.testing.assert_close(weights.detach(), expected, **EXACT)
    if readout == "layer":
        values = torch.tensor([0.0] * (taps - 1) + [1.0], dtype=torch.float64)
        torch.testing.assert_close(memory.v_conv.detach(), values.expand(memory.v_conv.shape), **EXACT)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_at_first_asking_with_the_same_tokens_finds_what_followed_them(make_memory, taps):
    memory = make_memory(start=True, conv_size=taps)
    rows = random(taps + 1, 8)  # what comes before, the same tokens, what follows
    at, valid = torch.arange(taps).flip(0)[None], torch.ones(1, taps, dtype=torch.bool)
    key = memory.address("k", rows, at + 1, valid)
    query = memory.address("q", rows, at, valid)
    assert key.shape == (1, 4)
    torch.testing.assert_close(query[..., :4], key, **EXACT)
    torch.testing.assert_close(query[..., 4:], key, **EXACT)
    for place in range(1, taps):  # each of them counts
        other = rows.clone()
        other[place] += 1
        assert (memory.address("q", other, at, valid) - query).abs().max() > 1e-2


# attention over a context ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("conv", "context", "taps"), [(0, 0, 1), (2, 0, 2), (4, 0, 4), (0, 1, 2), (0, 5, 6)])
def test_the_tokens_that_a_key_is_made_of(make_memory, conv, context, taps):
    """A key's context ends before its pair, a query's with the last token: one more in all."""
    memory = make_memory(conv_size=conv, context_size=context)
    assert memory.taps == taps_of(conv, context) == taps
    rows, valid = random(taps + 3, 8).requires_grad_(), torch.ones(1, taps, dtype=torch.bool)
    newest_first = torch.arange(taps).flip(0)[None] + 2
    for name in "kq":
        made = memory.address(name, rows, newest_first, valid)
        (gradient,) = torch.autograd.grad(made.square().sum(), rows)
        counted = gradient.abs().amax(1).nonzero()[:, 0].tolist()
        seen = newest_first[0].flip(0).tolist()
        assert counted == (seen if not context else seen[:-1] if name == "k" else seen[1:])


@pytest.mark.parametrize("context", [1, 5])
def test_asking_in_the_context_that_stood_before_a_pair_is_its_key(make_memory, context):
    memory = make_memory(conv_size=0, context_size=context)
    with torch.no_grad():
        memory.q_proj.weight.copy_(memory.for_query_heads(memory.k_proj.weight))
        memory.q_proj.bias.copy_(memory.for_query_heads(memory.k_proj.bias))
    rows = random(context + 2, 8)
    at, valid = torch.arange(context + 1).flip(0)[None], torch.ones(1, context + 1, dtype=torch.bool)
    key = memory.address("k", rows, at + 1, valid)
    query = memory.address("q", rows, at, valid)
    assert key.abs().max() > 0.1
    torch.testing.assert_close(query, torch.cat([key, key], -1), **EXACT)
    other = rows.clone()
    other[-1] += 1  # the pair itself
    torch.testing.assert_close(memory.address("k", other, at + 1, valid), key, **EXACT)
    other[1] += 1
    assert (memory.address("k", other, at + 1, valid) - key).abs().max() > 1e-2


@pytest.mark.parametrize("readout", ["head", "layer"])
def test_values_have_no_context(make_memory, readout):
    memory = make_memory(conv_size=0, context_size=3, readout=readout)
    rows, at = random(6, 8), torch.tensor([[5, 4, 3, 2]])
    made = memory.address("v", rows, at, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(made, memory.v_proj(rows[5:]), **EXACT)


# stray reads -----------------------------------------------------------------------------------------------------


def stream_of(memory, steps, embedding_rows=11):
    """A text of ``steps`` tokens without padding: inputs, flags and ids, the state and the embeddings."""
    state = memory.init_state(2, torch.float64, torch.device("cpu"))
    slots = state.recent.shape[1]
    valid = torch.zeros(2, slots + steps, dtype=torch.bool)
    valid[:, slots:] = True
    ids = torch.arange(slots + steps).expand(2, -1) % embedding_rows
    return random(2, steps, 8), MemoryStream(valid, ids, None), state, random(embedding_rows, 8, seed=3)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [3, 0, 9]], ids=str)
@pytest.mark.parametrize("keys", [{"conv_size": 2}, {"conv_size": 0, "context_size": 3}], ids=["conv", "context"])
def test_a_read_is_measured_against_stray_ones_however_the_text_is_cut(make_memory, keys, cuts):
    memory = make_memory(**keys)
    fills = []
    memory.read_gate.register_forward_pre_hook(lambda module, args: fills.append(args[2]))
    hidden, stream, state, embedding = stream_of(memory, 12)
    whole, after = memory(hidden, stream, state, embedding)
    slots, start, parts = state.recent.shape[1], 0, []
    for size in cuts:
        part = slice(start, start + slots + size)
        piece = MemoryStream(stream.valid[:, part], stream.ids[:, part], None)
        out, state = memory(hidden[:, start : start + size], piece, state, embedding)
        parts.append(out)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    torch.testing.assert_close(state.recent, after.recent, **EXACT)
    torch.testing.assert_close(state.memory.M, after.memory.M, **EXACT)
    torch.testing.assert_close(torch.cat(fills[1:], 1), fills[0], **EXACT)
    assert fills[0].shape == (2, 12, 2)
    assert not fills[0][:, :3].any(), "nothing has left the window"
    assert (fills[0][:, 4:] > 0).all()


def test_stray_reads_are_those_of_the_query_rolled_round(make_memory):
    memory = make_memory()
    q, k, v = (random(1, n, w, seed=n) for n, w in ((5, 8), (5, 4), (5, 4)))
    found = []
    memory.read_gate.register_forward_pre_hook(lambda module, args: found.append(args[1:]))
    out, state = memory.write_and_read(q, k, v)
    memory.read_out(random(1, 5, 8), out)
    ((read, stray),) = found
    unit = F.normalize(q.unflatten(-1, (2, 4)), dim=-1)[:, -1]  # at the last step: the final state
    torch.testing.assert_close(read[:, -1], unit @ state.M[:, 0].mT, **EXACT)
    squares = [(unit.roll(4 * i // 5, -1) @ state.M[:, 0].mT).square().sum(-1) for i in range(1, 5)]
    torch.testing.assert_close(stray[:, -1], sum(squares) / 4, **EXACT)


# an answer's end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_value_heads", [1, 2])
@torch.no_grad()
def test_a_memory_that_holds_something_says_the_end(key_value_heads):
    """As loud as its map of the query says; and as exactly nothing while nothing is written."""
    options = {"rule": "slot", "write_gate": "hidden", "readout": "head", "num_slots": 6}
    memory = MemoryAttention(8, 2, key_value_heads, 4, 3, end_token=5, **options).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in memory.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    memory.write_gate.out_proj.bias.fill_(5.0)
    hidden, embedding, ids = random(2, 9, 8), random(12, 8, seed=2), torch.arange(18).view(2, 9) % 12
    state = memory.init_state(2, torch.float64, hidden.device)
    slots = state.recent.shape[1]
    stream = MemoryStream(
        torch.cat([torch.zeros(2, slots, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)], 1),
        torch.cat([torch.zeros(2, slots, dtype=torch.long), ids], 1), None,
    )  # fmt: skip
    heard = {}
    for bias in (-60.0, 60.0):
        memory.slot_gate.end_bias.fill_(bias)
        heard[bias], _ = memory(hidden, stream, state, embedding)
    assert torch.equal(heard[60.0][:, :3], torch.zeros(2, 3, 8, dtype=torch.float64)), "nothing has left the window"
    assert (heard[-60.0][:, 3:].abs().sum(-1) > 0).all()
    end = (
        F.normalize(memory.v_proj(embedding[5]), dim=-1)
        .view(key_value_heads, 4)
        .repeat_interleave(2 // key_value_heads, 0)
    )
    alone = memory.o_proj((memory.read_gate.scale[:, None] * end).flatten())
    torch.testing.assert_close(heard[60.0][:, 3:], alone.expand(2, 6, -1), rtol=1e-9, atol=1e-9)
    silent = MemoryAttention(8, 2, key_value_heads, 4, 3, **options).double()
    weights = memory.state_dict()
    silent.load_state_dict({n: x for n, x in weights.items() if not n.startswith("slot_gate.end_")})
    without, _ = silent(hidden, stream, state, embedding)
    torch.testing.assert_close(without, heard[-60.0], rtol=1e-9, atol=1e-12)


def test_only_a_slot_memory_at_the_head_knows_an_end():
    for changes in ({"rule": "linear"}, {"readout": "layer"}):
        options = {"rule": "slot", "readout": "head", "end_token": 5, **changes}
        memory = MemoryAttention(8, 2, 1, 4, 3, **options)
        assert memory.end_token is None
        assert not [name for name, _ in memory.named_parameters() if "end_" in name]
