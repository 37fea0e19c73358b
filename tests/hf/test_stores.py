"""Stores of a model by configuration: trained as one and read as many, shared by layers, cleaned, fading.

That a text may be cut, padded, packed, saved and continued at will with each of them is in the tests of those things.
"""

import pytest
import torch

from senri.hf.convert import convert_to_senri
from senri.memory.inspect import effective_rank
from senri.memory.svd import SVDCleaning, every, never, when_idle, when_rank_exceeds

from ..conftest import STORES, TINY

EXACT = {"rtol": 1e-9, "atol": 1e-9}
# What is written does not depend on what is read.
HEAD = {"memory_readout": "head", "memory_context_size": 4, "write_gate": "hidden"}
ROUTED = {**HEAD, "store": "routed", "top_k_memories": 3}
STEPS = 40


def memories(model, ids):
    return list(model(ids).past_key_values.memories.values())


@pytest.mark.parametrize("basis", ["identity", "hadamard", "random"])
@torch.no_grad()
def test_trained_as_one_and_read_as_many(make_senri, tokens, basis):
    ids = tokens(2, STEPS)
    one, model = make_senri(**HEAD), make_senri(**ROUTED, routing_basis=basis)
    expected = one(ids).logits
    model.train()
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    trained = memories(model, ids)
    model.eval()
    routed = memories(model, ids)
    for single, many in zip(trained, routed, strict=True):
        assert single.store is None
        assert many.store == "routed"
        assert many.M.shape == (2, 2, 8, 8, 8)
        assert (many.z.sum(-1) > 0).sum() > 2 * 2 * 2, "several of them are written"
        torch.testing.assert_close(many.M.sum(2), single.M, **EXACT)
        torch.testing.assert_close(many.z.sum(2), single.z, **EXACT)
    difference = (model(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-9
    assert difference[8:].min() > 1e-4, "routing reads something else"


@torch.no_grad()
def test_routing_is_on_or_off_in_both_modes(make_senri, tokens):
    ids, one = tokens(2, STEPS), make_senri(**HEAD)
    on, off, auto = (make_senri(**ROUTED, routing=how) for how in ("on", "off", "auto"))
    many = auto(ids).logits
    for mode in (True, False):
        torch.testing.assert_close(on.train(mode)(ids).logits, many, **EXACT)
        torch.testing.assert_close(off.train(mode)(ids).logits, one(ids).logits, **EXACT)
        assert memories(off, ids)[0].store == "routed"


@torch.no_grad()
def test_what_was_read_routed_may_be_asked_either_way(make_senri, tokens, tmp_path):
    on, off = make_senri(**ROUTED), make_senri(**ROUTED | {"routing": "off", "top_k_memories": 8})
    on.read(tokens(1, STEPS))
    on.save_memory(tmp_path / "a.senri")
    off.load_memory(tmp_path / "a.senri")
    whole = make_senri(**HEAD)(torch.cat([tokens(1, STEPS), tokens(1, 5, seed=2)], 1)).logits[:, STEPS:]
    torch.testing.assert_close(off(tokens(1, 5, seed=2)).logits, whole, **EXACT)


@torch.no_grad()
def test_a_session_opened_in_training_is_one_for_later(make_senri, tokens):
    model, ids = make_senri(**ROUTED), tokens(1, STEPS)
    expected = model(ids).logits
    model.train().reset_memory()
    torch.testing.assert_close(model.eval()(ids).logits, expected, **EXACT)


@torch.no_grad()
def test_the_joint_form_is_one_head_as_wide_as_the_model(make_base, tokens):
    wide = {**TINY, **ROUTED, "memory_num_heads": 1, "memory_num_key_value_heads": 1, "memory_head_dim": 32}
    (memory, _) = memories(convert_to_senri(make_base(), **wide), tokens(1, STEPS))
    assert memory.M.shape == (1, 1, 32, 32, 32)


@torch.no_grad()
def test_a_state_holds_all_memories_and_does_not_grow(make_senri, tokens):
    one = make_senri(**HEAD)(tokens(1, STEPS)).past_key_values.memory_nbytes - 2 * 8  # the counters
    for options, number in (
        (ROUTED, 8),
        ({**HEAD, "store": "banks", "num_memory_banks": 5, "segments_per_bank": 1}, 5),
        ({**HEAD, "store": "hierarchical", "num_memories": 3}, 3),
    ):
        model = make_senri(**options)
        cache = model(tokens(1, STEPS)).past_key_values
        assert cache.memory_nbytes == number * one + 2 * 8
        model(tokens(1, 200), past_key_values=cache)
        assert cache.memory_nbytes == number * one + 2 * 8


@torch.no_grad()
def test_the_expansion_gate_goes_from_the_sum_to_each_memory(make_senri, tokens):
    ids, model = tokens(2, STEPS), make_senri(**HEAD, store="hierarchical", num_memories=3, segment_size=4)
    fine, coarse = (make_senri(**{**HEAD, "segment_size": 4, **o}) for o in ({"store": "multi", "num_memories": 3}, {}))
    for memory in model.model.memories.values():
        memory.expand_gate_proj.weight.zero_()
    found = {}
    for bias in (-50.0, 0.0, 50.0):
        for memory in model.model.memories.values():
            memory.expand_gate_proj.bias.fill_(bias)
        found[bias] = model(ids).logits
    # the random weights of the others are drawn alike, but in another order: given over by name
    for other, bias in ((coarse, -50.0), (fine, 50.0)):
        other.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(other(ids).logits, found[bias], **EXACT)
    assert (found[0.0] - found[50.0]).abs().max() > 1e-4 < (found[0.0] - found[-50.0]).abs().max()


# memories that layers share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["layer", "head"])
@torch.no_grad()
def test_one_layer_writes_what_all_read(make_senri, tokens, readout):
    options = {"memory_sharing": True, "memory_readout": readout, "num_memory_layers": 3, "first_memory_layer": 0}
    options["memory_context_size"] = 4
    model, ids = make_senri(**options), tokens(2, STEPS)
    cache = model(ids).past_key_values
    assert list(cache.memories) == [0]
    apart = make_senri(**{**options, "memory_sharing": False})(ids).past_key_values
    assert cache.memory_nbytes * 3 == apart.memory_nbytes
    windows = 2 * (2 * 7 * 32 * 8)  # of inputs, which are kept where they will be written
    assert apart.nbytes - cache.nbytes == 2 * cache.memory_nbytes + windows
    _, *others = model.model.memories.values()
    assert not any(hasattr(memory, part) for memory in others for part in ("k_proj", "v_proj"))
    logits = model(ids).logits
    others[1].o_proj.weight.zero_()
    spoken = (model(ids).logits - logits).abs().amax((0, 2))
    assert spoken[:7].max() == 0
    assert spoken[8:].min() > 1e-4, "the last layer reads, too"


@torch.no_grad()
def test_a_shared_memory_is_that_of_the_layer_that_writes_it(make_senri, tokens):
    """With the projections of the writing layer and its inputs, another layer reads what the writing layer reads."""
    options = {"memory_sharing": True, "memory_readout": "layer", "update_rule": "delta", "use_alibi": True}
    model, seen = make_senri(**options, write_gate="hidden", memory_conv_size=2), {}
    first, second = model.model.memories.values()
    second.load_state_dict(first.state_dict(), strict=False)
    for name, memory in (("first", first), ("second", second)):
        memory.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[0]}))
    same = first.register_forward_pre_hook(lambda m, a: seen.update(inputs=a[0]))
    second.register_forward_pre_hook(lambda m, a: (seen["inputs"], *a[1:]))
    model(tokens(2, STEPS))
    same.remove()
    assert seen["first"].abs().max() > 1e-2
    torch.testing.assert_close(seen["second"], seen["first"], **EXACT)


