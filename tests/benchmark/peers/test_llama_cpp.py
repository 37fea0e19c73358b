"""llama.cpp as a peer: the file it is given, how it is called, and where it is there, that it runs the same model."""

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from senri.benchmark.peers import llama_cpp, llama_cpp_script
from senri.benchmark.texts import book_ids
from senri.hf.base import base_directory, load_tokenizer
from senri.hf.convert import load_pretrained

REPOSITORY = Path(__file__).parents[3]
LLAMA = REPOSITORY / ".venv-llama/bin/python"
SETTINGS: dict[str, Any] = {
    "gguf": "model.gguf",
    "ids": "ids.npy",
    "tokens": 700,
    "decode": 3,
    "repeats": 2,
    "threads": 1,
    "n_batch": 300,
    "n_ubatch": 100,
    "flash_attention": True,
    "logits": None,
}


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A llama of one layer, its tensors in several types, with metadata of all kinds."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "Ġ"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    random = np.random.default_rng(0)
    for name, shape, kind in (
        ("token_embd.weight", (4, 64), gguf.GGMLQuantizationType.Q8_0),
        ("blk.0.attn_q.weight", (64, 64), gguf.GGMLQuantizationType.Q4_1),
        ("blk.0.attn_norm.weight", (64,), gguf.GGMLQuantizationType.F32),
    ):
        values = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(path: Path) -> dict[str, torch.Tensor]:
    return {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_the_copy_holds_the_weights_rounded_to_bfloat16(tmp_path: Path, tiny_gguf: Path, precision: str) -> None:
    copy = tmp_path / "copy.gguf"
    llama_cpp.write_gguf(tiny_gguf, copy, precision)
    found, wanted = values(copy), values(tiny_gguf)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        rounded = tensor.to(torch.bfloat16).float()
        assert not torch.equal(rounded, tensor)  # or rounding would not be tested
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], rounded)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(copy).tensors}
    assert types == {
        "token_embd.weight": precision.upper(),
        "blk.0.attn_q.weight": precision.upper(),
        "blk.0.attn_norm.weight": "F32",
    }


def test_eight_bits_are_within_half_a_step(tmp_path: Path, tiny_gguf: Path) -> None:
    copy = tmp_path / "copy.gguf"
    llama_cpp.write_gguf(tiny_gguf, copy, "q8_0")
    for name, tensor in values(tiny_gguf).items():
        wanted = tensor.to(torch.bfloat16).float().reshape(-1, 32)  # blocks of one scale
        step = wanted.abs().amax(1, keepdim=True) / 127
        assert (values(copy)[name].reshape(-1, 32) - wanted).abs().le(0.6 * step).all()  # the scale is a half itself


def test_the_copy_keeps_everything_else(tmp_path: Path, tiny_gguf: Path) -> None:
    copy = tmp_path / "copy.gguf"
    llama_cpp.write_gguf(tiny_gguf, copy, "bf16")
    found, wanted = (
        {f.name: (f.types, f.contents()) for f in gguf.GGUFReader(path).fields.values()} for path in (copy, tiny_gguf)
    )
    assert wanted["general.file_type"][1] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert found["general.file_type"][1] == gguf.LlamaFileType.MOSTLY_BF16
    found["general.file_type"] = wanted["general.file_type"]
    assert found == wanted
    assert found["tokenizer.ggml.tokens"][1] == ["a", "b", "ab", "Ġ"]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path, precision: str) -> None:
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp.platformdirs, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(llama_cpp, "base_directory", lambda: tmp_path / "base")
    monkeypatch.setattr(llama_cpp, "find_gguf", lambda: tiny_gguf)
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "write_gguf", fail)
        with pytest.raises(KeyboardInterrupt):
            llama_cpp.base_gguf("bf16")
    assert list(tmp_path.iterdir()) == [tiny_gguf]
    made = llama_cpp.base_gguf("bf16")
    assert made == tmp_path / "base-bf16.gguf"
    assert values(made).keys() == values(tiny_gguf).keys()
    made.write_bytes(b"")
    assert llama_cpp.base_gguf("bf16").stat().st_size == 0  # made once


