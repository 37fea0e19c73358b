"""Lagged Cache Training: the algorithm written plainly, states kept by sample, resume, disk, stopping, warnings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from senri.data.packing import PackedTexts, TokenStream
from senri.lm import FeedbackLM, InfiniLayer, PythiaLayer, relative_gap
from senri.training import state_cache
from senri.training.lagged_cache import LCTSettings, LCTTrainer
from senri.training.lm import WEIGHTS, LMSettings, LMTrainer, parameter_groups
from senri.training.log import LOG
from senri.training.optim import make_optimizer
from senri.training.settings import TrainingError
from senri.training.state_cache import MAPPED, StateCache

EXACT = {"rtol": 1e-9, "atol": 1e-9}
VOCABULARY, SAMPLES, SEGMENT, SEGMENTS = 61, 7, 5, 2
LENGTH = SEGMENT * SEGMENTS
STEPS = 3  # an epoch, the last one with a single sample
SETTINGS = LMSettings(
    epochs=3, batch_size=3, segment_length=SEGMENT, segments=SEGMENTS, learning_rate=3e-3, weight_decay=0.1,
    max_grad_norm=1.0, warmup_ratio=0.1, bf16=False, save_steps=2, seed=0,
)  # fmt: skip
LAGGED = LCTSettings(passes=1, tolerance=0.0, gap_samples=2, gap_warning=0.5, cache_in_memory_gb=1.0)
IDENTITY = {"model": "tiny"}


def make() -> FeedbackLM:
    torch.manual_seed(0)
    layers = [InfiniLayer(16, 2, 24, segment_size=4), PythiaLayer(16, 2, 24)]
    return FeedbackLM(layers, VOCABULARY, feedback_scale=0.5).double()


def texts() -> PackedTexts:
    ids = torch.randint(VOCABULARY, (SAMPLES * LENGTH + 1,), generator=torch.Generator().manual_seed(1))
    return PackedTexts(TokenStream(ids.numpy().astype(np.int32), np.array([len(ids)]), ("text",)), LENGTH, SAMPLES)


def trainer(folder: Path, lagged: LCTSettings = LAGGED, model: FeedbackLM | None = None, **more) -> LCTTrainer:
    return LCTTrainer(model or make(), texts(), SETTINGS, lagged, folder, IDENTITY, **more)


def changed(**values) -> LCTSettings:
    return LCTSettings(**{**vars(LAGGED), **values})


def entries(folder: Path) -> list[dict]:
    """A log without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in e.items() if "second" not in k} for e in lines]


def plain_pass(model: FeedbackLM, tokens: torch.Tensor, fed: torch.Tensor | None) -> torch.Tensor:
    """One pass, token by token; what is fed back is a constant."""
    state, hidden = model.init_state(len(tokens)), []
    for t in range(LENGTH):
        state = state.next_segment() if t % SEGMENT == 0 else state
        before = model.start.expand(len(tokens), -1) if t == 0 or fed is None else fed[:, t - 1].detach()
        x = model.embed_in(tokens[:, t]) + model.feedback(before)
        out, state = model.run_layers(x[:, None], state)
        hidden.append(out[:, 0])
    return torch.stack(hidden, 1)


def plain_training(passes: int) -> FeedbackLM:
    """The algorithm as it is described, with a dictionary of states."""
    model, data, caches = make().train(), texts(), {}
    plan = type("Plan", (), {"max_steps": STEPS * SETTINGS.epochs, "warmup_steps": 1})
    optimizer, scheduler = make_optimizer(parameter_groups(dict(model.named_parameters()), SETTINGS), plan)
    for epoch in range(SETTINGS.epochs):
        order = data.order(epoch)
        for start in range(0, SAMPLES, SETTINGS.batch_size):
            batch = order[start : start + SETTINGS.batch_size]
            ids = torch.stack([torch.from_numpy(data[i]).long() for i in batch])
            with torch.no_grad():
                fed = torch.stack([caches[i] for i in batch]) if epoch else plain_pass(model, ids[:, :-1], None)
                for _ in range(passes - 1):
                    fed = plain_pass(model, ids[:, :-1], fed)
            hidden = plain_pass(model, ids[:, :-1], fed)
            caches |= {i: row.detach() for i, row in zip(batch, hidden, strict=True)}
            F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("passes", [1, 3])
