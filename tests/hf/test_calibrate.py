"""Calibration: keys that are near-orthogonal, a read gate that helps, and a base that stays what it was."""

import pytest
import torch
import torch.nn.functional as F

import senri.hf.calibrate as calibration
from senri.hf.calibrate import HEIGHT, RIDGE, calibrate, set_values
from senri.hf.convert import convert_to_senri
from senri.layers.memory_attention import STRAY

HEAD = {"memory_readout": "head", "update_rule": "delta_token", "memory_conv_size": 2, "num_memory_layers": 1}
SLOT = {**HEAD, "update_rule": "slot", "write_gate": "hidden", "memory_conv_size": 0, "memory_context_size": 4}
SHARED = {"memory_readout": "head", "memory_context_size": 4, "memory_sharing": True, "update_rule": "delta_token"}
TEXT, REPEAT = 640, 40


def text(tokens, length=TEXT):
    """Ids with a grammar: half of the tokens follow from the one before."""
    ids = tokens(1, length, seed=5)[0]
    follows = tokens(1, 97, seed=6)[0]
    for i in range(1, length, 2):
        ids[i] = follows[ids[i - 1]]
    return ids


def layer_inputs(model, ids):
    seen = {}
    hooks = [
        model.model.layers[i].input_layernorm.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[0]}))
        for i in model.config.memory_layers
    ]
    with torch.no_grad():
        model.model(ids[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    "options", [{}, HEAD, SLOT, {"memory_gate": "infini", "memory_num_key_value_heads": 4, "num_memory_layers": 1}]
)
@torch.no_grad()
def test_keys_are_centred_and_white(make_senri, tokens, options):
    model, ids = make_senri(random=False, **options), text(tokens)
    report = calibrate(model, ids, repeat_tokens=REPEAT)
    assert report.tokens == TEXT - REPEAT
    seen = layer_inputs(model, ids[:-REPEAT])
    assert seen.keys() == set(model.config.memory_layers)
    for index, hidden in seen.items():
        memory = model.model.memories[index]
        keys, queries = memory.k_proj(hidden), memory.q_proj(hidden)
        torch.testing.assert_close(keys.mean(0), torch.zeros_like(keys[0]), rtol=0, atol=1e-9)
        covariance = keys.T @ keys / len(keys)
        # every direction has its variance divided by itself plus the ridge
        variance = torch.linalg.eigvalsh(torch.cov(hidden.T, correction=0))
        shrunk = (variance / (variance + RIDGE * variance.mean())).flip(0)[: len(covariance)]
        torch.testing.assert_close(covariance.diagonal().sort(descending=True)[0], shrunk, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(covariance, torch.eye(len(covariance)).double(), rtol=0, atol=0.1)
        torch.testing.assert_close(covariance - covariance.diagonal().diag(), 0 * covariance, rtol=0, atol=1e-6)
        # equal states match: each query head asks with its memory's keys
        kv, heads = memory.num_key_value_heads, memory.num_heads
        per_head = keys.unflatten(-1, (kv, -1)).repeat_interleave(heads // kv, dim=1)
        torch.testing.assert_close(queries.unflatten(-1, (heads, -1)), per_head, rtol=0, atol=1e-9)
        raw = hidden @ torch.linalg.qr(torch.randn(32, 16).double())[0]
        assert torch.cov(raw.T).sub(torch.eye(16)).abs().max() > 0.3, "white to begin with: this shows nothing"


WHOLE = {"memory_num_heads": 1, "memory_num_key_value_heads": 1, "memory_head_dim": 32}  # as wide as the model
GROUPED = {"memory_num_heads": 4, "memory_num_key_value_heads": 2, "memory_head_dim": 16}


@pytest.mark.parametrize("rule", [HEAD, SLOT], ids=["delta_token", "slot"])
@pytest.mark.parametrize(
    "heads",
    [WHOLE, GROUPED, {**WHOLE, "memory_sharing": True, "num_memory_layers": 2}],
    ids=["one head", "grouped queries", "shared"],
)
@torch.no_grad()
def test_every_token_comes_out_of_the_head_readout_as_itself(make_senri, tokens, rule, heads):
    model, ids = make_senri(random=False, **{**rule, **heads}), text(tokens)
    table = model.model.embed_tokens.weight
    table.copy_(table * torch.logspace(0, 2, 32) + 0.5)  # far from round, and not about 0
    table[:8] *= 3  # tokens that stand apart
    calibrate(model, ids, repeat_tokens=REPEAT)
    first = next(iter(model.model.memories.values()))
    values = first.v_proj(table)
    torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-9)
    by_head = values.unflatten(-1, (first.num_key_value_heads, -1))
    # a read that is perfect is a value of length 1; under the gate of other rules than slot each head's is
    own = values.norm(dim=-1) if rule == SLOT else by_head.norm(dim=-1).sum(-1)
    found = first.embedded(torch.arange(len(table)), table).unflatten(-1, by_head.shape[1:])
    for memory in model.model.memories.values():
        read = found.repeat_interleave(memory.num_heads // memory.num_key_value_heads, -2)
        memory.read_gate.scale.fill_(1.0)
        if rule == HEAD:
            read = torch.stack([read, *[torch.zeros_like(read)] * STRAY], -2).flatten(-3, -2)
            memory.read_gate.proj.bias.fill_(50.0)  # open
        logits = model.lm_head(memory.read_out(torch.zeros(1, len(table), 32).double(), read[None]))[0]
        logits = logits - logits.mean(-1, keepdim=True)
        assert (logits.argmax(-1) == torch.arange(len(table))).all()
        torch.testing.assert_close(logits.diagonal(), HEIGHT * own / own.mean(), rtol=0.02, atol=0)
    unlike = F.normalize(table - table.mean(0), dim=-1) @ table.T
    assert (unlike.argmax(-1) != torch.arange(len(table))).float().mean() > 0.2, "round enough: this shows nothing"


@torch.no_grad()
def test_narrow_memories_keep_the_directions_of_most_variance(make_senri, tokens):
    model = make_senri(random=False, **{**SLOT, **WHOLE, "memory_head_dim": 8})
    table = model.model.embed_tokens.weight
    table.copy_(table * torch.logspace(0, 2, 32))  # the last columns most
    calibrate(model, text(tokens), repeat_tokens=REPEAT)
    weight = model.model.memories[1].v_proj.weight
    values = table @ weight.T
    torch.testing.assert_close(torch.cov(values.T, correction=0), torch.eye(8).double(), rtol=0, atol=0.05)
    assert (weight[:, -8:] * table[:, -8:].std(0)).norm() > 0.9 * (weight * table.std(0)).norm()


def test_the_vocabulary_is_gone_through_in_blocks(make_senri, monkeypatch):
    models = [make_senri(random=False, **{**SLOT, **GROUPED}) for _ in range(2)]
    for model, block in zip(models, (10_000, 7), strict=True):
        monkeypatch.setattr(calibration, "BLOCK", block)
        set_values(model)
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        if name.endswith("proj.weight") and ".memory." in name:
            torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-6, atol=1e-9)  # a direction may turn round


@pytest.mark.parametrize("options", [{}, HEAD])
@torch.no_grad()
def test_inside_the_window_the_base_is_unchanged(make_base, make_senri, tokens, options):
    base, model, ids = make_base(), make_senri(random=False, **options), text(tokens)
    calibrate(model, ids, repeat_tokens=REPEAT)
    inside = ids[None, :7]
    assert torch.equal(model(inside).logits, base(inside).logits)
    past = ids[None, :60]
    if options == HEAD:  # on a random model any gate may predict best, none too
        next(iter(model.model.memories.values())).read_gate.scale.data.fill_(1.0)
    silent = convert_to_senri(base, sliding_window_size=7, num_memory_layers=0)
    differs = (model(past).logits - silent(past).logits).abs().max() > 1e-3
    assert differs == (options == HEAD), "the head read-out speaks from now on, the layer's needs training"


@pytest.mark.parametrize("rule", [HEAD, SLOT], ids=["delta_token", "slot"])
@torch.no_grad()
def test_the_read_gate_is_the_one_that_predicts_best(make_senri, tokens, rule):
    model, ids = make_senri(random=False, **{**rule, "num_memory_layers": 2, "memory_head_dim": 16}), text(tokens)
    report = calibrate(model, ids, repeat_tokens=REPEAT)
    twice = torch.cat([ids[-REPEAT:]] * 2)

    def loss(gates):
        for index, gate in gates.items():
            model.model.memories[index].read_gate.scale.fill_(gate)
        return F.cross_entropy(model(twice[None]).logits[0, :-1], twice[1:]).item()

    scales = {i: memory.read_gate.scale[0].item() for i, memory in model.model.memories.items()}
    assert scales == pytest.approx(report.read_gate)
    assert loss(report.read_gate) == pytest.approx(report.loss_with, rel=1e-6)
    assert loss(dict.fromkeys(report.read_gate, 0.0)) == pytest.approx(report.loss_without, rel=1e-6)
    assert report.loss_with < report.loss_without - 0.05
    # no better neighbour for the layer that was chosen last, given the others
    last = max(report.read_gate)
    for factor in (0.0, 0.5, 2.0):
        assert (
            loss({**report.read_gate, last: factor * report.read_gate[last] + 0.01 * factor}) >= report.loss_with - 1e-9
        )


@torch.no_grad()
def test_the_layer_readout_stays_silent(make_senri, tokens):
    model, ids = make_senri(random=False), text(tokens)
    report = calibrate(model, ids, repeat_tokens=REPEAT)
    assert report.read_gate == {}
    assert report.loss_with != report.loss_with  # nan: nothing was chosen
    assert all(not memory.o_proj.weight.any() for memory in model.model.memories.values())


def test_texts_in_every_form(make_senri, tokens):
    ids = text(tokens)
    words = " ".join(map(str, ids.tolist()))

    def tokenizer(block, add_special_tokens, verbose):
        return {"input_ids": [int(word) for word in block.split()]}

    expected = None
    for source, reader in [
        (ids, None),
        (ids.tolist(), None),
        (words, tokenizer),
        ([words[:900], words[900:]], tokenizer),
        (iter([words]), tokenizer),
    ]:
        model = make_senri(random=False, **HEAD).train()
        report = calibrate(model, source, reader, repeat_tokens=REPEAT)
        assert model.training, "it leaves the mode as it was"
        weights = {name: p.clone() for name, p in model.named_parameters()}
        expected = expected or (report, weights)
        assert report == expected[0]
        assert all(torch.equal(p, expected[1][name]) for name, p in weights.items())
    base = {n for n, p in make_senri(random=False, **HEAD).named_parameters() if not torch.equal(p, expected[1][n])}
    assert base
    assert all(".memory." in name for name in base), "only the memory is set"


def test_num_tokens_bounds_what_is_used(make_senri, tokens):
    model = make_senri(random=False, **HEAD)
    report = calibrate(model, text(tokens), num_tokens=300, repeat_tokens=REPEAT)
    assert report.tokens == 300


def test_what_cannot_be_calibrated(make_senri, tokens):
    ids = text(tokens)
    with pytest.raises(ValueError, match="calibration needs at least 128 tokens of text, not 127"):
        calibrate(make_senri(random=False), ids[:127])
    with pytest.raises(ValueError, match="num_memory_layers is 0: there is no memory to calibrate"):
        calibrate(make_senri(random=False, num_memory_layers=0), ids)
    with pytest.raises(ValueError, match="memory heads of 40 together are wider than the hidden size 32"):
        calibrate(make_senri(random=False, memory_num_key_value_heads=1, memory_num_heads=1, memory_head_dim=40), ids)
    with pytest.raises(ValueError, match=r"needs its tokenizer: calibrate\(model, texts, tokenizer\)"):
        calibrate(make_senri(random=False), "In the beginning")
    with pytest.raises(ValueError, match="calibration needs at least 128 tokens of text, not 0"):
        calibrate(make_senri(random=False), [], lambda *a, **k: {"input_ids": []})


@pytest.mark.slow
@torch.no_grad()
def test_on_the_real_model_a_passage_that_comes_again_is_recalled(make_real, real_ids):
    options = {"memory_num_heads": 1, "memory_head_dim": 576, "num_memory_layers": 1, "first_memory_layer": 10}
    model = make_real(**{**HEAD, **options})
    report = calibrate(model, real_ids(0, 4096 + 544)[0], num_tokens=4096, repeat_tokens=544)
    assert report.loss_with < report.loss_without - 0.2
    passage = real_ids(3_000_000, 256)
    twice = torch.cat([passage, real_ids(2_000_000, 256), passage], dim=1)

    def hits():
        logits = model(twice).logits[0, -256 + 16 - 1 : -1]
        return (logits.argmax(-1) == passage[0, 16:]).float().mean().item()

    with_memory = hits()
    model.model.memories[10].read_gate.scale.zero_()
    silent = hits()
    assert with_memory > silent + 0.1, (with_memory, silent)


@torch.no_grad()
def test_a_layer_that_reads_another_ones_memory_asks_for_its_keys(make_senri, tokens):
    model, ids = make_senri(random=False, **SHARED), text(tokens)
    report = calibrate(model, ids, repeat_tokens=REPEAT)
    assert report.read_gate.keys() == {1, 2}
    (_, theirs), (_, mine) = sorted(layer_inputs(model, ids[:-REPEAT]).items())
    writer, reader = model.model.memories.values()
    wanted, found = writer.q_proj(theirs), reader.q_proj(mine)
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0, atol=1e-9)
    left = (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    # no other linear map of the layer's inputs comes nearer
    inputs = torch.cat([mine, torch.ones_like(mine[:, :1])], 1)
    best = torch.linalg.lstsq(inputs, wanted).solution
    least = (inputs @ best - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert least <= left < 1.01 * least + 1e-3 < 0.9
