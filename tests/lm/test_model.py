"""TransformerLM: layer lists, sessions, generation, and memories that move to another process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from senri.lm import (
    InfiniLayer,
    PythiaLayer,
    StateFileError,
    TransformerLM,
    create_model,
    load_memory,
    save_memory,
)

SRC = Path(__file__).parents[2] / "src"
EXACT = {"rtol": 1e-10, "atol": 1e-10}
VOCABULARY = 97
SMALL = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "num_layers": 2}


def make(name: str = "infini", seed: int = 0, **options) -> TransformerLM:
    torch.manual_seed(seed)
    options = {**SMALL, **({} if name == "pythia" else {"segment_size": 6}), **options}
    model = create_model(name, vocab_size=VOCABULARY, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def text(steps: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(seed))


# layer lists ------------------------------------------------------------------------------------------------


def test_any_mix_of_layers() -> None:
    model = TransformerLM([InfiniLayer(16, 2, 24), InfiniLayer(16, 2, 24), PythiaLayer(16, 2, 24)], VOCABULARY)
    assert model(text(5)).logits.shape == (1, 5, VOCABULARY)
    assert [layer["type"] for layer in model.numbers["layers"]] == ["InfiniLayer", "InfiniLayer", "PythiaLayer"]


def test_lists_that_are_no_model() -> None:
    layer = PythiaLayer(16, 2, 24)
    for layers, message in (
        ([], "one PythiaLayer"),
        ([torch.nn.Linear(16, 16)], "one PythiaLayer"),
        ([layer, InfiniLayer(24, 2, 24)], "one hidden_size, not 16, 24"),
        ([layer, layer], "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerLM(layers, VOCABULARY)
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\], not \[4\]"):
        make()(torch.arange(4))


# sessions ---------------------------------------------------------------------------------------------------


def test_a_call_without_a_session_remembers_nothing() -> None:
    model, ids = make(), text(20)
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    assert model.session is None


def test_a_session_carries_the_memories_from_segment_to_segment() -> None:
    model, ids = make(), text(30)
    state = model(ids[:, :13]).state.next_segment()
    expected = model(ids[:, 13:], state)
    model.reset_memory()
    model(ids[:, :13])
    found = model(ids[:, 13:])
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    assert not torch.allclose(found.logits, make()(ids[:, 13:]).logits)
    assert int(model.get_memory_state().layers[0].written) == 30
    assert model.get_memory_state().layers[1] is None  # softmax attention starts anew with each segment


def test_no_update_leaves_the_memory_and_reads_the_same() -> None:
    model, ids = make(), text(30)
    model.reset_memory()
    model(ids[:, :13])
    before = model.get_memory_state()
    quiet = model(ids[:, 13:], update_memory=False)
    assert model.get_memory_state() is before
    assert torch.equal(quiet.logits, model(ids[:, 13:]).logits)
    assert int(model.get_memory_state().layers[0].written) == 30
    assert int(before.layers[0].written) == 13
    given = model(ids[:, 13:], before, update_memory=False)
    assert given.state is before
    assert torch.equal(given.logits, quiet.logits)


def test_training_leaves_the_session_alone() -> None:
    model, ids = make(), text(20)
    stateless = model(ids).logits
    model.reset_memory()
    model(ids)
    before = model.get_memory_state()
    model.train()
    assert torch.equal(model(ids).logits, stateless)
    assert model.get_memory_state() is before


def test_a_session_ends_and_begins_empty() -> None:
    model, ids = make(), text(20)
    with pytest.raises(RuntimeError, match="reset_memory"):
        model.get_memory_state()
    model.reset_memory()
    fresh = model(ids).logits
    model.reset_memory()
    assert torch.equal(model(ids).logits, fresh)
    model.end_session()
    assert torch.equal(model(ids).logits, fresh)
    assert model.session is None


def test_a_session_keeps_no_graph() -> None:
    model = make()
    model.reset_memory()
    model(text(20))
    assert not model.get_memory_state().layers[0].M.requires_grad


def test_another_number_of_rows_is_refused() -> None:
    model = make()
    model.reset_memory(batch_size=2)
    with pytest.raises(ValueError, match=r"the state has 2 row\(s\), the input 1"):
        model(text(5))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.reset_memory(0)


def test_a_state_of_another_model_is_refused() -> None:
    state = make(hidden_size=32)(text(5)).state
    with pytest.raises(ValueError, match=r"layers.0.M is \[1, 1, 32, 32\] float64, here \[1, 1, 16, 16\] float64"):
        make().set_memory_state(state)
    with pytest.raises(ValueError, match=r"layers.0.M is missing"):
        make().set_memory_state(make("pythia")(text(5)).state)


# generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pythia", "infini", "multi_memory", "hierarchical"])
def test_generation_is_greedy_choice_by_full_forwards(name: str) -> None:
    model, ids = make(name), text(11, rows=2)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 12), expected)


def test_generation_goes_on_from_the_session_and_writes_all_of_its_text() -> None:
    model, ids = make(), text(10)
    model.reset_memory()
    model(text(20, seed=5))
    memories = model.get_memory_state()
    out = model.generate(ids, 6)
    assert torch.equal(out, model.generate(ids, 6, memories))
    assert int(model.get_memory_state().layers[0].written) == 20 + 16
    model.end_session()
    assert not torch.equal(out, model.generate(ids, 6))
    assert model.session is None


def test_generation_stops_at_the_end_token() -> None:
    model, ids = make(), text(10, rows=2)
    free = model.generate(ids, 8)
    end = int(free[0, 12])
    out = model.generate(ids, 8, eos_token_id=end)
    stop = 10 + int((free[0, 10:] == end).int().argmax())
    assert torch.equal(out[0, : stop + 1], free[0, : stop + 1])
    assert (out[0, stop:] == end).all()
    assert torch.equal(model.generate(ids[:1], 8, eos_token_id=end), free[:1, : stop + 1])


def test_a_low_temperature_is_greedy_and_a_high_one_is_not() -> None:
    model, ids = make(), text(10, rows=2)
    assert torch.equal(model.generate(ids, 8, temperature=1e-4), model.generate(ids, 8))
    assert not torch.equal(model.generate(ids, 8, temperature=100.0), model.generate(ids, 8))


def test_generation_needs_a_text_and_eval() -> None:
    with pytest.raises(ValueError, match="token at least"):
        make().generate(text(0), 3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        make().train().generate(text(3), 3)


# files ------------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from senri.lm import create_model, load_memory
weights, memory, ids, logits = sys.argv[1:]
model = create_model("hierarchical", vocab_size=97, hidden_size=16, num_heads=2, intermediate_size=24, num_layers=2,
                     segment_size=6).double().eval()
model.load_state_dict(load_file(weights))
load_memory(memory, model)
save_file({"logits": model(load_file(ids)["ids"]).logits.detach()}, logits)
"""