def test_a_run_is_the_algorithm_written_plainly(tmp_path: Path, passes: int) -> None:
    """Shuffled epochs: states follow their sample."""
    run = trainer(tmp_path / "run", changed(passes=passes))
    run.train()
    expected = plain_training(passes).state_dict()
    for name, found in run.model.state_dict().items():
        torch.testing.assert_close(found, expected[name], **EXACT)
    start = make().state_dict()
    assert all((expected[name] != start[name]).any() for name in ("feedback.weight", "start", "embed_in.weight"))
    log = entries(tmp_path / "run")
    assert [e["filled"] for e in log] == [3, 3, 1, 0, 0, 0, 0, 0, 0]
    assert {e["passes"] for e in log} == {passes}
    assert orders_differ()


def orders_differ() -> bool:
    return texts().order(0) != texts().order(1)


# what is reported ---------------------------------------------------------------------------------------------


def test_the_gap_is_that_of_the_kept_states_to_the_sequential_ones(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.train()
    ends = [e for e in entries(tmp_path / "run") if "gap" in e]
    assert [e["step"] for e in ends] == [STEPS, 2 * STEPS, 3 * STEPS]
    last, data = ends[-1], texts()
    ids = torch.stack([torch.from_numpy(data[i]).long() for i in (0, 1)])
    kept, there = run.cache.get([0, 1], 3)
    assert there.all()
    with torch.no_grad():
        true = run.model.sequential_states(ids[:, :-1], SEGMENT)
        plain = run.model.refine(ids[:, :-1], None, segment_length=SEGMENT).cache
        torch.testing.assert_close(true, plain, **EXACT)
        after = plain_pass(run.model, ids[:, :-1], kept)
    assert last["gap"] == pytest.approx(float(relative_gap(kept, true).mean()), rel=1e-9)
    assert last["gap_after_pass"] == pytest.approx(float(relative_gap(after, true).mean()), rel=1e-9)
    assert last["contraction"] == pytest.approx(last["gap_after_pass"] / last["gap"])
    for name, hidden in (("lagged_loss", after), ("sequential_loss", true)):
        loss = F.cross_entropy(run.model.lm_head(hidden).detach().flatten(0, 1), ids[:, 1:].flatten())
        assert last[name] == pytest.approx(float(loss), rel=1e-9)


def test_refining_stops_by_the_change_of_a_pass(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", changed(passes=50, tolerance=1e-4))
    run.train()
    log = entries(tmp_path / "run")
    assert all(2 < e["passes"] <= LENGTH + 2 for e in log)
    assert all(e["change"] <= 1e-4 for e in log)
    assert all(e["lag"] > 1e-4 for e in log)


def spoil(model: FeedbackLM) -> None:
    """Feedback that overwhelms what it meets: a pass leads away from the sequential states."""
    with torch.no_grad():
        model.feedback.weight.mul_(100.0)


@pytest.mark.parametrize("broken", [False, True])
def test_states_that_do_not_follow_the_weights_are_warned_of(tmp_path: Path, broken: bool) -> None:
    model, said = make(), []
    if broken:
        spoil(model)
    trainer(tmp_path / "run", model=model, say=said.append).train()
    ends = [e for e in entries(tmp_path / "run") if "gap" in e]
    assert any(e["broken"] for e in ends) == broken
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == sum(e["broken"] for e in ends)
    assert all("lower the learning rate, or raise passes" in line and "\n" not in line for line in warnings)


def test_a_gap_that_grows_is_warned_of(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", changed(gap_warning=0.2))
    for gap, contraction, broken in (
        (0.9, 0.1, False),  # the first epoch's: its states are of weights that knew nothing
        (0.3, 0.1, False),
        (0.4, 0.1, True),
        (0.1, 0.1, False),
        (0.15, 0.1, False),  # grows, but is small
        (0.1, 1.1, True),
        (1e-9, 1.1, False),
    ):
        entry = {"gap": gap, "contraction": contraction, "sequential_loss": 1.0, "lagged_loss": 1.0}
        run._judge(entry)
        assert entry["broken"] == broken


# resume and disk ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs, in memory."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder, changed(passes=2)).train()
    return folder


@pytest.mark.parametrize("in_memory_gb", [1.0, 0.0])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_run_that_was_killed_goes_on_bit_for_bit(whole: Path, tmp_path: Path, in_memory_gb: float, step: int) -> None:
    """Checkpoints are at 2, 3, 4, 6, 8: what came after them is done again, and finds the states of the first time."""
    lagged = changed(passes=2, cache_in_memory_gb=in_memory_gb)

    def kill(entry) -> None:
        if entry["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path / "cut", lagged, show=kill).train()
    found, expected = load_file(trainer(tmp_path / "cut", lagged).train()), load_file(whole / WEIGHTS)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert entries(tmp_path / "cut") == entries(whole)


def test_a_cache_on_disk_is_the_cache_in_memory(tmp_path: Path) -> None:
    memory, disk = trainer(tmp_path / "memory"), trainer(tmp_path / "disk", changed(cache_in_memory_gb=0.0))
    a, b = load_file(memory.train()), load_file(disk.train())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert entries(tmp_path / "memory") == entries(tmp_path / "disk")
    assert (tmp_path / "disk" / MAPPED).stat().st_size == disk.cache.nbytes == 2 * memory.cache.nbytes
    assert memory.cache.nbytes == SAMPLES * (LENGTH * 16 * 8 + 4)
    assert not (tmp_path / "memory" / MAPPED).exists()
    for row in range(SAMPLES):
        assert torch.equal(memory.cache.get([row], 3)[0], disk.cache.get([row], 3)[0])


def test_several_workers_share_a_mapped_file(tmp_path: Path) -> None:
    one, other = (StateCache(4, 3, 2, torch.float32, tmp_path) for _ in range(2))
    states = torch.randn(2, 3, 2, requires_grad=True)
    one.put([3, 1], 0, states)
    found, there = other.get([0, 1, 3], 1)
    assert there.tolist() == [False, True, True]
    assert torch.equal(found[1:], states.flip(0))
    assert not found.requires_grad
    other.put([1], 1, states[:1])
    assert one.get([1], 1)[1].all()  # of epoch 0, still there while epoch 1 goes on
    assert torch.equal(one.get([1], 2)[0], states[:1])
    assert not one.get([3], 2)[1].any()
    assert not one.get([3], 0)[1].any()


def test_a_cache_that_cannot_be_kept_is_an_error_of_one_line(tmp_path: Path, monkeypatch) -> None:
    StateCache(4, 3, 2, torch.float32, tmp_path)
    with pytest.raises(TrainingError, match=r"states.bin has 224 bytes, this run's states take 280: remove it"):
        StateCache(5, 3, 2, torch.float32, tmp_path)
    with pytest.raises(TrainingError, match=r"no room in .*missing for the states of all samples, 0.00 GB \(No such"):
        StateCache(5, 3, 2, torch.float32, tmp_path / "missing")

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    (tmp_path / "full").mkdir()
    monkeypatch.setattr(state_cache, "bytes", full, raising=False)
    with pytest.raises(TrainingError, match=r"\(No space left on device\): name another output_dir"):
        StateCache(5, 3, 2, torch.float32, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_a_damaged_cache_is_an_error_of_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer(folder).train()
    (last,) = folder.glob("checkpoint-*9")
    (last / state_cache.FILE).write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"states.safetensors is damaged .*: remove .*checkpoint-00000009"):
        trainer(folder).train()


# sequential training --------------------------------------------------------------------------------------------


def test_sequential_training_needs_no_trainer_of_its_own(tmp_path: Path) -> None:
    """LMTrainer on a FeedbackLM: the whole gradient, through both segments."""
    model, data = make(), texts()
    run = LMTrainer(model, data, SETTINGS, tmp_path, IDENTITY)
    ids = torch.stack([torch.from_numpy(data[i]).long() for i in (0, 1)])
    loss = run.loss(ids, [0, 1])
    state, nats = model.init_state(2), torch.zeros((), dtype=torch.float64)
    for t in range(LENGTH):
        state = state.next_segment() if t % SEGMENT == 0 else state
        out = model(ids[:, t : t + 1], state)
        state = out.state
        nats = nats + F.cross_entropy(out.logits[:, 0], ids[:, t + 1]) / LENGTH
    torch.testing.assert_close(loss.double(), nats, rtol=1e-6, atol=1e-6)  # LMTrainer sums in float32
    (found,) = torch.autograd.grad(loss, model.feedback.weight)
    (expected,) = torch.autograd.grad(nats, model.feedback.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
