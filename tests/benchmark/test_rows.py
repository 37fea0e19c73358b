"""Each row measures what it says, on a tiny model with the real vocabulary."""

import json
from types import SimpleNamespace

import pytest
import torch

import senri.hf.base as base_module
from senri.benchmark import memory_rows, rows, training_rows
from senri.benchmark.measure import HOMES, measure
from senri.benchmark.memory_rows import MemoryClock
from senri.benchmark.peer_rows import peer
from senri.benchmark.process import LeftOut
from senri.benchmark.texts import book_ids
from senri.benchmark.work import layer_work
from senri.data import iter_bible
from senri.data.corpus import Document
from senri.layers import MemoryAttention

from .conftest import LAYERS, MEMORY, PIECE, WINDOW

TRAINING = {
    "batch_size": 1,
    "max_length": 100,
    "seed": 0,
    "trainable": "memory",
    "lora_rank": 2,
    "piece_length": PIECE,
    "bptt_pieces": None,
    "learning_rate": 1e-3,
    "gate_learning_rate": 1e-2,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_steps": 1000,
    "warmup_steps": 50,
    "curriculum": [],
    "write_loss_weight": 0.1,
    "distillation_weight": 0.0,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "save_steps": 1,
    "probe_steps": 1,
}
FEATURES = {
    "streams": 224,
    "pages": 3,
    "page_size": 96,
    "questions": 1,
    "learns": "all",
    "gate_steps": 1500,
    "write_rate": 0.01,
    "steps": 1000,
    "texts": 1,
    "fact_pages": 2,
    "plain_pages": 2,
    "learning_rate": 2e-3,
    "gate_learning_rate": 5e-3,
    "weight_decay": 0.1,
    "save_steps": 100,
    "chat": 0.0,
    "seed": 0,
}


def test_the_text_goes_round(real_tokenizer, monkeypatch):
    verses = [verse for verse, _ in zip(iter_bible(), range(3), strict=False)]
    monkeypatch.setattr("senri.benchmark.texts.iter_bible", lambda: iter(verses))
    once = len(real_tokenizer("".join(verses))["input_ids"])
    ids = book_ids(2 * once + 5, real_tokenizer)
    assert len(ids) == 2 * once + 5
    assert real_tokenizer.decode(ids).startswith("".join(verses) + verses[0])


def test_reading(spec, senri_folder):
    row = measure(spec("reading", tokens=128, batch=2, repeats=2))
    assert (row["key"], row["tokens"], row["batch"], row["dtype"]) == ("reading", 128, 2, "float32")
    assert len(row["seconds"]) == len(row["first_token_seconds"]) == 2
    assert [len(pieces) for pieces in row["piece_seconds"]] == [4, 4]
    assert sum(row["piece_seconds"][0]) <= row["seconds"][0] * 1.001
    # one layer below the memory's; the first piece runs through all of them, of each of two texts
    assert row["layers_a_token"] == (LAYERS * PIECE + 96) / 128
    config = base_module.load_model(senri_folder, "float32", "none")[0].config
    assert row["all_layers"] == layer_work(config, 128).times(2 * LAYERS)._asdict()
    assert row["work"]["weights"] == row["all_layers"]["weights"] * row["layers_a_token"] / LAYERS
    assert row["peak_bytes"] > 50e6
    assert row["state_bytes"] > 0
    json.dumps(row)


def test_every_repeat_starts_anew(spec, monkeypatch):
    begins, read = [], base_module.SenriForCausalLM.read

    def watched(self, ids, **options):
        begins.append(self.session is None)
        return read(self, ids, **options)

    monkeypatch.setattr(base_module.SenriForCausalLM, "read", watched)
    measure(spec("reading", tokens=64, batch=1, repeats=3))
    assert begins == [True] * 4


