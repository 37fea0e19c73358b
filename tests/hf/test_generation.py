"""generate(): every way of decoding, with and without cache, alone and in a batch, far beyond the window."""

import pytest
import torch

from ..conftest import STORES

NEW = 8
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
}
CASES = [
    {"memory_readout": "layer", "update_rule": "linear"},
    {"memory_readout": "head", "update_rule": "delta_token", "write_gate": "surprise", "memory_conv_size": 3},
    *({"memory_readout": "head"} | store for store in STORES),
]


FORGETFUL = ("gated_delta", "slot")  # with random gates, and few slots


def generate(model, ids, **options):
    torch.manual_seed(7)
    # min_new_tokens: an early end would compare less
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def full_forward_greedy(model, ids):
    """The plainest decoding there is: no cache, no generate()."""
    for _ in range(NEW):
        scores = model(ids).logits[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("prompt", [4, 40], ids=["inside", "beyond"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_with_a_cache_as_without(make_senri, tokens, options, mode, prompt):
    model, ids = make_senri(**options), tokens(2, prompt)
    for memory in model.model.memories.values():
        if memory.readout == "head":  # not so loud that it alone decides
            memory.read_gate.scale.mul_(0.2)
    out = generate(model, ids, **MODES[mode])
    assert out.shape == (2, prompt + NEW)
    assert torch.equal(out[:, :prompt], ids)
    assert torch.equal(out, generate(model, ids, use_cache=False, **MODES[mode]))
    if mode == "greedy":
        assert torch.equal(out, full_forward_greedy(model, ids))
    else:
        assert not torch.equal(out, full_forward_greedy(model, ids)), "this mode is no different from greedy here"


@pytest.mark.parametrize("mode", ["greedy", "beam"])
@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_a_left_padded_batch_as_its_rows_alone(make_senri, tokens, options, mode):
    model = make_senri(**options)
    rows = [tokens(1, n, seed=n)[0] for n in (40, 13, 5)]
    ids, mask = torch.full((3, 40), 55), torch.zeros(3, 40, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 40 - len(row) :], mask[i, 40 - len(row) :] = row, 1
    out = generate(model, ids, attention_mask=mask, **MODES[mode])
    uncached = generate(model, ids, attention_mask=mask, use_cache=False, **MODES[mode])
    assert torch.equal(out, uncached)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], **MODES[mode])
        assert torch.equal(out[i, 40:], alone[0, len(row) :])


@pytest.mark.parametrize("options", [o for o in CASES if o.get("update_rule") not in FORGETFUL], ids=str)
@torch.no_grad()
def test_the_first_token_reaches_far_beyond_the_window_through_the_memory_only(make_senri, tokens, options):
    # the first token behind the sink, which every query sees
    ids = tokens(1, 60)
    changed, other_sink = ids.clone(), ids.clone()
    changed[0, 1] = (ids[0, 1] + 1) % 97
    other_sink[0, 0] = (ids[0, 0] + 1) % 97

    def first_scores(model, prompt):
        return generate(model, prompt, output_scores=True, return_dict_in_generate=True, do_sample=False).scores[0]

    loud, silent = make_senri(**options), make_senri(random=False, **options)
    # three layers with a window of 7 see 19 tokens back, no more
    assert (first_scores(silent, ids) - first_scores(silent, changed)).abs().nan_to_num(0).max() == 0
    assert (first_scores(loud, ids) - first_scores(loud, changed)).abs().nan_to_num(0).max() > 1e-6
    assert (first_scores(silent, ids) - first_scores(silent, other_sink)).abs().nan_to_num(0).max() > 1e-3


@torch.no_grad()
def test_going_on_from_a_returned_cache(make_senri, tokens):
    model, ids = make_senri(update_rule="gated_delta"), tokens(2, 33)
    whole = generate(model, torch.cat([generate(model, ids), tokens(2, 11, seed=3)], 1))
    first = generate(model, ids, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.tokens_read == [33 + NEW - 1] * 2, "the last token was made, not read"
    turn = torch.cat([first.sequences, tokens(2, 11, seed=3)], 1)
    assert torch.equal(generate(model, turn, past_key_values=cache), whole)
    assert cache.tokens_read == [33 + NEW + 11 + NEW - 1] * 2


@torch.no_grad()
def test_nothing_leaks_from_one_generation_to_the_next(make_senri, tokens):
    model = make_senri()
    ids, other = tokens(1, 40), tokens(1, 40, seed=8)
    fresh = generate(make_senri(), ids)
    entries = set(model.state_dict())
    generate(model, other)
    model(other)
    assert torch.equal(generate(model, ids), fresh)
    assert set(model.state_dict()) == entries
    assert not [name for name, _ in model.named_buffers() if "inv_freq" not in name]
    assert model.session is None


@torch.no_grad()
def test_num_return_sequences(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 20)
    out = generate(model, ids, do_sample=True, num_return_sequences=4)
    assert torch.equal(out[:, :20], ids.expand(4, -1))
    assert len({tuple(row.tolist()) for row in out}) == 4


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_other_caches_are_refused(make_senri, tokens, kind):
    with pytest.raises(ValueError, match=f"cache_implementation '{kind}' is not for Senri"):
        generate(make_senri(), tokens(1, 5), cache_implementation=kind)


def test_a_foreign_cache_is_refused(make_senri, tokens):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="must be a SenriCache, not DynamicCache"):
        make_senri()(tokens(1, 5), past_key_values=DynamicCache())


def test_assisted_decoding_is_refused(make_senri, tokens):
    with pytest.raises(ValueError, match=r"stateful"):
        generate(make_senri(), tokens(1, 5), assistant_model=make_senri(random=False))


@pytest.mark.slow
@torch.no_grad()
def test_real_weights(make_real, real_ids, real_tokenizer):
    model = make_real(random=True, memory_readout="head", update_rule="delta_token")
    for layer in model.config.memory_layers:
        model.model.layers[layer].memory.read_gate.scale.mul_(0.05)
    ids = real_ids(500_000, 45)
    greedy = generate(model, ids, do_sample=False)
    assert torch.equal(greedy, full_forward_greedy(model, ids))
    beam = generate(model, ids, num_beams=2, do_sample=False)
    assert torch.equal(beam, generate(model, ids, num_beams=2, do_sample=False, use_cache=False))
    # inside the window it is the base that speaks, and it speaks English
    prompt = real_tokenizer("The capital of France is", return_tensors="pt")
    text = real_tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in text
