"""A saved memory: continues as if never saved, fits only its own model, is whole or not there."""

import os
import random

import pytest
import torch
from safetensors.torch import save_file

from senri.files import FileError
from senri.hf import memory_file
from senri.hf.memory_file import MemoryFileError, read_header

from ..conftest import STORES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
CASES = [
    {"update_rule": "delta", "write_gate": "hidden", "memory_conv_size": 3},
    {"update_rule": "delta_token", "memory_readout": "head", "write_gate": "surprise", "memory_conv_size": 3},
    {"memory_gate": "infini", "memory_head_dim": 8},
    {"num_sink_tokens": 4},
    {"update_rule": "delta_token", "memory_readout": "head", "write_gate": "surprise", "memory_context_size": 5},
    *({"memory_readout": "head", "memory_context_size": 5} | store for store in STORES),
]


@pytest.fixture
def saved(make_senri, tokens, tmp_path):
    """A model that has read 30 tokens, and its file."""
    model = make_senri()
    model.read(tokens(1, 30))
    model.save_memory(tmp_path / "a.senri")
    return model, tmp_path / "a.senri"


@pytest.mark.parametrize("steps", [3, 30], ids=["short", "long"])
@pytest.mark.parametrize("before", ["", "flush", "write_window"])
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
@torch.no_grad()
def test_going_on_from_a_file_is_as_if_never_saved(make_senri, tokens, tmp_path, options, before, steps):
    model, path = make_senri(**options), tmp_path / "a.senri"
    model.reset_memory(2)
    mask = torch.ones(2, steps)
    mask[1, :2] = 0
    model(tokens(2, steps), attention_mask=mask)
    if before:
        getattr(model, before)()
    model.save_memory(path, source="a book", lines=(1, 2))
    more = [tokens(2, 5, seed=2), tokens(2, 11, seed=3)]
    expected = [model(ids).logits for ids in more]
    other = make_senri(**options)
    header = other.load_memory(path)
    assert header["tokens_read"] == [steps, steps - 2]
    assert (header["source"], header["lines"], header["dtype"]) == ("a book", [1, 2], "float64")
    assert header == read_header(path)
    assert other.session.has_padding == (before != "flush")
    for ids, logits in zip(more, expected, strict=True):
        torch.testing.assert_close(other(ids).logits, logits, **EXACT)
    left, right = model.session.named_tensors(), other.session.named_tensors()
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], msg=key, **EXACT)


@torch.no_grad()
def test_a_session_that_read_nothing_can_be_saved(make_senri, tokens, tmp_path):
    model, ids = make_senri(), tokens(1, 20)
    model.reset_memory()
    model.save_memory(tmp_path / "a.senri")
    other = make_senri()
    assert other.load_memory(tmp_path / "a.senri")["tokens_read"] == [0]
    torch.testing.assert_close(other(ids).logits, make_senri()(ids).logits, **EXACT)


@pytest.mark.parametrize("flush", [False, True])
@torch.no_grad()
def test_a_memory_moves_between_precisions(make_senri, tokens, tmp_path, flush):
    writer = make_senri(dtype=torch.float32)
    writer.read(tokens(1, 40))
    if flush:
        writer.flush()
    writer.save_memory(tmp_path / "a.senri")
    expected = writer(tokens(1, 6, seed=2)).logits
    for dtype, tolerance in [(torch.float64, 1e-4), (torch.bfloat16, 0.5)]:
        reader = make_senri(dtype=torch.float32).to(dtype)
        reader.load_memory(tmp_path / "a.senri")
        memory = reader.session.state.layers[1].memory.memory
        assert memory.M.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert reader.session.state.layers[1].keys.dtype == dtype
        logits = reader(tokens(1, 6, seed=2)).logits
        assert logits.dtype == dtype
        assert (logits - expected).abs().max() < tolerance
    assert expected.abs().max() > 2


@torch.no_grad()
def test_the_file_holds_the_state_and_little_else(make_senri, tokens, tmp_path):
    model = make_senri(dtype=torch.float32, sliding_window_size=64, num_sink_tokens=64)
    sizes = {}
    for length in (100, 1000):
        model.end_session()
        model.read(tokens(1, length))
        model.flush()
        model.save_memory(tmp_path / "a.senri")
        sizes[length] = (tmp_path / "a.senri").stat().st_size
        assert model.session.memory_nbytes < sizes[length] < model.session.memory_nbytes + 4096
    assert abs(sizes[100] - sizes[1000]) < 16  # digits of the counters


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("update_rule", {"update_rule": "gated_delta"}),
        ("sliding_window_size", {"sliding_window_size": 8}),
        ("num_sink_tokens", {"num_sink_tokens": 0}),
        ("memory_layers", {"first_memory_layer": 0}),
        ("memory_heads", {"memory_num_key_value_heads": 4}),
        ("memory_readout", {"memory_readout": "head"}),
        ("feature_map", {"feature_map": "relu"}),
        ("memory_conv_size", {"memory_conv_size": 2}),
        ("memory_context_size", {"memory_context_size": 2}),
        ("model_fingerprint", {"write_gate": "hidden"}),
        ("store", {"store": "multi"}),
        ("memory_sharing", {"memory_sharing": True}),
        ("alibi_scale", {"use_alibi": True}),
    ],
)
@torch.no_grad()
def test_another_models_memory_is_refused_by_name(make_senri, tokens, saved, field, options):
    other = make_senri(**options)
    other.read(tokens(1, 4))
    with pytest.raises(MemoryFileError, match=f"does not fit this model: {field} is .* in the file, .* here"):
        other.load_memory(saved[1])
    assert other.session.tokens_read == [4], "an open session stays"


