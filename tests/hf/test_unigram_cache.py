"""The unigram cache of a model: counts exactly what left the window, whatever the cuts, and ends with its text."""

import pytest
import torch

from senri.evaluation.readers import SenriReader, without_memory
from senri.hf.memory_file import MemoryFileError

WINDOW, STEPS = 5, 24
EXACT = {"rtol": 1e-9, "atol": 1e-9}
HEAD = {"memory_readout": "head", "update_rule": "slot", "memory_num_slots": 7}


@pytest.fixture(
    params=[{}, HEAD, {**HEAD, "memory_context_size": 4}, {"num_memory_layers": 0}, {"write_gate": "hidden"}]
)
def model(make_senri, request):
    return make_senri(sliding_window_size=WINDOW, unigram_cache=True, **request.param)


def in_pieces(model, ids, cuts, **more):
    cache, parts = model.model.new_cache(), []
    for part in ids.tensor_split(list(cuts), dim=1):
        parts.append(model(part, past_key_values=cache, **more).logits)
    return torch.cat(parts, 1), cache


@torch.no_grad()
def test_it_adds_what_the_tokens_behind_the_window_say(model, tokens):
    ids = tokens(1, STEPS)
    logits, cache = in_pieces(model, ids, ())
    left = ids[0, : STEPS - WINDOW]
    assert torch.equal(cache.state.counts[0], torch.bincount(left, minlength=model.vocab_size).float())
    spoken, strength = logits.clone(), model.unigram_cache.strength
    kept, model.unigram_cache.strength.data = strength.data.clone(), torch.zeros_like(strength)
    silent, _ = in_pieces(model, ids, ())
    model.unigram_cache.strength.data = kept
    assert torch.equal(spoken[:, :WINDOW], silent[:, :WINDOW]), "nothing has left the window yet"
    rarity = model.unigram_cache.log_rarity.exp()
    expected = kept * torch.log1p(torch.bincount(left, minlength=model.vocab_size) * rarity)
    torch.testing.assert_close((spoken - silent)[0, -1], expected, **EXACT)


@pytest.mark.parametrize("cuts", [(7,), (1, 2, 9, 17), tuple(range(1, STEPS))])
@torch.no_grad()
def test_a_cut_changes_nothing(model, tokens, cuts):
    ids = tokens(2, STEPS)
    whole, cache = in_pieces(model, ids, ())
    logits, other = in_pieces(model, ids, cuts)
    torch.testing.assert_close(logits, whole, **EXACT)
    assert torch.equal(other.state.counts, cache.state.counts)
    torch.testing.assert_close(model(ids).logits, whole, **EXACT)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], **EXACT)
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([19, 2, -3])).logits, whole[:, [19, 2, -3]], **EXACT
    )


@torch.no_grad()
def test_reading_without_predicting_counts_the_same(model, tokens):
    ids = tokens(1, STEPS)
    _, cache = in_pieces(model, ids, ())
    other = model.model.new_cache()
    for part in ids.split(7, dim=1):
        model.model.read(part, other)
    assert torch.equal(other.state.counts, cache.state.counts)


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(model, tokens):
    ids = tokens(2, STEPS)
    mask = torch.ones_like(ids)
    mask[0, :6], ids[0, :6] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, 6:], model(ids[:1, 6:]).logits, **EXACT)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **EXACT)


@torch.no_grad()
def test_it_ends_with_its_text(model, tokens):
    ids, more = tokens(1, STEPS), tokens(1, 4, seed=1)
    _, cache = in_pieces(model, ids, ())
    assert cache.state.counts.any()
    model.model.flush(cache)
    assert not cache.state.counts.any()
    off = without_memory(in_pieces(model, ids, ())[1])
    assert not off.state.counts.any()
    model(more, past_key_values=off)
    assert not off.state.counts.any(), "what was read before is not counted later either"


@torch.no_grad()
def test_saved_and_gone_on_with(model, make_senri, tokens, tmp_path):
    ids, more = tokens(1, STEPS), tokens(1, 6, seed=1)
    model.reset_memory()
    model(ids)
    model.save_memory(tmp_path / "running.senri")
    expected = model(more).logits
    model.load_memory(tmp_path / "running.senri")
    torch.testing.assert_close(model(more).logits, expected, **EXACT)
    model.flush()
    model.save_memory(tmp_path / "ended.senri")
    model.load_memory(tmp_path / "ended.senri")
    assert torch.equal(model.session.state.counts, torch.zeros(1, model.vocab_size))
    model.end_session()
    model.config.unigram_cache = False
    with pytest.raises(MemoryFileError, match="unigram_cache is True in the file, None here"):
        model.load_memory(tmp_path / "running.senri")
    model.config.unigram_cache = True


@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(model, tokens):
    ids = tokens(1, 12)
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        made = [model.generate(ids, use_cache=cached, **options, **more) for cached in (True, False)]
        assert torch.equal(*made)


@torch.no_grad()
def test_what_cannot_be_counted_is_refused(model, tokens):
    ids = tokens(1, 8)
    with pytest.raises(ValueError, match="unigram_cache need input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="packed documents"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))


@torch.no_grad()
def test_a_converted_model_is_silent_and_saves_it(make_senri, tokens, tmp_path):
    ids = tokens(1, STEPS)
    plain, cached = (make_senri(random=False, sliding_window_size=WINDOW, unigram_cache=on) for on in (False, True))
    torch.testing.assert_close(cached(ids).logits, plain(ids).logits, rtol=0, atol=0)
    cached.unigram_cache.strength.fill_(0.5)
    cached.unigram_cache.log_rarity.uniform_(-1, 1)
    cached.save_pretrained(tmp_path)
    again = type(cached).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, cached(ids).logits, **EXACT)
    assert (again(ids).logits - plain(ids).logits)[:, -1].abs().max() > 0.1


@torch.no_grad()
def test_another_texts_memory_brings_its_words(make_senri, tokens):
    reader = SenriReader(make_senri(sliding_window_size=WINDOW, unigram_cache=True), None)
    mine, other = (reader.read(tokens(1, STEPS, seed)[0].numpy(), STEPS) for seed in (0, 1))
    swapped = reader.with_memory_of(without_memory(mine), reader.memory_of(other))
    assert torch.equal(swapped.state.counts, other.state.counts)


def test_its_numbers_learn(make_senri, tokens):
    model = make_senri(sliding_window_size=WINDOW, unigram_cache=True)
    ids = tokens(2, STEPS)
    model.requires_grad_(False).unigram_cache.requires_grad_(True)
    model(ids[:, :WINDOW], labels=ids[:, :WINDOW]).loss.backward()  # nothing has left the window: a gradient of 0
    assert not model.unigram_cache.strength.grad.any()
    model(ids, labels=ids).loss.backward()
    assert model.unigram_cache.strength.grad.abs() > 0
    assert model.unigram_cache.log_rarity.grad.abs().sum() > 0
