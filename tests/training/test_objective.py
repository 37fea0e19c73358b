"""The write gate's loss: each labelled token once, whatever the pieces; and the probe's counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from senri.data.training_sample import TrainingSample
from senri.training.batch import collate
from senri.training.bptt import Totals, backward
from senri.training.objective import token_losses
from senri.training.optim import choose_trainable
from senri.training.probe import answers, probe

from .conftest import SETTINGS, One

ONLY_WRITES = replace(SETTINGS, write_loss_weight=1.0)


@pytest.fixture
def make_gated(make_senri):
    """``(**config)`` -> a tiny model with write gates, of which the memory learns."""

    def make(**config):
        model = make_senri(**{"write_gate": "hidden", "memory_readout": "head", "memory_conv_size": 2} | config).train()
        choose_trainable(model, "memory", 0)
        return model

    return make


def run(model, samples, settings, totals=None):
    model.zero_grad()
    batch = collate(samples, range(len(samples)))
    sums = backward(model, batch, totals or Totals.of([batch], None), settings)
    gates = {n: p.grad.clone() for n, p in model.named_parameters() if "write_gate" in n and p.grad is not None}
    return sums, gates


def unscored(sample):
    return replace(sample, weight=np.zeros_like(sample.weight))


@pytest.mark.parametrize("piece_length", [5, 8, 100])
def test_the_write_loss_is_that_of_every_labelled_token(make_gated, verses, piece_length):
    model, sample = make_gated(), unscored(verses[0])
    assert set(sample.write.tolist()) == {0, 1}
    sums, gates = run(model, [sample], replace(ONLY_WRITES, piece_length=piece_length))
    model.zero_grad()
    inputs = {}
    for i in model.config.memory_layers:
        norm = model.model.layers[i].input_layernorm
        norm.register_forward_hook(lambda module, args, output, i=i: inputs.update({i: output}))
    model(torch.from_numpy(sample.ids.astype(np.int64))[None])
    target = torch.from_numpy(sample.write).double()[None, :, None]
    losses = []
    for i, memory in model.model.memories.items():
        following = F.pad(inputs[i][:, 1:], (0, 0, 0, 1))  # nothing follows the last token
        logits = memory.write_gate(inputs[i], following)
        losses.append(F.binary_cross_entropy_with_logits(logits, target.expand_as(logits)))
    expected = torch.stack(losses).mean()
    assert sums["write_loss"] == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    assert gates
    for name, gradient in gates.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("config", [{}, {"write_gate": "surprise", "memory_readout": "layer"}])
def test_the_write_loss_is_blind_to_padding_cuts_and_checkpointing(make_gated, verses, config):
    model, settings = make_gated(**config), replace(ONLY_WRITES, piece_length=8)
    short, long = unscored(verses.at_length(20)[0]), unscored(verses.at_length(60)[3])
    batches = [collate([s], [0]) for s in (short, long)]
    totals = Totals.of(batches, None)
    alone = [run(model, [s], settings, totals) for s in (short, long)]
    for changes in ({}, {"bptt_pieces": 1}, {"checkpointing": True}):
        model.model.gradient_checkpointing = changes.pop("checkpointing", False)
        sums, gates = run(model, [short, long], replace(settings, **changes))
        assert sums["write_loss"] == pytest.approx(sum(s["write_loss"] for s, _ in alone), rel=1e-6)
        assert sums["tokens/asked"] == 8
        assert sums["tokens/plain"] + 8 == len(short.ids) + len(long.ids)
        if config.get("memory_readout") != "layer" or "bptt_pieces" not in changes:
            for name, gradient in gates.items():
                torch.testing.assert_close(gradient, alone[0][1][name] + alone[1][1][name], rtol=1e-6, atol=1e-9)


def test_without_labels_or_weight_there_is_no_write_loss(make_gated, verses):
    model = make_gated()
    for sample, settings in ((verses[1], ONLY_WRITES), (verses[0], replace(ONLY_WRITES, write_loss_weight=0.0))):
        assert "write_loss" not in run(model, [sample], settings)[0]


def test_the_gate_learns_what_is_asked_for(make_trainer, make_gated, verses):
    trainer = make_trainer(
        model=make_gated(), mix=One(verses[0]), write_loss_weight=1.0, max_steps=30, gate_learning_rate=0.2
    )
    trainer.train()
    before, after = (probe(model, [verses[0]], 8) for model in (make_gated(), trainer.model))
    assert after["write_asked"] - after["write_plain"] > 0.3 + before["write_asked"] - before["write_plain"]


# token losses and probe -------------------------------------------------------------------------------------------


def test_blocks_change_no_loss(make_senri, monkeypatch, tokens):
    import senri.training.objective as objective

    model = make_senri()
    hidden = torch.randn(23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = tokens(1, 23)[0]
    whole, _ = token_losses(model, hidden, target)
    torch.testing.assert_close(whole, F.cross_entropy(model.lm_head(hidden), target, reduction="none"))
    monkeypatch.setattr(objective, "BLOCK", 5)
    torch.testing.assert_close(token_losses(model, hidden, target)[0], whole)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_frozen_head_gives_the_losses_and_gradients_of_one_that_is_trained(make_senri, tokens, distilled):
    model, teacher = make_senri(), make_senri()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    generator = torch.Generator().manual_seed(0)
    values, theirs, scale = (torch.randn(2, 23, 32, dtype=torch.float64, generator=generator) for _ in range(3))
    found = []
    for frozen in (False, True):
        model.lm_head.requires_grad_(not frozen)
        hidden = values[0].clone().requires_grad_()
        taught = (teacher, theirs[0]) if distilled else ()
        losses = token_losses(model, hidden, tokens(1, 23)[0], *taught)
        assert losses[1].any() == distilled
        (losses[0] * scale[0, :, 0] + losses[1] * scale[0, :, 1]).sum().backward()
        found.append((*losses, hidden.grad))
    assert found[0][2].abs().min() > 0
    torch.testing.assert_close(found[0], found[1])
    with torch.no_grad():
        torch.testing.assert_close(token_losses(model, values[0], tokens(1, 23)[0], *taught), found[1][:2])


def test_a_frozen_head_in_bfloat16_is_as_near_to_float64(make_senri, tokens):
    """Where the target is nearly certain, too: the difference to it is taken before anything is rounded."""
    model, target = make_senri().to(torch.bfloat16), tokens(1, 23)[0]
    rows = model.lm_head.weight.detach()[target].double()
    values = (12 * rows / rows.norm(dim=-1, keepdim=True).square()).to(torch.bfloat16)
    gradients = []
    for dtype, frozen in ((torch.float64, True), (torch.bfloat16, False), (torch.bfloat16, True)):
        model.to(dtype).lm_head.requires_grad_(not frozen)
        hidden = values.to(dtype, copy=True).requires_grad_()
        losses, _ = token_losses(model, hidden, target)
        losses.sum().backward()
        gradients.append(hidden.grad.double())
    assert losses.median() < 0.01
    there, here = ((gradient - gradients[0]).norm() / gradients[0].norm() for gradient in gradients[1:])
    assert here < 1.2 * there < 0.1


def sample_of(weight, write):
    ids = np.arange(3, 3 + len(weight), dtype=np.int32)
    return TrainingSample(ids, np.array(weight, np.float32), np.array(write, np.int8), "task", "source")


def test_answers_are_the_heaviest_stretches_of_samples_that_ask():
    assert answers(sample_of([1, 1, 1, 1], [0, 0, -1, 0])) == []
    assert answers(sample_of([9, 0.1, 1, 1, 0.1, 1], [1, 0, 0, 0, 0, -1])) == [(2, 4), (5, 6)]


def test_a_probe_counts_what_is_predicted(make_senri, verses):
    """Against the logits of one plain pass; the memory of a model without one changes nothing."""
    model = make_senri(memory_readout="head", memory_conv_size=2)
    sample = verses[0]
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    with torch.no_grad():
        predicted = model(ids[None]).logits[0].argmax(-1)
    # an answer of two parts: one that is what the model says, one that is not
    weight, write = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8)
    right = [t for t in range(1, len(ids)) if predicted[t - 1] == ids[t]]
    wrong = [t for t in range(1, len(ids)) if predicted[t - 1] != ids[t]]
    weight[wrong[-1]], write[0] = 1, 1
    for t in right:
        weight[t] = 1
    asked = replace(sample, weight=weight, write=write)
    result = probe(model.train(), [asked], 5)
    assert model.training
    assert result["tokens"] == pytest.approx(len(right) / (len(right) + 1))
    assert result["write_plain"] is None
    plain = make_senri(num_memory_layers=0)
    result = probe(plain, [sample], 5)
    assert (result["tokens"], result["answers"]) == (result["tokens_off"], result["answers_off"])


def test_an_emptied_memory_is_no_memory(make_senri, verses):
    """A model that says what its memory says is right with it, and as wrong as without a memory when it is emptied."""
    model, none = make_senri(memory_readout="head"), make_senri(num_memory_layers=0)
    for memory in model.model.memories.values():
        memory.read_gate.proj.bias.data.fill_(5.0)
        memory.read_gate.scale.data.fill_(20.0)
    ids = torch.from_numpy(verses[0].ids.astype(np.int64))
    with torch.no_grad():
        said, alone = (m(ids[None]).logits[0].argmax(-1) for m in (model, none))
    weight, write = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8)
    weight[12:], write[0] = 1, 1
    assert (said != alone)[11:-1].any()
    sample = replace(verses[0], weight=weight, write=write)
    result = probe(model, [sample], 5)
    expected = [(m[11:-1] == ids[12:]).double().mean().item() for m in (said, alone)]
    assert (result["tokens"], result["tokens_off"]) == pytest.approx(expected)