@torch.no_grad()
def test_other_weights_are_refused(saved, make_senri, randomise):
    _, path = saved
    with pytest.raises(MemoryFileError, match="model_fingerprint is"):
        randomise(make_senri(), seed=2).load_memory(path)
    other = make_senri()
    other.model.layers[0].mlp.up_proj.weight[3, 3] += 0.1
    with pytest.raises(MemoryFileError, match="model_fingerprint is"):
        other.load_memory(path)
    make_senri().load_memory(path)


def test_another_tokenizer_is_refused(make_senri, tokens, tmp_path, real_tokenizer):
    import copy

    from tokenizers.pre_tokenizers import ByteLevel

    other = copy.deepcopy(real_tokenizer)
    other.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model, path = make_senri(), tmp_path / "a.senri"
    model.read(tokens(1, 9))
    model.save_memory(path, real_tokenizer)
    model.load_memory(path, real_tokenizer)
    model.load_memory(path)  # no tokenizer named: nothing to compare
    with pytest.raises(MemoryFileError, match="another tokenizer: tokenizer_fingerprint is"):
        model.load_memory(path, other)


def test_another_format_version_is_refused_by_name(saved, make_senri, monkeypatch):
    version = memory_file.FORMAT_VERSION
    monkeypatch.setattr(memory_file, "FORMAT_VERSION", version + 1)
    with pytest.raises(MemoryFileError, match=f"format_version is {version} in the file, {version + 1} here"):
        make_senri().load_memory(saved[1])


def test_a_damaged_file_never_loads(saved, make_senri):
    model, path = saved
    data = path.read_bytes()
    chance = random.Random(0)
    places = [
        *range(0, len(data), max(len(data) // 60, 1)),
        *(chance.randrange(len(data)) for _ in range(100)),
    ]
    header_end = 8 + int.from_bytes(data[:8], "little")
    assert 300 < header_end < len(data) - 1000
    places += range(8, header_end, 7)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
        with pytest.raises(MemoryFileError):
            model.load_memory(path)
    for length in (0, 1, 7, 8, 9, header_end // 2, header_end, header_end + 1, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(MemoryFileError, match="no Senri memory, or truncated or corrupt"):
            model.load_memory(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(MemoryFileError):
        model.load_memory(path)
    path.write_bytes(data)
    make_senri().load_memory(path)


def test_a_flipped_number_is_named_corruption(saved):
    model, path = saved
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(MemoryFileError, match="is corrupt: its content does not match its checksum"):
        model.load_memory(path)
    with pytest.raises(MemoryFileError, match="is corrupt"):
        read_header(path)


def test_foreign_files_are_refused(make_senri, tmp_path):
    model = make_senri()
    with pytest.raises(MemoryFileError, match="no such file; make one with: senri read TEXT -o"):
        model.load_memory(tmp_path / "none.senri")
    with pytest.raises(MemoryFileError, match="no such file"):
        model.load_memory(tmp_path)
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, foreign)
    with pytest.raises(MemoryFileError, match="is a safetensors file but no Senri memory"):
        model.load_memory(foreign)
    (tmp_path / "book.txt").write_text("In the beginning " * 100)
    with pytest.raises(MemoryFileError, match="is no Senri memory"):
        model.load_memory(tmp_path / "book.txt")
    assert model.session is None


def no_space(*_):
    raise OSError(28, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("failure", "error"), [(no_space, FileError), (interrupt, KeyboardInterrupt)])
def test_a_failed_write_leaves_the_older_file_and_nothing_else(saved, tokens, monkeypatch, call, failure, error):
    model, path = saved
    before = path.read_bytes()
    model.read(tokens(1, 9))
    monkeypatch.setattr(os, call, failure)
    with pytest.raises(error) as caught:
        model.save_memory(path)
    if error is FileError:
        assert "No space left on device" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [file.name for file in path.parent.iterdir()] == ["a.senri"]
    assert path.read_bytes() == before
    monkeypatch.undo()
    model.save_memory(path)
    assert read_header(path)["tokens_read"] == [39]


def test_a_place_that_cannot_be_written(saved, tmp_path):
    model, _ = saved
    with pytest.raises(FileError, match=r"cannot write .*No such file or directory"):
        model.save_memory(tmp_path / "no" / "folder" / "a.senri")
    with pytest.raises(FileError, match="cannot write"):
        model.save_memory(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.senri"]


def test_a_model_that_rotates_otherwise_is_refused(make_senri, tokens, tmp_path):
    model = make_senri()
    model.read(tokens(1, 40))
    model.save_memory(tmp_path / "a.senri")
    model.config.rms_norm_eps *= 10
    with pytest.raises(MemoryFileError, match="rms_norm_eps is"):
        model.load_memory(tmp_path / "a.senri")