@pytest.fixture
def no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the text nor the model is needed for what goes wrong before."""
    monkeypatch.setattr(llama_cpp, "base_directory", lambda: tmp_path)
    monkeypatch.setattr(llama_cpp, "load_tokenizer", lambda place: None)
    monkeypatch.setattr(llama_cpp, "book_ids", lambda tokens, tokenizer: torch.arange(tokens))
    monkeypatch.setattr(llama_cpp, "find_gguf", lambda: tmp_path)


def test_without_a_python_it_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match=r"no Python with llama_cpp is named: run make bench-llama"):
        llama_cpp.measure(8, 1, 1)
    with pytest.raises(ValueError, match=r"nowhere/python: no such Python; make bench-llama"):
        llama_cpp.measure(8, 1, 1, python="nowhere/python")


@pytest.mark.usefixtures("no_model")
def test_a_python_without_llama_cpp_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "base_gguf", lambda precision: tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"No module named 'llama_cpp'; make bench-llama") as caught:
        llama_cpp.measure(8, 1, 1, python=sys.executable)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_model")
def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"precision 'q1' is not one of: bf16, f16, q8_0"):
        llama_cpp.measure(8, 1, 1, python=sys.executable, precision="q1")


def test_settings_come_through() -> None:
    assert llama_cpp_script.parse([json.dumps(SETTINGS)]) == SETTINGS
    assert llama_cpp_script.parse([json.dumps({**SETTINGS, "logits": "x.npy"})])["logits"] == "x.npy"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give one argument"),
        (["{", "}"], "give one argument"),
        (["{"], "the settings are no JSON: Expecting property name"),
        (["[]"], "the settings must be exactly: gguf, ids, tokens"),
        ([json.dumps({k: v for k, v in SETTINGS.items() if k != "ids"})], "the settings must be exactly"),
        ([json.dumps({**SETTINGS, "thread": 1})], "the settings must be exactly"),
        ([json.dumps({**SETTINGS, "tokens": "8"})], "tokens cannot be '8'"),
        ([json.dumps({**SETTINGS, "tokens": 0})], "tokens must be at least 1, not 0"),
        ([json.dumps({**SETTINGS, "decode": -1})], "decode must be at least 0, not -1"),
        ([json.dumps({**SETTINGS, "repeats": True})], "repeats cannot be True"),
        ([json.dumps({**SETTINGS, "flash_attention": 1})], "flash_attention cannot be 1"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        llama_cpp_script.parse(arguments)


class FakeLlama(SimpleNamespace):
    """As much of llama_cpp as the script calls; after each token its successor is the likeliest."""

    VOCABULARY = 1000
    __version__ = "0"
    llama_token = ctypes.c_int32

    def __init__(self) -> None:
        super().__init__(texts=[[]], batches=[], parameters=SimpleNamespace(), fails_at=None)
        nothing = ("llama_log_set", "llama_backend_init", "llama_synchronize", "llama_get_memory")
        for name in nothing:
            setattr(self, name, lambda *_: None)
        self.llama_log_callback = lambda function: function
        self.llama_model_default_params = lambda: None
        self.llama_model_load_from_file = lambda path, _: 1 if path != b"none.gguf" else None
        self.llama_context_default_params = lambda: self.parameters
        self.llama_init_from_model = lambda model, parameters: 1
        self.llama_model_get_vocab = lambda model: 1
        self.llama_vocab_n_tokens = lambda vocabulary: self.VOCABULARY
        self.llama_memory_clear = lambda memory, data: self.texts.append([])
        self.llama_batch_get_one = lambda pointer, n: [pointer[i] for i in range(n)]
        self.llama_state_seq_get_size = lambda context, sequence: 10 * len(self.texts[-1])
        self.llama_print_system_info = lambda: b"CPU : AVX = 1 | AMX = 0 | "

    def llama_decode(self, context: int, batch: list[int]) -> int:
        self.texts[-1] += batch
        self.batches.append(len(batch))
        return int(len(self.texts[-1]) == self.fails_at)

    def llama_get_logits_ith(self, context: int, i: int) -> Any:
        row = np.zeros(self.VOCABULARY, dtype=np.float32)
        row[self.texts[-1][i] + 1] = 1.0
        self.kept = row
        return row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(SETTINGS, "ids", str(tmp_path / "ids.npy"))
    np.save(tmp_path / "ids.npy", np.arange(800, dtype=np.int32) % 900)
    return fake


def test_the_script_reads_the_text_in_batches_then_decodes_greedily(fake: FakeLlama) -> None:
    result = llama_cpp_script.measure(SETTINGS)
    text = list(range(700))
    assert fake.texts == [text[: llama_cpp_script.WARM_UP], [*text, 700, 701, 702], [*text, 700, 701, 702]]
    assert fake.batches == [300, 212, *2 * [300, 300, 100, 1, 1, 1]]
    assert (len(result["seconds"]), len(result["decode_seconds"])) == (2, 2)
    assert result["state_bytes"] == 7000  # of what was read, not of what was made
    assert result["about"] == "llama-cpp-python 0; CPU : AVX"
    assert (fake.parameters.n_ctx, fake.parameters.n_batch, fake.parameters.n_ubatch) == (703, 300, 100)
    assert fake.parameters.n_threads == fake.parameters.n_threads_batch == 1
    assert fake.parameters.flash_attn_type == 1
    assert llama_cpp_script.measure({**SETTINGS, "decode": 0})["decode_seconds"] == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"tokens": 801}, "holds 800 tokens, fewer than 801"), ({"gguf": "none.gguf"}, "cannot load none.gguf")],
)
def test_what_cannot_be_read_is_named(fake: FakeLlama, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        llama_cpp_script.measure({**SETTINGS, **changes})


def test_a_failure_of_llama_cpp_is_no_time(fake: FakeLlama) -> None:
    fake.fails_at = 600
    with pytest.raises(ValueError, match="llama_decode failed with status 1"):
        llama_cpp_script.measure(SETTINGS)


@pytest.mark.slow
def test_the_file_for_llama_cpp_holds_the_base_bit_for_bit() -> None:
    base = load_pretrained(base_directory()).state_dict()
    copy = load_pretrained(llama_cpp.base_gguf("bf16")).state_dict()
    assert copy.keys() == base.keys()
    assert [name for name in base if not torch.equal(copy[name].float(), base[name].float())] == []


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.exists(), reason="make bench-llama makes it")
def test_llama_cpp_predicts_as_transformers_does() -> None:
    ids = book_ids(256, load_tokenizer(base_directory()))
    model = LlamaForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    found = torch.from_numpy(llama_cpp.logits(len(ids), LLAMA))
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.97
    loss, base_loss = (F.cross_entropy(x[:-1], ids[1:]).item() for x in (found, wanted))
    assert loss == pytest.approx(base_loss, abs=0.01)