# states ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_state_of_another_store_is_refused(make_senri, tokens):
    banks = {"store": "banks", "num_memory_banks": 3}
    model, other = make_senri(**banks), make_senri(store="multi", num_memories=3)
    cache = model(tokens(1, STEPS)).past_key_values
    with pytest.raises(ValueError, match="state was made with store 'banks', not 'multi'"):
        other(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="this memory state is of store 'banks', the model's of 'multi'"):
        other.set_memory_state(cache)
    with pytest.raises(ValueError, match="this memory state is of store 'banks', the model's of 'single'"):
        make_senri().set_memory_state(cache)
    with pytest.raises(ValueError, match="other shapes than the model"):
        make_senri(**banks | {"num_memory_banks": 2}).set_memory_state(cache)
    make_senri(**banks).set_memory_state(cache)


@torch.no_grad()
def test_beams_and_rows_carry_every_memory(make_senri, tokens):
    for options in STORES:
        model = make_senri(**options)
        cache = model(tokens(3, STEPS)).past_key_values
        picked = cache.fork()
        picked.reorder_cache(torch.tensor([2, 0, 2]))
        picked.batch_select_indices(torch.tensor([0, 1]))
        picked.batch_repeat_interleave(2)
        more = tokens(1, 9, seed=4)
        expected = model(more.expand(3, -1), past_key_values=cache).logits[[2, 2, 0, 0]]
        torch.testing.assert_close(model(more.expand(4, -1), past_key_values=picked).logits, expected, **EXACT)


