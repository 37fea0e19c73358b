"""Rotary positions: the base's bits inside its training length, exact phases ten million tokens on."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from senri.hf.decoder import SenriRotaryEmbedding

FAR = 10_000_000


def make(cls, **fields):
    rope = {"rope_type": "default", "rope_theta": 1e5}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=8192, rope_parameters=rope)
    for name, value in fields.items():
        setattr(config, name, value)
    return cls(config=config)


def test_inside_the_training_length_the_bits_are_llamas():
    ours, llamas = make(SenriRotaryEmbedding), make(LlamaRotaryEmbedding)
    positions = torch.stack([torch.arange(8192), torch.arange(8192).flip(0)])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.zeros(1, dtype=dtype)
        for mine, its in zip(ours(x, positions), llamas(x, positions), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, its)


def test_llama3_scaling_is_llamas_too():
    rope = {
        "rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    ours, llamas = (make(cls, rope_parameters=rope) for cls in (SenriRotaryEmbedding, LlamaRotaryEmbedding))
    positions, x = torch.arange(3000)[None], torch.zeros(1)
    assert torch.equal(ours(x, positions)[0], llamas(x, positions)[0])
    assert not torch.equal(ours(x, positions)[0], make(SenriRotaryEmbedding)(x, positions)[0])


def test_far_phases_are_exact():
    rotary = make(SenriRotaryEmbedding)
    positions = torch.tensor([[8191, 8192, 100_000, FAR, FAR + 1, 2**31]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), positions)
    angles = positions[0, :, None].double() * rotary.inv_freq.double()
    exact = torch.cat([angles, angles], -1)
    assert (cos[0, 1:] - exact.cos()[1:]).abs().max() < 1e-6
    assert (sin[0, 1:] - exact.sin()[1:]).abs().max() < 1e-6
    llama = make(LlamaRotaryEmbedding)(torch.zeros(1, dtype=torch.float64), positions)[0]
    assert (llama[0, 3:] - exact.cos()[3:]).abs().max() > 0.1, "plain float32 would have done"


def test_conversion_to_bfloat16_keeps_the_frequencies():
    rotary = make(SenriRotaryEmbedding)
    before = rotary.inv_freq.clone()
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), rotary).to(torch.bfloat16)
    assert module[0].weight.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, before)
    assert rotary.to("meta").inv_freq.is_meta


@torch.no_grad()
def test_attention_after_ten_million_tokens_is_attention_at_the_start(make_senri, tokens):
    for dtype, tolerance in [(torch.float64, 1e-5), (torch.float32, 1e-3)]:
        model, ids = make_senri(dtype=dtype), tokens(1, 40)
        expected = model(ids).logits
        far = model.model.new_cache()
        far.state = model.model.empty_state(1, dtype)
        far.state = far.state._replace(position=far.state.position + FAR)
        first = model(ids[:, :25], past_key_values=far).logits
        logits = torch.cat([first, model(ids[:, 25:], past_key_values=far).logits], 1)
        assert (logits - expected).abs().max() < tolerance
        assert far.tokens_read == [FAR + 40]
        # what an absolute position would do: the phases do matter to this model
        positions = 2 * torch.arange(40)[None]
        assert (model(ids, position_ids=positions).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_a_sink_read_long_ago_is_as_near_as_ever(make_senri, tokens):
    # with a window of the query alone only the sinks' distance could tell where it stands
    model, ids = make_senri(sliding_window_size=1, num_sink_tokens=2), tokens(1, 40)
    expected = model(ids).logits
    cache = model.model(ids[:, :3]).past_key_values
    cache.state = cache.state._replace(position=cache.state.position + 200_000)
    far = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 10)], 1)
    assert (far - expected[:, 3:10]).abs().max() < 1e-5
    assert (model(ids[:, 10:], past_key_values=cache).logits - expected[:, 10:]).abs().max() < 1e-5
    other = tokens(1, 40, seed=4)
    other[:, 2:] = ids[:, 2:]
    assert (model(other).logits - expected).abs().amax((0, 2))[2:].min() > 1e-3, "the sinks are not seen"


@torch.no_grad()
def test_the_border_of_the_training_length_is_no_border(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 40)  # max_position_embeddings is 256
    cache = model.model.new_cache()
    cache.state = model.model.empty_state(1, torch.float64)
    cache.state = cache.state._replace(position=cache.state.position + 236)
    assert (model(ids, past_key_values=cache).logits - model(ids).logits).abs().max() < 1e-3
