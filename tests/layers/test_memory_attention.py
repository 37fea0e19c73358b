"""The memory's gates and short convolution by themselves: where they are shut, what opens them, how they start."""

import pytest
import torch

from senri.layers import MemoryAttention, MemoryStream, WriteGate
from senri.layers.memory_attention import ReadGate

EXACT = {"rtol": 1e-12, "atol": 1e-12}


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
    strength = gate(random(1, 5, 4), random(1, 5, 4, seed=1))
    assert strength.shape == (1, 5, 2)
    if expected in (0.0, 1.0):
        assert (strength == expected).all(), "to the last bit"
    torch.testing.assert_close(strength, torch.full_like(strength, expected), rtol=0, atol=1e-4)
    strength.sum().backward()
    assert (gate.out_proj.bias.grad.abs() > 1e-2).all() == (expected not in (0.0, 1.0))


def test_the_logits_learn_where_the_gate_is_shut(make_write_gate):
    gate = make_write_gate(-50.0)
    gate.logits(random(1, 5, 4), random(1, 5, 4, seed=1)).sum().backward()
    assert (gate.out_proj.bias.grad == 5).all()


def test_a_new_write_gate_writes_everything(make_write_gate):
    gate = make_write_gate(0.0)
    gate.reset_parameters()
    strength = gate(random(1, 50, 4), random(1, 50, 4, seed=1))
    assert strength.min() > 0.9


def test_a_write_gate_sees_the_token_the_next_one_and_the_surprise(make_write_gate):
    gate = make_write_gate(0.0, surprise=True)
    torch.nn.init.normal_(gate.out_proj.weight)
    now, after, surprise = random(1, 3, 4), random(1, 3, 4, seed=1), random(1, 3, seed=2).abs()
    first = gate.logits(now, after, surprise)
    for changed in ((now + 1, after, surprise), (now, after + 1, surprise), (now, after, surprise + 1)):
        assert (gate.logits(*changed) - first).abs().min() > 1e-4


def test_gates_are_not_left_to_half_precision(make_write_gate):
    gate = make_write_gate(0.3).bfloat16()
    assert gate(random(1, 2, 4).bfloat16(), random(1, 2, 4).bfloat16()).dtype == torch.float32
    read_gate = ReadGate(4, 2).bfloat16()
    assert read_gate(random(1, 2, 4).bfloat16(), random(1, 2, 2, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("conv_size", [0, 4])
def test_what_follows_the_last_token_counts_as_zeros(make_memory, conv_size):
    """Whatever padding holds there."""
    memory = make_memory(conv_size=conv_size)
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
    assert not make_read_gate()(random(1, 3, 4), random(1, 3, 2, 5)).any()


def reads(*lengths):
    """Reads of these lengths in one direction a head ``[1, T, 2, 5]``; the directions; the lengths."""
    direction = torch.nn.functional.normalize(random(1, 1, 2, 5), dim=-1)
    lengths = torch.tensor(lengths, dtype=torch.float64)
    return direction * lengths[:, None, None], direction, lengths


def test_a_read_gate_opens_with_the_length_of_the_read():
    gate = make_read_gate()
    torch.nn.init.constant_(gate.scale, 3.0)
    read, direction, lengths = reads(0.05, 0.25, 0.5, 0.75, 1.0)
    said = gate(random(1, 5, 4), read)
    assert said.shape == (1, 5, 2, 5)
    loud = said.norm(dim=-1)
    torch.testing.assert_close(said, loud[..., None] * direction, **EXACT)
    for head in loud[0].T:
        assert (head.diff() > 0.1).all()
        torch.testing.assert_close(head[2], torch.tensor(1.5, dtype=torch.float64), **EXACT)
        torch.testing.assert_close(head, 3 * (8 * lengths - 4).sigmoid(), **EXACT)


def test_what_is_read_is_said_at_one_loudness():
    """But for what the gate makes of its length; and the shortest reads fade to nothing."""
    gate = make_read_gate()
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([3.0, 2.0]))
        gate.proj.weight.copy_(random(2, 4, seed=3))
        gate.match.zero_()
    hidden = random(1, 1, 4).expand(1, 6, 4)
    read, direction, lengths = reads(0.0, 0.005, 0.01, 0.1, 1.0, 50.0)
    said = gate(hidden, read)
    loud = torch.tensor([3.0, 2.0], dtype=torch.float64) * gate.proj(hidden[0, 0]).sigmoid()
    assert (loud[0] - loud[1]).abs() > 1e-3, "each head has its own"
    expected = (lengths / 0.01).clamp(max=1)[:, None, None] * loud[:, None] * direction
    torch.testing.assert_close(said, expected, **EXACT)
    assert (said[:, 0] == 0).all()


def test_each_head_has_its_own_read_gate():
    gate = make_read_gate()
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([1.0, 0.0]))
    opened = gate(random(1, 3, 4), random(1, 3, 2, 5))
    assert (opened[..., 0, :].norm(dim=-1) > 0.1).all()
    assert not opened[..., 1, :].any()


def test_gradients_at_an_empty_memory_are_numbers():
    gate = make_read_gate()
    torch.nn.init.constant_(gate.scale, 1.0)
    read = torch.zeros(1, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    hidden = random(1, 3, 4).requires_grad_()
    said = gate(hidden, read)
    assert (said == 0).all(), "an empty memory says nothing"
    said.sum().backward()
    for parameter in (*gate.parameters(), read, hidden):
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
    same, before, after = random(1, taps - 1, 8), random(1, 1, 8, seed=1), random(1, 1, 8, seed=2)
    valid = torch.ones(1, taps, dtype=torch.bool)
    key = memory.keys(torch.cat([same, after], 1), valid)
    query = memory.queries(torch.cat([before, same], 1), valid)
    torch.testing.assert_close(query[..., :4], key, **EXACT)
    torch.testing.assert_close(query[..., 4:], key, **EXACT)
    for place in range(taps - 1):  # each of them counts
        other = same.clone()
        other[:, place] += 1
        assert (memory.queries(torch.cat([before, other], 1), valid) - query).abs().max() > 1e-2
