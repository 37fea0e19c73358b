"""A training on features as one run in one folder: what is saved, and how it goes on."""

import json
from dataclasses import replace

import pytest
import torch

import senri.training.feature_trainer as feature_trainer
from senri.data.samples import SampleError
from senri.training.feature_trainer import train_on_features
from senri.training.fit import Reading
from senri.training.settings import FeatureSettings, TrainingError

SETTINGS = FeatureSettings(
    streams=3,
    pages=2,
    page_size=160,
    questions=2,
    learns="all",
    gate_steps=5,
    write_rate=0.01,
    steps=4,
    texts=1,
    fact_pages=2,
    plain_pages=1,
    learning_rate=1e-3,
    gate_learning_rate=5e-3,
    weight_decay=0.01,
    save_steps=2,
)


@pytest.fixture
def train(make_reader, pages, tmp_path):
    """``(folder, calibrates, settings, **config)`` -> the model that a run, or the rest of it, leaves."""

    def run(folder, calibrates=True, settings=SETTINGS, **config):
        model = make_reader(**config)
        train_on_features(
            model, pages, settings, 0, tmp_path / folder, {"model": "tiny"},
            calibrates=calibrates, dtype=torch.float32, notes={},
        )  # fmt: skip
        return model

    return run


def gates_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".write_gate." in name}


def steps_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["stage"], entry["step"]) for entry in entries]


def test_a_run_that_goes_on_has_its_write_gates_from_before(train, tmp_path, monkeypatch):
    """They are not fitted again: after an interruption of the reading they are the same to the last bit."""
    whole = Reading.losses

    def interrupted(self, texts):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return whole(self, texts)

    def fitted_again(*args):
        raise AssertionError("the write gates were there already")

    interrupted.calls = 0
    straight = train("straight")
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("run")
    saved = torch.load(tmp_path / "run" / "write_gates.pt", weights_only=True)
    assert saved.keys() == {"1", "2"}
    with monkeypatch.context() as patch:
        patch.setattr(feature_trainer, "fit_write_gates", fitted_again)
        patch.setattr(feature_trainer, "collect", fitted_again)
        resumed = train("run")
    for index, weights in saved.items():
        state = resumed.model.memories[int(index)].write_gate.state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    expected = {name: p for name, p in straight.named_parameters() if ".memory." in name}
    assert gates_of(resumed).keys() <= expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(resumed.get_parameter(name), parameter), name


@pytest.mark.parametrize(("streams", "parts"), [(3, [3]), (6, [3, 3]), (8, [3, 5]), (9, [3, 3, 3])])
def test_pages_are_read_in_parts_and_those_that_are_there_are_not_read_again(
    make_reader, pages, tmp_path, monkeypatch, streams, parts
):
    monkeypatch.setattr(feature_trainer, "PART", 3)
    read, said, seen = [], [], []
    whole = feature_trainer.collect

    def collect(model, source, part, **options):
        read.append((len(part), options["unrelated"]))
        if len(read) == 2 and len(parts) == 3:  # the second of three parts is not finished
            raise KeyboardInterrupt
        return whole(model, source, part, **options)

    def run():
        train_on_features(
            make_reader(), pages, replace(SETTINGS, streams=streams), 0, tmp_path / "run", {"model": "tiny"},
            calibrates=True, dtype=torch.float32, notes={}, show=seen.append, say=said.append,
        )  # fmt: skip

    monkeypatch.setattr(feature_trainer, "collect", collect)
    if len(parts) == 3:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == ["features-1.pt"]
        run()
        assert read == [(3, True), (3, False), (3, False), (3, False)], "the first one was there"
        assert said[-1].startswith("2 of 3 parts read")
    else:
        run()
        assert read == [(size, number == 0) for number, size in enumerate(parts)]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    shown = {(entry["part"], entry["parts"]) for entry in seen if entry["stage"] == "features"}
    assert shown == {(number, len(parts)) for number in range(1, len(parts) + 1)}


def test_the_steps_of_a_run_are_one_count(train, tmp_path):
    expected = [("write gate", 5), ("write gate", 10), ("reading", 10 + 4)]  # two memories
    train("run")
    assert steps_of(tmp_path / "run") == expected
    train("run")
    assert steps_of(tmp_path / "run") == expected, "each once"


def test_a_run_that_keeps_its_write_gates_goes_on_with_its_log(train, tmp_path, monkeypatch):
    settings = replace(SETTINGS, gate_steps=0, steps=26, save_steps=25)  # every 25th step is logged
    whole = Reading.losses

    def interrupted(self, texts):
        interrupted.calls += 1
        if interrupted.calls == 26:
            raise KeyboardInterrupt
        return whole(self, texts)

    interrupted.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("run", calibrates=False, settings=settings)
    assert steps_of(tmp_path / "run") == [("reading", 25)]
    train("run", calibrates=False, settings=settings)
    assert steps_of(tmp_path / "run") == [("reading", 25), ("reading", 26)]


