"""Conversion of a pretrained model: its weights as they are, a window for every layer, memories that start silent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from senri.hf.configuration_senri import SenriConfig, preset_for
from senri.hf.modeling_senri import SenriForCausalLM

SUPPORTED = ("llama", "qwen2")
_BASE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
)


def is_added(name: str) -> bool:
    """Whether a parameter of a Senri model is one that conversion added."""
    return ".memory." in name or name.startswith("unigram_cache.")


def convert_to_senri(model_or_path: PreTrainedModel | str | Path, **config_overrides: Any) -> SenriForCausalLM:
    """Convert a Llama-architecture (SmolLM, SmolLM2, Llama) or Qwen2 model.

    Within the window the converted model's logits are the base's; the memory adds nothing until it is calibrated or
    trained.

    Args:
        model_or_path: a loaded transformers model (left as it is), a directory, a hub name, or a ``.gguf`` file.
        config_overrides: fields of :class:`SenriConfig`; the rest comes from the base's preset.

    Raises:
        ValueError: another architecture, a path without a model, an impossible configuration.
    """
    if not isinstance(model_or_path, PreTrainedModel):
        return take_over(model_or_path, **config_overrides)
    weights = {name: weight.clone() for name, weight in model_or_path.state_dict().items()}
    return _with_weights(model_or_path, weights, **config_overrides)


def take_over(model_or_path: PreTrainedModel | str | Path, **config_overrides: Any) -> SenriForCausalLM:
    """:func:`convert_to_senri` where nobody else needs the loaded model: its weights become the new one's, so that they
    never exist twice.
    """
    base = model_or_path if isinstance(model_or_path, PreTrainedModel) else load_pretrained(model_or_path)
    return _with_weights(base, base.state_dict(), **config_overrides)


def _with_weights(base: PreTrainedModel, weights: dict[str, Tensor], **config_overrides: Any) -> SenriForCausalLM:
    """``base`` with memories, made of the very tensors in ``weights``."""
    check_architecture(base.config)
    config = senri_config(base.config, **config_overrides)
    with no_init_weights():  # the base's weights follow
        model = SenriForCausalLM(config)
    for memory in model.model.memories.values():
        memory.reset_parameters()
    if model.unigram_cache is not None:
        model.unigram_cache.reset_parameters()
    # what stood in their place was never written to, and so never took memory
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    lost = [name for name in missing if not is_added(name) and name != "lm_head.weight"]
    if lost or unexpected:
        raise ValueError(f"the weights do not fit: missing {lost[:3]}, unexpected {list(unexpected)[:3]}")
    model.tie_weights()
    if base.generation_config is not None:
        model.generation_config = copy.deepcopy(base.generation_config)
    return model.to(base.device, base.dtype).eval()


def convert_qwen_to_senri(model_or_path: PreTrainedModel | str | Path, **config_overrides: Any) -> SenriForCausalLM:
    """:func:`convert_to_senri` for a Qwen2 model; the preset ``qwen2.5-0.5b`` applies to Qwen2.5-0.5B.

    Raises:
        ValueError: the model is no Qwen2.
    """
    base = model_or_path if isinstance(model_or_path, PreTrainedModel) else load_pretrained(model_or_path)
    if base.config.model_type != "qwen2":
        raise ValueError(f"this is a {base.config.model_type!r} model, not qwen2: use convert_to_senri()")
    convert = convert_to_senri if base is model_or_path else take_over
    return convert(base, **config_overrides)


def senri_config(base: PreTrainedConfig, **overrides: Any) -> SenriConfig:
    """The Senri configuration for a base model's: its shape, its preset, then ``overrides``."""
    fields = {name: getattr(base, name) for name in _BASE_FIELDS if getattr(base, name, None) is not None}
    if base.model_type == "qwen2":
        fields["qkv_bias"] = True
    return SenriConfig(**{**fields, **preset_for(base), **overrides})


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises ValueError unless the model can be converted."""
    if config.model_type == "senri":
        raise ValueError("this is a Senri model already: load it with SenriForCausalLM.from_pretrained()")
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"architecture {config.model_type!r} is not supported: Senri converts Llama-architecture models "
            "(SmolLM, SmolLM2, Llama) and Qwen2"
        )


def load_pretrained(path: str | Path) -> PreTrainedModel:
    """A base model from a directory, a hub name or a ``.gguf`` file.

    Raises:
        ValueError: nothing there, or an architecture that cannot be converted, in one line.
    """
    where = gguf_location(path)
    try:
        if "gguf_file" not in where:  # a .gguf says its architecture only once it is read
            check_architecture(AutoConfig.from_pretrained(where["pretrained_model_name_or_path"]))
        return AutoModelForCausalLM.from_pretrained(**where, dtype="auto")
    except Exception as error:  # a damaged .gguf fails in any way: struct.error, IndexError, KeyError
        if not isinstance(error, OSError) and "gguf_file" not in where:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"cannot load a model from {str(path)!r}: {reason}") from None


def gguf_location(path: str | Path) -> dict[str, str]:
    """Arguments of ``from_pretrained`` for a path that may be a ``.gguf`` file or a folder that holds just one."""
    place = Path(path)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise ValueError(f"{path}: no such file")
        return {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name}
    if str(path).startswith(("/", "./", "../", "~")) and not place.exists():
        raise ValueError(f"cannot load a model from {str(path)!r}: no such file or folder")
    if place.is_dir() and not (place / "config.json").exists():
        files = sorted(place.glob("*.gguf"))
        if len(files) != 1:
            found = "several .gguf files: name one" if files else "neither config.json nor a .gguf file"
            raise ValueError(f"{path} has {found}")
        return gguf_location(files[0])
    return {"pretrained_model_name_or_path": str(path)}