def test_another_process_goes_on_with_the_same_logits(tmp_path: Path) -> None:
    model = make("hierarchical")
    model.reset_memory()
    model(text(25))
    weights, memory, ids, logits = (str(tmp_path / name) for name in ("w.safetensors", "m", "ids", "logits"))
    save_file(model.state_dict(), weights)
    save_file({"ids": text(9, seed=3)}, ids)
    save_memory(memory, model)
    expected = model(text(9, seed=3)).logits
    subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, weights, memory, ids, logits], check=True, env={"PYTHONPATH": str(SRC)}
    )
    torch.testing.assert_close(load_file(logits)["logits"], expected, **EXACT)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    model = make()
    model.reset_memory()
    model(text(25))
    save_memory(path, model)
    for other, message in (
        (make(seed=1), "fingerprint is"),
        (make(segment_size=7), r"layers is .*'segment_size': 6"),
        (make("multi_memory"), r"layers is .*InfiniLayer.*MultiMemoryLayer"),
    ):
        with pytest.raises(StateFileError, match=message):
            load_memory(path, other)
        assert other.session is None
    faster = make()
    faster.layers[0].numbers["chunk_size"] = 3  # a matter of speed
    load_memory(path, faster)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateFileError, match="damaged"):
        load_memory(path, model)
    path.write_bytes(data[:100])
    with pytest.raises(StateFileError, match="damaged"):
        load_memory(path, model)
    with pytest.raises(StateFileError, match="no such file"):
        load_memory(tmp_path / "none", model)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reset_memory"):
        save_memory(tmp_path / "memory", make())
    model = make("pythia")
    model.reset_memory()
    with pytest.raises(ValueError, match="no memory layer"):
        save_memory(tmp_path / "memory", model)
