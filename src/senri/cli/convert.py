"""``senri convert``: any Llama-architecture or Qwen2 model into a Senri model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from senri.cli.common import console
from senri.cli.read import check_output
from senri.config import ConfigManager

NAME = "convert"


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A directory, hub name, .gguf file, or smollm2-135m-instruct."),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The new directory; OUT.safetensors: an adapter with the added weights only."
        ),
    ],
    texts: Annotated[
        list[Path] | None, typer.Argument(metavar="[TEXT]...", help="Text files to calibrate the memory on.")
    ] = None,
) -> None:
    """Convert a pretrained model; with texts, calibrate its memory on them (equal shares from each)."""
    import transformers

    from senri.data import iter_text
    from senri.hf.base import load_base_config

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if output.exists():
        raise ValueError(f"{output} exists: name another place")
    check_output(output, exists_ok=False)
    for text in texts or []:
        iter_text(text)
    load_base_config(source)  # complains before anything is loaded; about a Senri model too
    config = ConfigManager()
    convert(source, output, texts or [], config)


def convert(source: str, output: Path, texts: list[Path], config: ConfigManager) -> None:
    """Load, convert with model.yaml's settings (those that fit the source's own preset), calibrate, save."""
    from senri.data import iter_pieces, iter_text, iter_tokens
    from senri.hf.adapter import save_adapter
    from senri.hf.base import load_model, new_folder
    from senri.hf.calibrate import REPEAT_BEYOND, calibrate
    from senri.hf.convert import is_added

    # model.yaml describes its own base; another source gets the preset of its architecture
    overrides = config.senri_overrides() if source == config.base_model_name else {}
    model, tokenizer = load_model(
        source, None if config.model.dtype == "auto" else config.model.dtype, "none", **overrides
    )
    notes: dict[str, Any] = {"base": source, "calibration_texts": [t.name for t in texts]}
    if texts:
        wanted = config.experiment.calibration.num_tokens + model.config.sliding_window_size + REPEAT_BEYOND
        ids: list[int] = []
        for text in texts:
            ids += next(iter_pieces(iter_tokens(iter_text(text), tokenizer), -(-wanted // len(texts))), [])
        dtype = model.dtype
        report = calibrate(model.float(), ids, num_tokens=config.experiment.calibration.num_tokens)
        notes["calibration"] = report._asdict()
        gain = f"loss on repeated text {report.loss_without:.3f} -> {report.loss_with:.3f} nats a token"
        silent = "the layer read-out stays silent until it is trained"
        console.print(f"calibrated on {report.tokens:,} tokens: {gain if report.read_gate else silent}")
        model.to(dtype)
    if output.suffix == ".safetensors":
        save_adapter(model, output, **notes)
    else:
        with new_folder(output) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    memory = sum(p.numel() for n, p in model.named_parameters() if is_added(n))
    console.print(f"saved {output}: {memory / 1e6:.2f}M added parameters in layers {model.config.memory_layers}")
