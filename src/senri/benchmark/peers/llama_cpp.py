"""llama.cpp with the base model's very weights, in the environment that ``make bench-llama`` compiles it in."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs
import torch

from senri.benchmark.texts import book_ids
from senri.hf.base import base_directory, find_gguf, load_tokenizer

SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
N_BATCH = 2048  # tokens of one call
N_UBATCH = 512  # tokens computed at once
FLASH_ATTENTION = True


def measure(
    tokens: int, decode: int, repeats: int, python: str | Path | None = None, precision: str = "bf16"
) -> dict[str, Any]:
    """Reading and decoding with llama.cpp, on as many threads as torch has. See :mod:`senri.benchmark.peers`.

    Args:
        python: of the environment that has llama_cpp.
        precision: of the weights: ``bf16`` (as Senri has them), ``f16`` or ``q8_0``.

    Returns:
        what every peer returns, and ``peak_bytes``: the largest resident memory of llama.cpp's process.

    Raises:
        ValueError: no such python, no llama_cpp in it, an unknown precision; what llama.cpp could not do.
    """
    threads = torch.get_num_threads()
    result = run(python, precision, tokens, decode=decode, repeats=repeats, threads=threads)
    note = (
        f"same weights in {precision}, cache f16, {threads} threads, n_batch {N_BATCH}, n_ubatch {N_UBATCH}, "
        f"flash attention {'on' if FLASH_ATTENTION else 'off'}; {result.pop('about')}"
    )
    return {"name": f"llama.cpp {precision}", "tokens": tokens, **result, "note": note}


def logits(tokens: int, python: str | Path | None, precision: str = "bf16") -> np.ndarray:
    """llama.cpp's logits at the text's first tokens, ``[tokens, vocabulary]``: a check that it runs the same model.

    Raises:
        ValueError: as :func:`measure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "logits.npy"
        run(python, precision, tokens, threads=torch.get_num_threads(), logits=str(target))
        return np.load(target)


def run(python: str | Path | None, precision: str, tokens: int, **settings: Any) -> dict[str, Any]:
    """What the script in the other environment answers; ``settings`` stand there.

    Raises:
        ValueError: as :func:`measure`.
    """
    if python is None:
        raise ValueError("no Python with llama_cpp is named: run make bench-llama and name .venv-llama/bin/python")
    if not Path(python).is_file():
        raise ValueError(f"{python}: no such Python; make bench-llama makes .venv-llama/bin/python")
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, book_ids(tokens, load_tokenizer(base_directory())).numpy().astype(np.int32))
        defaults = {
            "gguf": str(base_gguf(precision)),
            "ids": str(ids),
            "tokens": tokens,
            "decode": 0,
            "repeats": 1,
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
            "flash_attention": FLASH_ATTENTION,
            "logits": None,
        }
        # -I: neither this environment's packages nor the script's neighbour that is called llama_cpp, too
        command = [str(python), "-I", str(SCRIPT), json.dumps({**defaults, **settings})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        remedy = "; make bench-llama makes one that has it" if "No module named" in problem else ""
        raise ValueError(f"llama.cpp by {python}: {problem}{remedy}")
    return json.loads(done.stdout.splitlines()[-1])


def base_gguf(precision: str = "bf16") -> Path:
    """The base model as a GGUF file in the user's cache folder, made on the first call.

    Raises:
        ValueError: an unknown precision; the package that ships the model is not installed.
    """
    if precision not in TYPES:
        raise ValueError(f"precision {precision!r} is not one of: {', '.join(TYPES)}")
    target = platformdirs.user_cache_path("senri") / f"{base_directory().name}-{precision}.gguf"
    if not target.is_file():
        scratch = target.with_name(f".{os.getpid()}-{target.name}")
        try:
            write_gguf(find_gguf(), scratch, precision)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    return target


def write_gguf(source: Path, target: Path, precision: str) -> None:
    """Copy a GGUF file with its weights in another precision.

    They are rounded to bfloat16 first, as the copy that Senri loads is (:func:`senri.hf.base.base_directory`), so that
    ``bf16`` holds its very weights. Vectors are written in float32, which is what llama.cpp computes them in.
    """
    kind, file_type = TYPES[precision]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        full = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        rounded = full.to(torch.bfloat16).float().numpy()
        to = kind if rounded.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(rounded, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
