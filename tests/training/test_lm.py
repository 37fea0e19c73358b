"""Training from scratch: the loss is the segments' with the memory carried, and a run goes on bit for bit."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from senri.data.corpus import Document
from senri.data.packing import PackedTexts, token_stream
from senri.data.vocabulary import train_tokenizer
from senri.lm import create_model
from senri.training.interrupt import TrainingStopped
from senri.training.lm import LMSettings, LMTrainer, lm_identity, parameter_groups
from senri.training.log import LOG
from senri.training.settings import TrainingError

SETTINGS = LMSettings(
    epochs=2, batch_size=3, segment_length=8, segments=3, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0,
    warmup_ratio=0.2, bf16=False, save_steps=2, seed=0,
)  # fmt: skip
MODEL = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "num_layers": 2, "segment_size": 8}
VOCABULARY = 520


@pytest.fixture(scope="module")
def data(real_text) -> PackedTexts:
    documents = [Document("Genesis", real_text[:6_000]), Document("Exodus", real_text[300_000:306_000])]
    return PackedTexts(token_stream(documents, train_tokenizer(documents, VOCABULARY)), 24, 10)


def fresh(name: str = "hierarchical", **options):
    torch.manual_seed(0)
    return create_model(name, vocab_size=VOCABULARY, **{**MODEL, **options})


@pytest.fixture
def make(data, tmp_path):
    """``(folder, model, **settings)`` -> a trainer of 8 steps."""

    def trainer(folder: str = "run", model=None, samples=None, **changes) -> LMTrainer:
        model, settings = model or fresh(), replace(SETTINGS, **changes)
        identity = lm_identity(model, settings, {"model": "tiny"})
        return LMTrainer(model, samples or data, settings, tmp_path / folder, identity)

    return trainer


def log_of(trainer: LMTrainer) -> list[dict]:
    entries = [json.loads(line) for line in (trainer.folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second")} for e in entries]


class Killed(Exception):
    """What a test stops a run with."""


def kill_after(trainer: LMTrainer, step: int) -> LMTrainer:
    """Ends without a word after that step, as kill -9 would."""

    def show(entry):
        if entry["step"] == step:
            raise Killed

    trainer.show = show
    return trainer


# loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_segments_with_the_memory_carried(make, data) -> None:
    trainer = make(model=fresh().double())
    ids = torch.stack([torch.from_numpy(data[i]).long() for i in (0, 1)])
    state, nats = None, []
    for start in (0, 8, 16):
        out = trainer.model(ids[:, start : start + 8], state)
        memory = out.state.layers[0]
        state = trainer.model.init_state(2)._replace(layers=(memory, None))
        logp = out.logits.log_softmax(-1)
        nats.append(-logp.gather(-1, ids[:, start + 1 : start + 9, None])[..., 0])
    torch.testing.assert_close(trainer.loss(ids, [0, 1]).double(), torch.cat(nats, 1).mean(), rtol=1e-6, atol=0)
    whole = F.cross_entropy(trainer.model(ids[:, :-1]).logits.mT, ids[:, 1:])
    assert abs(whole.item() - trainer.loss(ids, [0, 1]).item()) > 1e-6  # softmax attention ends with the segment


def test_it_learns(make) -> None:
    trainer = make(epochs=6)
    trainer.train()
    losses = [entry["loss"] for entry in log_of(trainer)]
    assert len(losses) == 24
    assert losses[0] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.1)
    assert sum(losses[-4:]) / 4 < losses[0] - 0.5
    assert not trainer.model.training
    weights = load_file(trainer.folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_every_sample_comes_once_an_epoch(make, data) -> None:
    trainer, seen = make(), []
    loss = trainer.loss
    trainer.loss = lambda ids, indices: seen.append(indices) or loss(ids, indices)
    trainer.train()
    assert [len(step) for step in seen] == [3, 3, 3, 1] * 2
    epochs = [[i for step in part for i in step] for part in (seen[:4], seen[4:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_half_precision_keeps_weights_and_state(make) -> None:
    trainer = make(bf16=True)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert log_of(trainer)[-1]["loss"] < log_of(trainer)[0]["loss"]


def test_matrices_decay_and_gates_do_not() -> None:
    model = fresh()
    groups = {g["name"]: g for g in parameter_groups(dict(model.named_parameters()), SETTINGS)}
    assert groups["matrices"]["weight_decay"] == 0.1
    assert groups["vectors"]["weight_decay"] == 0.0
    matrices = {id(p) for p in groups["matrices"]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in matrices) == (parameter.dim() == 2 and "expand_gate" not in name), name
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


# going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 5])
def test_a_killed_run_goes_on_bit_for_bit(make, step) -> None:
    whole = make("whole")
    whole.train()
    with pytest.raises(Killed):
        kill_after(make("killed"), step).train()
    again = make("killed")
    again.train()
    assert log_of(again) == log_of(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    finished = make("killed")
    finished.train()  # nothing is left to do
    assert log_of(finished) == log_of(whole)
    assert torch.equal(finished.model.lm_head.weight, whole.model.lm_head.weight)


def test_ctrl_c_keeps_every_step(make) -> None:
    trainer = make()
    trainer.show = lambda entry: os.kill(os.getpid(), signal.SIGINT) if entry["step"] == 3 else None
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    assert caught.value.step in (3, 4)  # the signal may come a moment later
    again = make()
    again.train()
    whole = make("whole")
    whole.train()
    assert log_of(again) == log_of(whole)


def test_a_folder_takes_no_other_run(make) -> None:
    make().train()
    with pytest.raises(TrainingError, match=r"other settings \(settings.learning_rate\)"):
        make(learning_rate=1e-3).train()
    with pytest.raises(TrainingError, match=r"other settings \(numbers.layers\)"):
        make(model=fresh("infini")).train()


# what cannot work -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_text(make) -> None:
    trainer = make()
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is (nan|inf) at sample \d+ \((Genesis|Exodus)\)"):
        trainer.train()


def test_samples_of_another_length_are_refused(make) -> None:
    with pytest.raises(ValueError, match="samples have 24 tokens, the settings say 16"):
        make(segments=2)