# ALiBi -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pairs_fade_by_the_segments_that_passed(make_senri, tokens):
    ids, plain = tokens(1, 7 + 12), {**HEAD, "write_gate": "none", "segment_size": 6}
    parts = [make_senri(**plain)(ids[:, :n]).past_key_values.memories[1] for n in (7 + 6, 7 + 12)]
    faded = make_senri(**plain, use_alibi=True, alibi_scale=3.0)(ids).past_key_values.memories[1]
    slopes = 3.0 * torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)  # of two heads
    weight = (-slopes).exp()[None, :, None]
    expected = weight * parts[0].z + (parts[1].z - parts[0].z)
    torch.testing.assert_close(faded.z, expected, rtol=1e-6, atol=1e-6)


# SVD cleaning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"update_rule": "delta"}, ROUTED, *STORES[1:4]], ids=str)
@torch.no_grad()
def test_a_session_is_cleaned(make_senri, tokens, options):
    model = make_senri(**options)
    model.read(tokens(2, STEPS))
    before = model.get_memory_state()
    stats = model.svd_cleaning(energy_threshold=0.9)
    assert 1 <= stats.retained_rank <= stats.original_rank <= 8
    assert 0.9 <= stats.energy_retained < 1
    assert stats.singular_values_before.shape == (2, *before.memories[1].M.shape[:-1])
    after = model.get_memory_state()
    for i, memory in after.memories.items():
        assert memory.store == before.memories[i].store
        lost = (memory.M - before.memories[i].M).square().sum() / before.memories[i].M.square().sum()
        assert 0 < lost <= 0.1 + 1e-9
        assert (effective_rank(memory.M) <= effective_rank(before.memories[i].M) + 1e-9).all()
    changed = (model(tokens(2, 5)).logits - model(tokens(2, 5), past_key_values=before).logits).abs().max()
    assert changed > 1e-6, "it goes on from the cleaned memory"


@torch.no_grad()
def test_policies_of_cleaning_while_reading(make_senri, tokens):
    def read(when):
        model = make_senri(**HEAD)
        calls, clean = [], model.svd_cleaning
        model.svd_cleaning = lambda *numbers: calls.append((model.session.tokens_read[0], *numbers)) or clean(*numbers)
        model.read(tokens(1, STEPS), piece_size=10, cleaning=SVDCleaning(when, 0.8, 3))
        return [tokens for tokens, *numbers in calls if numbers == [0.8, 3]]

    assert read(never) == []
    assert read(every(20)) == [30]  # tokens, 7 of which are still in the window
    assert read(every(10)) == [20, 30, 40]
    assert read(when_rank_exceeds(1.0)) == [10, 20, 30, 40]
    assert read(when_rank_exceeds(8.0)) == []
    idle = iter([False, False, True, False, False, False, False, False])  # asked for each memory until it is
    assert read(when_idle(lambda: next(idle))) == [20]


def test_what_cannot_be_cleaned(make_senri, tokens):
    model = make_senri()
    with pytest.raises(RuntimeError, match="no session is open"):
        model.svd_cleaning()
    model.read(tokens(1, 5))
    with pytest.raises(RuntimeError, match="the memory is empty"):
        model.svd_cleaning()
    slot = make_senri(update_rule="slot")
    slot.read(tokens(1, STEPS))
    with pytest.raises(ValueError, match="the memory of rule 'slot' holds pairs as they are"):
        slot.svd_cleaning()