@pytest.mark.parametrize("calibrates", [False, True])
def test_keys_are_calibrated_where_there_are_none_to_start_from(train, monkeypatch, calibrates):
    seen, whole = [], feature_trainer.prepare
    monkeypatch.setattr(feature_trainer, "prepare", lambda *a, **options: seen.append(options) or whole(*a, **options))
    train("run", calibrates=calibrates)
    assert seen == [{"addresses": calibrates}]


def test_held_out_pages_are_looked_at_now_and_then_and_at_the_end(make_reader, pages, tmp_path, monkeypatch):
    """They change nothing of what is learned, and a run that goes on does not read them again."""
    monkeypatch.setattr(feature_trainer, "PROBED_STREAMS", 3)
    monkeypatch.setattr(feature_trainer, "PROBED_TEXTS", 4)
    seen, said = [], []

    def run(folder, **options):
        model = make_reader()
        train_on_features(
            model, pages, replace(SETTINGS, steps=5), 0, tmp_path / folder, {"model": "tiny"},
            calibrates=True, dtype=torch.float32, notes={}, show=seen.append, say=said.append, **options,
        )  # fmt: skip
        assert not model.training
        return model

    plain, probed = run("plain"), run("probed", probed=pages, probe_steps=2)
    for (name, parameter), (_, its) in zip(plain.named_parameters(), probed.named_parameters(), strict=True):
        assert torch.equal(parameter, its), name
    looks = [entry for entry in seen if entry["stage"] == "probe"]
    assert [entry["step"] for entry in looks] == [10 + 2, 10 + 4, 10 + 5]
    assert all(0 <= entry["right"] <= 1 and "unrelated" not in entry for entry in looks)
    assert {"value tokens written", "plain tokens written", "untold"} <= looks[0].keys()
    assert said.count("reading held-out pages for the probe ...") == 1
    run("probed", probed=pages, probe_steps=2)
    assert said.count("reading held-out pages for the probe ...") == 1


def test_too_little_text_to_probe_is_said_and_the_training_goes_on(train, pages, tmp_path, monkeypatch):
    def too_short(model, source, streams, **options):
        raise SampleError("the haystack has 5 tokens")

    model, said = train("run"), []
    monkeypatch.setattr(feature_trainer, "collect", too_short)
    found = feature_trainer._held_out(model, pages, tmp_path / "run", torch.float32, said.append)
    assert found is None
    assert said[-1] == "nothing is probed, for the text that is kept back is too short: the haystack has 5 tokens"


def test_a_routed_memory_is_trained_as_one(train):
    """What is learned is, to the last bit, what a single memory learns."""
    one, routed = (train(store, update_rule="linear", store=store) for store in ("single", "routed"))
    assert not routed.training
    for (name, parameter), (_, its) in zip(one.named_parameters(), routed.named_parameters(), strict=True):
        assert torch.equal(parameter, its), name


def test_the_end_of_a_chat_turn_must_be_one_token_to_all(make_reader, pages, tmp_path):
    """Else the memory would learn to say what ends nothing."""
    model = make_reader(update_rule="slot")
    for memory in model.model.memories.values():
        memory.end_token = 1
    with pytest.raises(TrainingError, match="ends a chat turn with token 2, the base model with 1: set eos_token_id"):
        train_on_features(
            model, pages, SETTINGS, 0, tmp_path / "run", {"model": "tiny"},
            calibrates=True, dtype=torch.float32, notes={},
        )  # fmt: skip
    assert not (tmp_path / "run").exists(), "before anything is made"


def test_the_end_alone_can_be_learned(make_reader, pages, tmp_path):
    """Of a model that reads already: nothing else of it moves."""
    model = make_reader(update_rule="slot")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = replace(SETTINGS, learns="end", gate_steps=0)

    def run(model, settings, calibrates):
        train_on_features(
            model, pages, settings, 0, tmp_path / "run", {"model": "tiny"},
            calibrates=calibrates, dtype=torch.float32, notes={},
        )  # fmt: skip

    for wrong in (
        (model, settings, True),
        (model, replace(settings, gate_steps=5), False),
        (make_reader(), settings, 0),
    ):
        with pytest.raises(TrainingError, match="end needs an init_adapter of rule slot"):
            run(*wrong)
    assert not (tmp_path / "run").exists()
    run(model, settings, False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.layers.{i}.memory.slot_gate.end_{part}" for i in (1, 2) for part in ("key", "bias")}
