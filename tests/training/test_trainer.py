"""Whole runs on tiny models: resuming, accumulating, stopping, and what is left at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from senri.hf.adapter import load_adapter, read_adapter_header
from senri.hf.modeling_senri import SenriForCausalLM
from senri.training import checkpoint
from senri.training.interrupt import TrainingStopped
from senri.training.settings import Stage, TrainingError

from .conftest import One

TIMES = ("tokens_per_second",)


def log_of(trainer):
    entries = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMES} for e in entries]


def weights_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


class Dies:
    """A mix whose process is killed while it makes a sample."""

    def __init__(self, mix, index, error):
        self.mix, self.index, self.error = mix, index, error

    def __getitem__(self, index):
        if index == self.index:
            raise self.error
        return self.mix[index]

    def at_length(self, length):
        return Dies(self.mix.at_length(length), self.index, self.error)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": "memory+lora", "options": {"attention_dropout": 0.3}},
        {"trainable": "all", "options": {"write_gate": "surprise"}, "gradient_accumulation_steps": 2},
    ],
    ids=["memory", "lora", "all"],
)
def test_killed_and_resumed_is_bit_for_bit_the_run_in_one_go(make_trainer, verses, changes):
    curriculum = {"curriculum": (Stage(20, 4),), "probed": [verses[300]]}
    straight = make_trainer("straight", **curriculum, **changes)
    straight.train()
    index = 2 * 4 * changes.get("gradient_accumulation_steps", 1)  # of step 5: after the checkpoint of step 3
    killed = make_trainer("killed", mix=Dies(verses, index, Killed()), **curriculum, **changes)
    with pytest.raises(Killed):
        killed.train()
    assert [e["step"] for e in log_of(killed)] == [1, 2, 3, 4]
    with open(killed.folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    resumed = make_trainer("killed", **curriculum, **changes)
    resumed.train()
    assert resumed.step == 6
    assert_equal(weights_of(resumed), weights_of(straight))
    assert log_of(resumed) == log_of(straight)
    assert [e["max_length"] for e in log_of(straight)] == [20] * 4 + [30] * 2
    assert ["probe" in e for e in log_of(straight)] == [False, False, True] * 2


def test_training_learns(make_trainer, verses):
    trainer = make_trainer(max_steps=12, mix=One(verses[1]), gate_learning_rate=0.4)
    trainer.train()
    losses = [e["loss"] for e in log_of(trainer)]
    assert losses[-1] < losses[0] - 0.3


def test_ctrl_c_ends_after_the_step_and_the_same_command_goes_on(make_trainer, verses):
    class Interrupts(Dies):
        def __getitem__(self, index):
            if index == self.index:
                os.kill(os.getpid(), signal.SIGINT)
            return self.mix[index]

        def at_length(self, length):
            return Interrupts(self.mix.at_length(length), self.index, None)

    straight = make_trainer("straight")
    straight.train()
    said = []
    stopped = make_trainer("stopped", mix=Interrupts(verses, 8, None), say=said.append)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingStopped) as caught:
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.step == 5
    assert any("stopping after this step" in line for line in said)
    resumed = make_trainer("stopped")
    resumed.train()
    assert_equal(weights_of(resumed), weights_of(straight))


def test_accumulating_is_a_bigger_batch(make_trainer):
    big, small = make_trainer("big", batch_size=6), make_trainer("small", batch_size=2, gradient_accumulation_steps=3)
    for trainer in (big, small):
        trainer.train()
    for name, weight in weights_of(big).items():
        torch.testing.assert_close(weights_of(small)[name], weight, rtol=1e-7, atol=1e-9)
    for a, b in zip(log_of(big), log_of(small), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-7)


def test_only_the_last_two_checkpoints_are_kept(make_trainer):
    trainer = make_trainer(save_steps=1)
    trainer.train()
    assert [p.name for p in checkpoint.checkpoints(trainer.folder)] == ["checkpoint-00000005", "checkpoint-00000006"]


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(make_trainer, verses):
    class Bad(Dies):
        def __getitem__(self, index):
            sample = self.mix[index]
            if index == self.index:
                trainer.model.model.norm.weight.data.fill_(float("nan"))
            return sample

        def at_length(self, length):
            return Bad(self.mix.at_length(length), self.index, None)

    trainer = make_trainer(mix=Bad(verses, 9, None))
    with pytest.raises(TrainingError, match=r"^step 5: the loss is nan at sample 8 \(text, from verse 8\): lower"):
        trainer.train()
    (kept,) = checkpoint.checkpoints(trainer.folder)
    assert kept.name == "checkpoint-00000003"
    assert all(w.isfinite().all() for w in load_file(kept / checkpoint.WEIGHTS).values())
    assert [e["step"] for e in log_of(trainer)] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer()
    trainer._start()
    next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match=r"^step 1: the gradient is (nan|inf) at sample 0 \(recall, from"):
        trainer._one_step()
    assert_equal(weights_of(trainer), before)


def test_a_full_disk_keeps_the_checkpoints_before(make_trainer, monkeypatch):
    trainer = make_trainer()

    def full(*args, **options):
        if trainer.step > 3:
            raise RuntimeError("[enforce fail] unexpected pos 64 vs 0\nframe #0")
        return whole(*args, **options)

    whole = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"checkpoint-00000006 cannot be written \(\[enforce fail\].*\); the check"):
        trainer.train()
    assert [p.name for p in checkpoint.checkpoints(trainer.folder)] == ["checkpoint-00000003"]
    assert not list(trainer.folder.glob(".making*"))


def test_other_settings_in_the_same_folder_are_refused(make_trainer):
    make_trainer().train()
    with pytest.raises(TrainingError, match=r"other settings \(settings\.learning_rate, settings\.seed\): "):
        make_trainer(seed=1, learning_rate=1e-3).train()
    trainer = make_trainer("elsewhere")
    trainer.folder.mkdir()
    (trainer.folder / "letter.txt").touch()
    with pytest.raises(TrainingError, match="exists and is no training"):
        trainer.train()


def test_a_damaged_checkpoint_is_named(make_trainer):
    trainer = make_trainer()
    trainer.train()
    path = checkpoint.checkpoints(trainer.folder)[-1] / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrainingError, match=r"checkpoint-00000006 is damaged .* remove it"):
        make_trainer().train()


def test_settings_that_cannot_work(make_trainer):
    with pytest.raises(TrainingError, match="fit into the window of 7"):
        make_trainer(max_length=7)
    with pytest.raises(TrainingError, match="fit into the window of 7"):
        make_trainer(curriculum=(Stage(5, 2),))
    with pytest.raises(TrainingError, match=r"takes 6 steps: max_steps \(6\) must be more"):
        make_trainer(curriculum=(Stage(20, 6),))
    with pytest.raises(TrainingError, match="set distillation_weight to 0"):
        make_trainer(distillation_weight=1.0)
    with pytest.raises(TrainingError, match="set gate_learning_rate to at least"):
        make_trainer(gate_learning_rate=1e-3).train()


@pytest.mark.parametrize("trainable", ["memory", "memory+lora"])
def test_the_adapter_on_the_base_is_the_trained_model(make_trainer, make_base, tokens, trainable):
    trainer = make_trainer(trainable=trainable, notes={"data_digests": ["abc"]}, options={"dtype": torch.float32})
    path = trainer.train()
    assert path == trainer.folder / "adapter.safetensors"
    notes = read_adapter_header(path)["notes"]
    assert (notes["steps"], notes["data_digests"], notes["settings"]["trainable"]) == (6, ["abc"], trainable)
    model = load_adapter(make_base(dtype=torch.float32), path)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, found = trainer.model(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)  # its weights are rounded to bfloat16
    untrained = make_trainer("other", options={"dtype": torch.float32}).model(ids).logits
    assert (untrained - expected).abs().max() > 5 * (found - expected).abs().max()


def test_full_weights(make_trainer, tokens):
    trainer = make_trainer(trainable="all", options={"dtype": torch.float32})
    path = trainer.train()
    model = SenriForCausalLM.from_pretrained(path).eval()
    ids = tokens(2, 40)
    torch.testing.assert_close(model(ids).logits, trainer.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_calibration_is_step_zero_and_not_done_again(make_trainer, verses, tokens):
    ids = tokens(1, 200)[0].tolist()
    said = []
    trainer = make_trainer(calibration=ids, mix=Dies(verses, 8, Killed()), say=said.append)
    with pytest.raises(Killed):
        trainer.train()
    assert any("calibrated on" in line for line in said)
    said.clear()
    resumed = make_trainer(calibration=ids, say=said.append)
    resumed.train()
    assert not any("calibrated on" in line for line in said)
    straight = make_trainer("straight", calibration=ids)
    straight.train()
    assert_equal(weights_of(resumed), weights_of(straight))


LAUNCHED = """
import sys
from types import ModuleType
sys.modules["tests"] = ModuleType("tests")  # some package of the environment brings another one
sys.modules["tests"].__path__ = [{tests!r}]
import torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from tests.conftest import _make_base, _randomise, TINY
from tests.training.conftest import SETTINGS, Verses
from senri.hf.convert import convert_to_senri
from senri.training.trainer import Trainer, run_identity
model = _randomise(convert_to_senri(_make_base(), **{{**TINY, "memory_readout": "head", "memory_conv_size": 2}}))
settings = replace(SETTINGS, batch_size=int(sys.argv[2]), distillation_weight=0.3)
text = Path({text!r}).read_text()
identity, teacher = run_identity(settings, {{}}), _make_base(seed=5)
Trainer(model, settings, Verses(text), Path(sys.argv[1]), identity, teacher=teacher).train()
"""


@pytest.mark.slow
def test_two_processes_with_half_the_batch_are_one(tmp_path, real_text):
    root = str(Path(__file__).parents[2])
    (tmp_path / "text").write_text(real_text[:40_000])
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED.format(tests=f"{root}/tests", text=str(tmp_path / "text")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}/src"}
    for command in (
        [str(script), str(tmp_path / "one"), "4"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path / "two"), "2"],
    ):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    weights = [load_file(tmp_path / name / "checkpoint-00000006" / checkpoint.WEIGHTS) for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-7, atol=1e-9)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*[map(json.loads, log) for log in logs], strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-6)
        assert (a["tokens"], a["loss"]) == pytest.approx((b["tokens"], b["loss"]), rel=1e-6)
    identity = json.loads((tmp_path / "two" / checkpoint.IDENTITY).read_text())
    assert identity["processes"] == 2


def test_tensorboard_has_the_numbers_of_the_log(make_trainer, verses):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(probed=[verses[300]])
    trainer.train()
    events = EventAccumulator(str(trainer.folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert {"losses/text", "grad_norm", "rates/gates", "probe/answers"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([e["loss"] for e in log_of(trainer)])
