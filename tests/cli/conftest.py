"""A command line to run in this process, and a small Senri model with the real tokenizer for it to load."""

import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from senri.cli.app import main
from senri.hf.convert import convert_to_senri
from senri.hf.modeling_senri import SenriForCausalLM

CONFIG = Path(__file__).parents[2] / "config"
MEMORY = {"sliding_window_size": 64, "chunk_size": 16, "segment_size": 50, "num_memory_layers": 1} | {
    "first_memory_layer": 1,
    "memory_num_heads": 2,
    "memory_head_dim": 8,
    "update_rule": "delta_token",
    "memory_conv_size": 2,
}
PIECE = 32


class Result(NamedTuple):
    code: int
    out: str
    err: str


def tiny_base() -> LlamaForCausalLM:
    """Random, with the vocabulary of the real tokenizer."""
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 49152}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    special = {"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**fields, **heads, **special, initializer_range=0.2)).eval()


@pytest.fixture(scope="session")
def base_folder(real_tokenizer, tmp_path_factory) -> Path:
    """A tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_base().save_pretrained(folder)
    real_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_folder(real_tokenizer, randomise, tmp_path_factory):
    """``(**config)`` -> folder of a tiny Senri whose memory speaks."""

    def make(**config: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "senri"
        model = randomise(convert_to_senri(tiny_base(), **{**MEMORY, **config}))
        model.save_pretrained(folder)
        real_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def senri_folder(make_folder) -> Path:
    return make_folder()


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """``(base, file={key: value}, ...)`` writes ./config for a model: no memory fields, small pieces, short answers."""

    def write(base: object, **changes: dict[str, Any]) -> None:
        target = tmp_path / "config"
        target.mkdir(exist_ok=True)
        for name in ("model", "training", "experiment"):
            values = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())
            if name == "model":
                values |= {"base_model_name": str(base), "adapter": "none", "dtype": "float32", "senri": {}}
            if name == "experiment":
                values["reading"]["piece_size"] = PIECE
                values["generation"]["max_new_tokens"] = 5
            values |= changes.get(name, {})
            (target / f"{name}.yaml").write_text(yaml.safe_dump(values))

    monkeypatch.chdir(tmp_path)
    return write


@pytest.fixture
def senri(configure, senri_folder, monkeypatch, capfd):
    """``(*arguments, stdin=None)`` runs ``senri`` in an empty folder with the tiny model configured."""
    configure(senri_folder)

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        monkeypatch.setattr(sys, "argv", ["senri", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        return Result(0 if code is None else code, *capfd.readouterr())

    return run


@pytest.fixture
def book(configure, real_text, tmp_path) -> Path:
    """./book.txt of about 600 tokens: 19 pieces, 9 windows."""
    (tmp_path / "book.txt").write_text(real_text[:2600], encoding="utf-8")
    return Path("book.txt")


@pytest.fixture
def interrupt(monkeypatch):
    """``(name, nth, after=False)``: the nth call of a method of SenriModel is cut short by Ctrl-C, once."""

    def arm(name: str, nth: int, after: bool = False) -> None:
        from senri.hf.modeling_senri import SenriModel

        whole, calls = getattr(SenriModel, name), [0]

        def cut(self: Any, *args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] != nth:
                return whole(self, *args, **options)
            if after:
                whole(self, *args, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(SenriModel, name, cut)

    return arm


@pytest.fixture(scope="session")
def one_line():
    """``(result, pattern)`` -> exit status 1, nothing but one line on stderr, and it matches."""

    def check(result: Result, pattern: str, code: int = 1) -> None:
        assert result.code == code, result
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert re.match(rf"senri: .*{pattern}", lines[0]), lines[0]

    return check


@pytest.fixture
def open_model(senri_folder, real_tokenizer):
    """The tiny model through the library."""
    return SenriForCausalLM.from_pretrained(senri_folder, dtype=torch.float32).eval()
