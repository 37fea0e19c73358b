"""Invariant 5: a converted model is the base inside the window, the base under a sliding-window mask beyond it.

With sinks: the base whose every query also attends to the text's first tokens, at a constant distance.
"""

import copy
from functools import partial

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from senri.data import iter_bible, iter_pieces, iter_tokens
from senri.hf.convert import convert_to_senri

from ..conftest import STORES

READOUTS = [
    {"memory_readout": "layer"},
    {"memory_readout": "head"},
    {"memory_readout": "head", "write_gate": "surprise", "update_rule": "delta_token", "memory_conv_size": 3},
    {"memory_readout": "layer", "write_gate": "surprise", "update_rule": "gated_delta"},
]
READOUTS += [{"memory_readout": readout} | store for store in STORES for readout in ("layer", "head")]
INFINI = {"memory_gate": "infini", "memory_num_heads": 4, "memory_head_dim": 8}


def window_mask(steps: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive ``[1, 1, T, T]``: query t sees (t - W, t]."""
    distance = torch.arange(steps)[:, None] - torch.arange(steps)[None]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(steps, steps, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def window_and_sinks(base, window, num_sinks):
    """A copy of ``base`` whose attention sees (t - W, t] and the sinks behind it, one query after another."""
    base = copy.deepcopy(base)

    def rotated_by(x, distance):
        return apply_rotary_pos_emb(x, x, *base.model.rotary_emb(x, torch.tensor([[distance]])))[0]

    def forward(attn, hidden_states, position_embeddings, **_):
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        raw_q, raw_k, v = (p(hidden_states).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(raw_q, raw_k, *position_embeddings)
        groups = q.shape[1] // k.shape[1]
        raw_k, k, v = (x.repeat_interleave(groups, 1) for x in (raw_k, k, v))
        sinks = [rotated_by(raw_k[:, :, i : i + 1], -(window + num_sinks - 1 - i)) for i in range(num_sinks)]
        outputs = []
        for t in range(q.shape[2]):
            part, behind = slice(max(0, t - window + 1), t + 1), [i for i in range(num_sinks) if t - i >= window]
            scores = [q[:, :, t : t + 1] @ k[:, :, part].mT]
            scores += [rotated_by(raw_q[:, :, t : t + 1], 0) @ sinks[i].mT for i in behind]
            weights = (torch.cat(scores, -1) * attn.scaling).softmax(-1)
            outputs.append(weights @ torch.cat([v[:, :, part], *(v[:, :, i : i + 1] for i in behind)], 2))
        return attn.o_proj(torch.cat(outputs, 2).transpose(1, 2).flatten(2)), None

    for layer in base.model.layers:
        layer.self_attn.forward = partial(forward, layer.self_attn)
    return base


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [*READOUTS, INFINI], ids=str)
@torch.no_grad()
def test_inside_the_window_the_bits_are_the_bases(make_base, make_senri, tokens, family, dtype, options):
    base = make_base(family, dtype)
    model = make_senri(family, dtype, random=False, sliding_window_size=16, **options)
    ids = tokens(2, 16)
    assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", READOUTS, ids=str)
@torch.no_grad()
def test_beyond_the_window_it_is_the_base_under_a_window_mask(make_base, make_senri, tokens, family, options):
    base, model = make_base(family), make_senri(family, random=False, num_sink_tokens=0, **options)
    ids = tokens(2, 40)
    expected = base(ids, attention_mask=window_mask(40, 7, torch.float64)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)
    full = base(ids).logits
    assert (full - expected)[:, 7:].abs().max() > 0.1, "the mask changes nothing: this test would show nothing"


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("num_sinks", [0, 1, 2, 9])
@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("qwen2", {}), ("llama", {"rope_parameters": YARN})], ids=str
)
@torch.no_grad()
def test_beyond_the_window_the_sinks_stand_right_behind_it(make_base, tokens, family, fields, num_sinks):
    base = make_base(family, **fields)
    options = {"sliding_window_size": 7, "num_memory_layers": 1, "first_memory_layer": 1, "memory_head_dim": 8}
    model = convert_to_senri(base, num_sink_tokens=num_sinks, **options)
    ids = tokens(2, 40)
    expected = window_and_sinks(base, 7, num_sinks)(ids).logits
    tolerance = 1e-5 if fields else 1e-10  # YaRN's factor is multiplied in float32 there
    torch.testing.assert_close(model(ids).logits, expected, rtol=tolerance, atol=tolerance)
    masked = base(ids, attention_mask=window_mask(40, 7, torch.float64)).logits
    torch.testing.assert_close(masked[:, :7], expected[:, :7], rtol=1e-10, atol=1e-10)
    if num_sinks:
        assert (masked - expected).abs().amax((0, 2))[7:].min() > 1e-3, "the sink is not seen"
    else:
        torch.testing.assert_close(masked, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [*READOUTS, INFINI], ids=str)
@torch.no_grad()
def test_an_empty_memory_changes_nothing_whatever_its_weights(make_base, make_senri, tokens, options):
    base, model = make_base(), make_senri(random=True, num_sink_tokens=0, **options)
    ids = tokens(2, 30)
    assert torch.equal(model(ids[:, :7]).logits, base(ids[:, :7]).logits)
    expected = base(ids, attention_mask=window_mask(30, 7, torch.float64)).logits
    difference = (model(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-10
    assert (difference[7:] > 1e-3).all(), "from the first evicted token on the memory speaks"


@torch.no_grad()
def test_an_infini_gate_dilutes_the_attention_only_once_something_was_written(make_base, make_senri, tokens):
    base, model = make_base(), make_senri(random=False, num_sink_tokens=0, **INFINI)
    ids = tokens(1, 20)
    expected = base(ids, attention_mask=window_mask(20, 7, torch.float64)).logits
    difference = (model(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-10
    assert difference[7] > 1e-6


@torch.no_grad()
def test_bfloat16_keeps_the_bases_bits_and_exact_positions(make_base, make_senri, tokens, tmp_path):
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path)
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = convert_to_senri(base, sliding_window_size=64)
    assert model.dtype == torch.bfloat16
    ids = tokens(2, 60)
    with torch.enable_grad():  # without gradients other kernels run: tests/hf/test_fused_layer.py
        assert torch.equal(model(ids).logits, base(ids).logits)
    expected = copy.deepcopy(base).double()(ids).logits
    errors = [(logits.double() - expected).norm() for logits in (model(ids).logits, base(ids).logits)]
    assert 0 < errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("options", [{"memory_readout": "layer"}, {"memory_readout": "head"}], ids=str)
@torch.no_grad()
def test_real_weights(make_real, real_base, real_ids, options):
    model = make_real(sliding_window_size=64, num_sink_tokens=0, **options)
    ids = real_ids(3000, 150)
    assert ids.shape == (1, 150)
    assert torch.equal(model(ids[:, :64]).logits, real_base(ids[:, :64]).logits)
    expected = real_base(ids, attention_mask=window_mask(150, 64, torch.float32)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=5e-4)
    assert (real_base(ids).logits - expected)[:, 64:].abs().max() > 0.5


@torch.no_grad()
def test_real_weights_with_a_random_branch_and_an_empty_memory(make_real, real_base, real_ids):
    model = make_real(random=True, memory_readout="layer", memory_num_heads=1, memory_head_dim=64)
    ids = real_ids(50_000, 40)
    logits, expected = model(ids).logits, real_base(ids).logits
    torch.testing.assert_close(logits[:, :32], expected[:, :32], rtol=1e-4, atol=5e-4)
    assert (logits[:, 32:] - expected[:, 32:]).abs().max() > 0.5


@torch.no_grad()
def test_real_weights_with_a_sink(make_real, real_base, real_ids):
    model, ids = make_real(sliding_window_size=64), real_ids(3000, 150)
    assert torch.equal(model(ids[:, :64]).logits, real_base(ids[:, :64]).logits)
    expected = window_and_sinks(real_base, 64, 1)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-3)


@torch.no_grad()
def test_autocast_keeps_the_sinks(make_senri, tokens):
    model, ids = make_senri(dtype=torch.float32), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        halved = model(ids).logits
    assert (halved - model(ids).logits).abs().max() < 0.5
    assert (halved - make_senri(dtype=torch.float32, num_sink_tokens=0)(ids).logits)[:, 7:].abs().max() > 1


@pytest.mark.slow
@torch.no_grad()
def test_one_sink_heals_the_window(make_real, real_base, real_tokenizer):
    """Real text beyond W = 1024: as good as full attention, where the plain window is far worse."""
    ids = torch.tensor([next(iter_pieces(iter_tokens(iter_bible(), real_tokenizer), 3072))])

    def nll(model):
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, 1535:-1]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[0, 1536:]).item()

    full = nll(real_base)
    plain, sink = (nll(make_real(sliding_window_size=1024, num_sink_tokens=n)) for n in (0, 1))
    print(f"full attention {full:.3f}, window {plain:.3f}, window + 1 sink {sink:.3f}")
    assert abs(sink - full) < 0.05
    assert plain - sink > 0.2
