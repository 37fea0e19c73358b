"""Backpropagation through pieces: exact when not cut, cut where asked, and blind to padding."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from senri.data.training_sample import TrainingSample
from senri.training.batch import collate
from senri.training.bptt import Totals, backward
from senri.training.optim import choose_trainable
from senri.training.settings import TrainingError

from ..conftest import STORES
from .conftest import SETTINGS

CASES = [
    {"memory_readout": "head", "write_gate": "surprise", "update_rule": "delta_token", "memory_conv_size": 2},
    {"memory_readout": "layer", "write_gate": "surprise", "update_rule": "gated_delta"},
    {"memory_readout": "layer", "write_gate": "hidden", "update_rule": "linear"},
    {"memory_readout": "layer", "write_gate": "hidden", "memory_conv_size": 2} | STORES[1],
    {"memory_readout": "head", "write_gate": "hidden", "memory_context_size": 3} | STORES[3],
    {"memory_readout": "head", "write_gate": "hidden", "memory_context_size": 3} | STORES[4],
]
WHOLE = replace(SETTINGS, piece_length=1000, trainable="all")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=CASES, ids=lambda options: "-".join(map(str, options.values())))
def model(make_senri, request):
    model = make_senri(**request.param).train()
    choose_trainable(model, "all", 0)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model, samples, settings=WHOLE, indices=None, totals=None, teacher=None):
    """Gradients and sums of one batch."""
    model.zero_grad()
    batch = collate(samples, indices or range(len(samples)))
    sums = backward(model, batch, totals or Totals.of([batch], teacher), settings, teacher)
    return gradients(model), sums


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **(tolerance or EXACT), msg=lambda m, n=name: f"{n} {m}"
        )


def test_one_piece_is_the_plain_loss(model, verses):
    sample = verses[1]
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
    found, sums = run(model, [sample], replace(WHOLE, write_loss_weight=0.0))
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])  # labels= would round to float32
    loss.backward()
    assert sums["nll/text"] / sums["weight/text"] == pytest.approx(loss.item(), rel=1e-12)
    assert_same(found, gradients(model))


@pytest.mark.parametrize("piece_length", [5, 8, 15])
def test_pieces_give_the_loss_and_gradient_of_the_whole(model, verses, piece_length):
    samples = [verses[i] for i in (0, 1)]
    expected, sums = run(model, samples)
    found, pieces = run(model, samples, replace(WHOLE, piece_length=piece_length))
    assert pieces == pytest.approx(sums, rel=1e-9)
    assert_same(found, expected, rtol=1e-7, atol=1e-10)


def test_checkpointing_gives_the_same_gradient(model, verses):
    settings = replace(WHOLE, piece_length=8)
    expected, sums = run(model, [verses[0], verses[1]], settings)
    model.model.gradient_checkpointing = True
    found, checkpointed = run(model, [verses[0], verses[1]], settings)
    assert checkpointed == pytest.approx(sums, rel=1e-12)
    assert_same(found, expected, rtol=1e-9, atol=1e-11)


def test_cut_pieces_have_the_same_loss_but_carry_no_gradient(model, verses):
    settings = replace(WHOLE, piece_length=8)
    expected, sums = run(model, [verses[1]], settings)
    found, cut = run(model, [verses[1]], replace(settings, bptt_pieces=1))
    assert cut == pytest.approx(sums, rel=1e-9)
    key = f"model.layers.{model.config.memory_layers[0]}.memory.k_proj.weight"
    assert not torch.allclose(found[key], expected[key], rtol=1e-3)
    never = run(model, [verses[1]], replace(settings, bptt_pieces=4))[0]  # 30 tokens are 4 pieces
    assert_same(never, expected)


def test_a_cut_comes_after_as_many_pieces_as_asked(model, verses, monkeypatch):
    from senri.hf.cache import SenriCache

    cuts = []
    whole = SenriCache.detach
    monkeypatch.setattr(SenriCache, "detach", lambda self: cuts.append(self.columns) or whole(self))
    run(model, [verses[1]], replace(WHOLE, piece_length=5, bptt_pieces=2, write_loss_weight=0.0))
    assert cuts == [10, 20, 30]


def test_padding_changes_nothing(model, verses):
    """A sample beside a much longer one: the padded columns of its row fill more than a window."""
    short, long = verses.at_length(20)[0], verses.at_length(60)[1]
    settings = replace(WHOLE, piece_length=8)
    batches = [collate([short], [0]), collate([long], [1])]
    totals = Totals.of(batches, None)
    alone = [run(model, [sample], settings, totals=totals) for sample in (short, long)]
    found, sums = run(model, [short, long], settings)
    assert len(short.ids) + model.config.sliding_window_size < len(long.ids) - 8
    expected = {n: alone[0][0][n] + alone[1][0][n] for n in found}
    assert_same(found, expected, rtol=1e-8, atol=1e-11)
    for name in ("nll/recall", "nll/text", "weight/recall", "read", "tokens/read"):
        if name in sums:
            assert sums[name] == pytest.approx(alone[0][1][name] + alone[1][1][name], rel=1e-6), name


def test_weights_of_tokens(model, verses):
    """Only tokens with a weight count, and by it; the first one has nothing before it."""
    sample = verses[1]
    weight = np.zeros_like(sample.weight)
    weight[[0, 12, 20]] = 7.0, 2.0, 0.5
    found, sums = run(model, [replace(sample, weight=weight)], replace(WHOLE, piece_length=6))
    assert sums["weight/text"] == 2.5
    model.zero_grad()
    logits = model(torch.from_numpy(sample.ids.astype(np.int64))[None]).logits[0]
    nll = [torch.nn.functional.cross_entropy(logits[t - 1], torch.tensor(int(sample.ids[t]))) for t in (12, 20)]
    ((2.0 * nll[0] + 0.5 * nll[1]) / 2.5).backward()
    assert sums["nll/text"] == pytest.approx((2.0 * nll[0] + 0.5 * nll[1]).item())
    assert_same(found, gradients(model), rtol=1e-7, atol=1e-10)


def test_a_loss_that_is_not_finite_names_its_sample(model, verses):
    nan = torch.tensor([[[1.0]], [[float("nan")]]])
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * nan)
    with pytest.raises(TrainingError, match=r"^the loss is nan at sample 8 \(text, from verse 2\): lower"):
        run(model, [verses[1], verses[2]], indices=[7, 8])


def test_distillation_pulls_towards_the_teacher_and_only_where_it_can_read(make_senri, make_base, verses):
    model = make_senri(memory_readout="head").train()
    choose_trainable(model, "all", 0)
    teacher = make_base(seed=5)
    settings = replace(WHOLE, piece_length=8, distillation_weight=1.0, write_loss_weight=0.0)
    short, long = verses.at_length(31)[3], verses[1]
    _, sums = run(model, [short, long], settings, teacher=teacher)
    ids = torch.from_numpy(long.ids.astype(np.int64))[None]
    with torch.no_grad():
        mine, theirs = (m(ids).logits[0, :-1].log_softmax(-1) for m in (model, teacher))
        kl = (theirs.exp() * (theirs - mine)).sum()
        ids = torch.from_numpy(short.ids.astype(np.int64))[None]
        mine, theirs = (m(ids).logits[0, -5:-1].log_softmax(-1) for m in (model, teacher))
        kl_short = (theirs.exp() * (theirs - mine)).sum()
    assert sums["distillation"] == pytest.approx(float(kl + kl_short) / 33, rel=1e-6)
    blind = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=25), model=teacher.model, lm_head=teacher.lm_head
    )
    _, sums = run(model, [short, long], settings, teacher=blind)
    assert sums["distillation"] == pytest.approx(float(kl_short) / 4, rel=1e-6)


def test_frozen_base_builds_no_graph(make_senri, verses):
    """With the read-out at the head and only the memory learning, the trunk is a forward pass."""
    model = make_senri(memory_readout="head", write_gate="surprise").train()
    choose_trainable(model, "memory", 0)
    seen = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output[0].requires_grad))
    run(model, [verses[1]], replace(WHOLE, piece_length=8))
    assert seen == [False] * 4


def test_bfloat16_trains_a_float32_memory(make_senri, verses):
    for trainable in ("memory", "all"):
        for options in CASES:
            model = make_senri(dtype=torch.float32, **options).train()
            choose_trainable(model, trainable, 0)
            expected, _ = run(model, [verses[0], verses[1]], replace(WHOLE, piece_length=8))
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
            found, _ = run(model, [verses[0], verses[1]], replace(WHOLE, piece_length=8, bf16=True))
            assert found.keys() == expected.keys()
            flat = [torch.cat([g[n].flatten() for n in found]) for g in (found, expected)]
            assert all(g.dtype == torch.float32 for g in found.values())
            assert torch.cosine_similarity(*flat, dim=0) > 0.98, (trainable, options)


def test_a_sample_is_what_the_mix_says(verses):
    batch = collate([verses[0], verses[1]], [0, 1])
    assert isinstance(verses[0], TrainingSample)
    assert batch.valid.sum(1).tolist() == [19, 30]
    assert batch.write[0, 19:].unique().tolist() == [-1]
    assert batch.weight[0].nonzero()[:, 0].tolist() == [15, 16, 17, 18]
    assert batch.weight[1, 0] == 0
