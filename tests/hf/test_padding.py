"""Invariants 4 and 9: padding is never written, a row's result is that of the row alone, documents never meet."""

import pytest
import torch

from senri.memory import RULES
from senri.memory.state import named_tensors

from ..conftest import STORES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LENGTHS = [30, 11, 4]
CASES = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": gate, "memory_conv_size": conv}
    for rule in RULES
    for readout, gate, conv in [("layer", "hidden", 3), ("head", "surprise", 3), ("layer", "surprise", 0)]
]
CASES.append({"memory_gate": "infini", "memory_head_dim": 8, "memory_conv_size": 3})
CASES += [{"num_sink_tokens": n, "memory_conv_size": 3} for n in (0, 6)]
CASES += [
    {"update_rule": rule, "memory_readout": readout, "write_gate": gate, "memory_context_size": 5}
    for rule in RULES
    for readout, gate in [("layer", "hidden"), ("head", "surprise")]
]
CASES += [
    {"memory_readout": readout, "write_gate": gate, keys: 4} | store
    for store in STORES
    for readout, gate, keys in [("layer", "hidden", "memory_conv_size"), ("head", "surprise", "memory_context_size")]
]


def left_padded(rows, pad=55):
    """Rows of ids -> ids and mask ``[B, longest]``. The pad is an ordinary token: id 0 would embed as zeros."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
    mask = torch.arange(longest)[None] >= torch.tensor([[longest - len(row)] for row in rows])
    return ids, mask.long()


def rows_of(tokens):
    return [tokens(1, n, seed=n)[0] for n in LENGTHS]


def assert_row_states_equal(cache, row, alone):
    """Everything but the window's padded columns (their keys are garbage that no query sees)."""
    for mine, its in zip(cache.state.layers, alone.state.layers, strict=True):
        length = min(its.keys.shape[2], mine.keys.shape[2])
        torch.testing.assert_close(mine.keys[row, :, -length:], its.keys[0, :, -length:], **EXACT)
        torch.testing.assert_close(mine.sink_keys[row], its.sink_keys[0], **EXACT)
        torch.testing.assert_close(mine.sink_values[row], its.sink_values[0], **EXACT)
        if mine.memory is None:
            continue
        others = named_tensors(its.memory.memory)
        for field, tensor in named_tensors(mine.memory.memory).items():
            torch.testing.assert_close(tensor[row], others[field][0], **EXACT, msg=field)
    assert cache.tokens_read[row] == alone.tokens_read[0]
    assert cache.state.valid[row].sum() == alone.state.valid[0].sum()


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(make_senri, tokens, options):
    model, rows = make_senri(**options), rows_of(tokens)
    ids, mask = left_padded(rows)
    more = tokens(3, 12, seed=9)
    batch = model(ids, attention_mask=mask)
    # mid-stream, as generate() calls it: the mask of all columns so far, then none at all
    longer = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], 1)
    second = model(more[:, :5], attention_mask=longer, past_key_values=batch.past_key_values)
    third = model(more[:, 5:], past_key_values=batch.past_key_values)
    for i, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(batch.logits[i, -len(row) :], alone.logits[0], **EXACT)
        rest = model(more[i : i + 1], past_key_values=alone.past_key_values).logits[0]
        torch.testing.assert_close(torch.cat([second.logits[i], third.logits[i]]), rest, **EXACT)
        assert_row_states_equal(batch.past_key_values, i, alone.past_key_values)
    written = batch.past_key_values.state.layers[1].memory.memory.written
    assert written.tolist() == [n + 12 - 7 for n in LENGTHS]


@pytest.mark.parametrize("keys", ["memory_conv_size", "memory_context_size"])
@pytest.mark.parametrize("readout", ["layer", "head"])
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(make_senri, tokens, readout, keys):
    model = make_senri(memory_readout=readout, write_gate="surprise", **{keys: 3})
    ids, mask = left_padded(rows_of(tokens))
    other, _ = left_padded(rows_of(tokens), pad=0)
    outputs = [model(x, attention_mask=mask) for x in (ids, other)]
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(outputs[0].logits[i, -length:], outputs[1].logits[i, -length:], **EXACT)
    for field in ("M", "z"):
        states = [getattr(o.past_key_values.state.layers[2].memory.memory, field) for o in outputs]
        torch.testing.assert_close(*states, **EXACT)


