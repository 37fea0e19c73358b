"""Adapters: the added weights alone, in one small safetensors file that goes onto the unchanged base model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from senri.files import fingerprint, write_atomically
from senri.hf.convert import is_added, take_over
from senri.hf.modeling_senri import SenriForCausalLM

# What an adapter's weights depend on; the rest of the configuration is the base's.
CONFIG_FIELDS = (
    "sliding_window_size",
    "chunk_size",
    "segment_size",
    "num_memory_layers",
    "first_memory_layer",
    "memory_layer_interval",
    "memory_num_heads",
    "memory_num_key_value_heads",
    "memory_head_dim",
    "memory_num_slots",
    "update_rule",
    "feature_map",
    "store",
    "memory_readout",
    "memory_gate",
    "memory_conv_size",
    "memory_context_size",
    "write_gate",
    "unigram_cache",
    "routing",
    "routing_basis",
    "top_k_memories",
    "num_memory_banks",
    "segments_per_bank",
    "num_memories",
    "memory_sharing",
    "use_alibi",
    "alibi_scale",
)


LORA_SCALE = 2
LORA_TARGETS = r".*\.self_attn\.[qkvo]_proj"
_LORA = ".lora_"


def add_lora(model: SenriForCausalLM, rank: int) -> None:
    """Put LoRA of ``rank`` on the base's attention projections, in place (Hu et al. 2022)."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=LORA_TARGETS), model)


def adapter_weights(model: SenriForCausalLM) -> dict[str, Tensor]:
    """The parameters that conversion added, by name."""
    return {name: p for name, p in model.named_parameters() if is_added(name)}


def base_fingerprint(model: SenriForCausalLM) -> str:
    """Fingerprint of the weights that an adapter goes onto: all but the added ones."""
    return fingerprint(
        (name.replace(".base_layer.", "."), p)
        for name, p in model.named_parameters()
        if not is_added(name) and _LORA not in name
    )


def save_adapter(model: SenriForCausalLM, path: str | Path, **notes: Any) -> None:
    """Write the added weights (bfloat16) with the configuration they need; ``notes`` are JSON values kept beside it.

    The weights of :func:`add_lora` are among them.

    Raises:
        ValueError: the model is wrapped by PEFT in another way.
        FileError: the file cannot be written; nothing is left behind.
    """
    lora = {name: p for name, p in model.named_parameters() if _LORA in name}
    ours = all(_is_ours(model, name.partition(_LORA)[0]) for name in lora)
    if not ours or (not lora and any("base_layer" in name for name, _ in model.named_parameters())):
        raise ValueError("the model is wrapped by PEFT: merge_and_unload() it first, or save PEFT's adapter with PEFT")
    header = {
        "config": {name: getattr(model.config, name) for name in CONFIG_FIELDS},
        "base_fingerprint": base_fingerprint(model),
        "notes": notes,
    }
    added = {**adapter_weights(model), **lora}
    tensors = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in added.items()}
    write_atomically(Path(path), serialize(tensors, metadata={"senri_adapter": json.dumps(header)}))


def read_adapter_header(path: str | Path) -> dict[str, Any]:
    """``config`` and ``notes`` of an adapter file.

    Raises:
        ValueError: missing, truncated, or no adapter.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no adapter, or truncated or corrupt ({error})") from None
    if "senri_adapter" not in metadata:
        raise ValueError(f"{path} is a safetensors file but no Senri adapter")
    return json.loads(metadata["senri_adapter"])


def has_lora(path: str | Path) -> bool:
    """Whether an adapter file changes the base too, by LoRA."""
    with safe_open(path, framework="pt") as file:
        return any(_LORA in name for name in file.keys())  # noqa: SIM118


@torch.no_grad()
def load_adapter(base: Any, path: str | Path, **config_overrides: Any) -> SenriForCausalLM:
    """Convert ``base`` with the adapter's configuration and put the adapter's weights on.

    Args:
        base: a loaded model, whose weights become the new model's, or a place, as for ``convert_to_senri``.
        config_overrides: fields of the configuration that change no weight's shape, e.g. ``sliding_window_size``.

    Raises:
        ValueError: no adapter file, or one for another base model.
    """
    header = read_adapter_header(path)
    if missing := [name for name in CONFIG_FIELDS if name not in header["config"]]:
        raise ValueError(f"{path} was made by an older Senri, which knew no {', '.join(missing)}: train it again")
    try:
        model = take_over(base, **{**header["config"], **config_overrides})
    except ValueError as error:
        raise ValueError(f"the adapter {path} does not fit this base model: {error}") from None
    if base_fingerprint(model) != header["base_fingerprint"]:
        raise ValueError(f"{path} is an adapter for another base model: its base_fingerprint differs")
    ours = adapter_weights(model)
    with safe_open(path, framework="pt") as file:
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lora = {name: theirs.pop(name) for name in list(theirs) if _LORA in name}
    if {n: t.shape for n, t in theirs.items()} != {n: p.shape for n, p in ours.items()}:
        raise ValueError(
            f"{path} does not fit its own configuration: it is damaged, or of another version of Senri: make it again"
        )
    for name, parameter in ours.items():
        parameter.copy_(theirs[name])
    _merge_lora(model, lora)
    return model


def _merge_lora(model: SenriForCausalLM, lora: dict[str, Tensor]) -> None:
    """Add the low-rank differences to the weights they are of."""
    for name, down in lora.items():
        if ".lora_A." in name:
            up = lora[name.replace(".lora_A.", ".lora_B.")]
            weight = model.get_parameter(name.partition(_LORA)[0] + ".weight")
            difference = LORA_SCALE * (up.float() @ down.float()).to(weight.device)
            weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + difference)


def _is_ours(model: SenriForCausalLM, module: str) -> bool:
    """Whether LoRA on a module is of :func:`add_lora`."""
    scaling = getattr(model.get_submodule(module), "scaling", {})
    return re.fullmatch(LORA_TARGETS, module) is not None and set(scaling.values()) == {LORA_SCALE}