def test_decoding_goes_on_from_saved_readings(spec, tmp_path, monkeypatch):
    after = [40, 100]
    saved = measure(spec("states", after=after, folder=str(tmp_path / "states")))
    assert {int(n): (tmp_path / "states" / f"{n}.senri").stat().st_size for n in after} == {
        int(n): size for n, size in saved["file_bytes"].items()
    }
    states = []
    fork = rows._steps

    def watched(model, cache, token, count):
        states.append(cache.tokens_read)
        return fork(model, cache, token, count)

    monkeypatch.setattr(rows, "_steps", watched)
    row = measure(spec("decoding", after=100, tokens=5, repeats=2, folder=str(tmp_path / "states")))
    assert states == [[100], [100]], "each run starts from the same state"
    assert (len(row["seconds"]), len(row["step_seconds"])) == (2, 10)
    assert row["weight_bytes"] > 49152 * 32 * 4
    with pytest.raises(ValueError, match=r"41\.senri"):
        measure(spec("decoding", after=41, tokens=5, repeats=2, folder=str(tmp_path / "states")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_path(spec, dtype):
    """In bfloat16 layers are fused, and their parts' hooks silent."""
    plain = spec("memory", tokens=160)
    row = measure({**plain, "model": {**plain["model"], "dtype": dtype}})
    pieces = 160 // PIECE - WINDOW // PIECE
    for part in ("reading", "predicting"):
        assert len(row[part]["whole"]) == len(row[part]["memory"]) == pieces
        assert all(0 < m < w for m, w in zip(row[part]["memory"], row[part]["whole"], strict=True))
    assert len(row["layer"]) == pieces
    with pytest.raises(LeftOut, match="do not leave the window"):
        measure(spec("memory", tokens=WINDOW))


def test_the_clock_counts_the_outermost_call_once(make_senri, tokens, monkeypatch):
    """``forward`` calls ``writing``, which takes 3 s here."""
    model, now, whole = make_senri(num_memory_layers=1), [0.0], MemoryAttention.writing
    monkeypatch.setattr(memory_rows, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(*args, **options):
        now[0] += 3.0
        return whole(*args, **options)

    monkeypatch.setattr(MemoryAttention, "writing", slow)
    with MemoryClock(model) as clock:
        model(tokens(1, 12))
    assert clock.seconds == now[0] == 3.0
    model(tokens(1, 12))
    assert clock.seconds == 3.0, "afterwards nobody looks"


def test_the_layer_by_itself_is_the_one_in_the_model(make_senri, tokens):
    """Same inputs, same state as a forward of the model leaves."""
    head = {"memory_readout": "head", "memory_num_heads": 1, "memory_num_key_value_heads": 1, "num_memory_layers": 1}
    model, ids = make_senri(**head), tokens(1, 30)
    kept, states = [], []
    memory = model.model.memories[1]
    hook = memory.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    cache = model.model.new_cache()
    with torch.no_grad():
        for piece in ids.split(10, 1):
            model.model(piece, past_key_values=cache)
        hook.remove()
        memory.register_forward_hook(lambda _m, _a, out: states.append(out[1]))
        memory_rows._layer_alone(model, memory, kept, list(ids.split(10, 1)))
    torch.testing.assert_close(states[-1].memory.M, cache.state.layers[1].memory.memory.M)


@pytest.fixture
def short_book(monkeypatch, real_text):
    """Training reads the beginning of the text only: the whole takes seconds to tokenize."""
    monkeypatch.setattr(training_rows, "load_documents", lambda _: [Document("a book", real_text[:150_000])])


@pytest.mark.usefixtures("short_book")
@pytest.mark.parametrize("trainable", ["memory", "all"])
def test_training_steps(spec, trainable):
    row = measure(spec("training", training={**TRAINING, "trainable": trainable}, repeats=2))
    assert (row["trainable"], row["tokens"], len(row["step_seconds"])) == (trainable, 100, 2)
    assert (row["parameters"] > 49152 * 32) == (trainable == "all")
    assert row["work"]["weights"] > 0


@pytest.mark.usefixtures("short_book")
def test_training_that_cannot_be_is_left_out(spec):
    with pytest.raises(LeftOut, match="the memory is never needed"):
        measure(spec("training", training={**TRAINING, "max_length": WINDOW}, repeats=1))


@pytest.mark.usefixtures("short_book")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_features(spec, monkeypatch, dtype):
    monkeypatch.setattr(training_rows, "FEATURE_STREAMS", 3)
    monkeypatch.setattr(training_rows, "FEATURE_STEPS", 2)
    plain = spec("features", features=FEATURES)
    row = measure({**plain, "model": {**plain["model"], "dtype": dtype}})
    assert row["tokens"] > 3 * 3 * 96
    assert min(row["collect_seconds"], row["gate_step_seconds"], row["step_seconds"]) > 0


def test_conversion_and_load(spec, senri_folder, base_folder):
    model = {"name": str(base_folder), "dtype": "float32", "adapter": "none", "overrides": MEMORY}
    row = measure(spec("conversion", model=model, repeats=2))
    assert (len(row["load_seconds"]), len(row["convert_seconds"]), row["first_call"]) == (2, 2, None)
    with pytest.raises(LeftOut, match="nothing left to convert"):
        measure(spec("conversion", repeats=1))
    row = measure(spec("load"))
    assert min(row["import"], row["load"], row["first_token"]) > 0


@pytest.mark.parametrize("name", ["full_attention", "streaming_window"])
def test_peers_with_the_same_weights(spec, base_folder, monkeypatch, name):
    monkeypatch.setattr(base_module, "base_directory", lambda: base_folder)
    row = peer(spec("peer", peer=name, tokens=70, decode=3, repeats=2, options={}))
    assert (row["peer"], row["tokens"], row["decode"]) == (name, 70, 3)
    assert len(row["seconds"]) == len(row["decode_seconds"]) == 2
    assert row["note"]
    if name == "full_attention":
        assert row["state_bytes"] == 2 * LAYERS * 2 * 8 * 70 * (2 if "bfloat16" in row["note"] else 4)


def test_a_peer_that_is_not_there_is_left_out(spec):
    with pytest.raises(LeftOut, match="nobody"):
        peer(spec("peer", peer="nobody", tokens=10, decode=1, repeats=1, options={}))


def test_every_measurement_has_a_home(spec):
    import importlib

    for name, home in HOMES.items():
        assert callable(getattr(importlib.import_module(f"senri.benchmark.{home}"), name))