@torch.no_grad()
def test_only_padding_writes_nothing(make_senri, tokens):
    model = make_senri()
    cache = model(tokens(2, 20), attention_mask=torch.zeros(2, 20)).past_key_values
    memory, _ = cache.state.layers[1].memory
    assert memory.written.tolist() == [0, 0]
    assert not memory.M.any()
    assert cache.tokens_read == [0, 0]
    ids = tokens(2, 15, seed=4)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("keys", ["memory_conv_size", "memory_context_size"])
@torch.no_grad()
def test_right_padding_leaves_the_real_tokens_alone(make_senri, tokens, keys):
    model, ids = make_senri(**{keys: 3}), tokens(2, 20)
    mask = torch.ones(2, 20)
    mask[0, 13:] = 0
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[:1, :13], model(ids[:1, :13]).logits, **EXACT)
    torch.testing.assert_close(out.logits[1:], model(ids[1:]).logits, **EXACT)


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@torch.no_grad()
def test_packed_documents_are_the_documents_alone(make_senri, tokens, options):
    model = make_senri(**options)
    lengths = [[12, 9, 4], [3, 22]]
    ids = tokens(2, 25)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model(ids, position_ids=positions).logits
    for i, row in enumerate(lengths):
        start = 0
        for length in row:
            alone = model(ids[i : i + 1, start : start + length]).logits[0]
            torch.testing.assert_close(logits[i, start : start + length], alone, **EXACT)
            start += length
    assert (logits - model(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_positions_that_only_count_up_pack_nothing(make_senri, tokens):
    model, ids = make_senri(), tokens(2, 20)
    positions = torch.arange(20).expand(2, 20)
    out = model(ids, position_ids=positions)
    assert torch.equal(out.logits, model(ids).logits)
    assert out.past_key_values.tokens_read == [20, 20]


@torch.no_grad()
def test_real_weights(make_real, real_ids):
    model = make_real(random=True, memory_readout="head", update_rule="delta_token", write_gate="surprise")
    for layer in model.config.memory_layers:
        model.model.layers[layer].memory.read_gate.scale.mul_(0.1)
    rows = [real_ids(10_000, 70)[0], real_ids(90_000, 45)[0]]
    ids, mask = left_padded(rows, pad=2)
    batch = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(batch.logits[i, -len(row) :], alone.logits[0], rtol=0, atol=2e-3)
        mine = batch.past_key_values.state.layers[10].memory.memory
        its = alone.past_key_values.state.layers[10].memory.memory
        torch.testing.assert_close(mine.M[i], its.M[0], rtol=1e-3, atol=1e-3)
        assert mine.written[i] == its.written[0] == len(row) - 32


def test_padding_in_the_middle_of_a_text_is_refused_and_changes_nothing(make_senri, tokens):
    model = make_senri()
    ids = tokens(2, 8)
    cache = model.model(ids).past_key_values
    before = cache.state
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding in the middle of a running text"):
        model.model(ids[:, :4], attention_mask=mask, past_key_values=cache)
    assert cache.state is before
    # right padding ends a row: nothing real may follow, but padding and the other rows may
    model.model(ids[:, :4], attention_mask=mask.flip(1), past_key_values=cache)
    with pytest.raises(ValueError, match="padding in the middle"):
        model.model(ids[:, :4], past_key_values=cache)
    model.model(ids[:, :4], attention_mask=torch.tensor([[1] * 4, [0] * 4]), past_key_values=cache)
    assert cache.tokens_read == [16, 10]


def test_packed_documents_with_a_mask_of_ones(make_senri, tokens):
    model = make_senri()
    ids = tokens(1, 12)
    positions = torch.tensor([[*range(6), *range(6)]])
    packed = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    alone = model(ids[:, 6:], output_hidden_states=True)
    torch.testing.assert_close(packed.logits[:, 6:], alone.logits, rtol=0, atol=1e-10)
    for packed_layer, alone_layer in zip(packed.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(packed_layer[:, 6:], alone_layer, rtol=0, atol=1e-10)
