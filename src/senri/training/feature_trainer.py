"""Training on cached features as one run in one folder: features, write gate, reading, adapter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from senri.data.pages import RecallPages
from senri.data.samples import SampleError
from senri.hf.adapter import save_adapter
from senri.hf.modeling_senri import SenriForCausalLM
from senri.identity import Identity
from senri.training import checkpoint
from senri.training.features import Features, collect, join, load_features, save_features
from senri.training.fit import Reading, check_model, fit_write_gates, prepare
from senri.training.fit_probe import count_answers
from senri.training.log import TrainingLog
from senri.training.settings import FeatureSettings, TrainingError
from senri.training.trainer import ADAPTER

GATES, STATE, PROBED = "write_gates.pt", "reading.pt", "features-probe.pt"
BATCH = 4  # streams that are read side by side
PART = 12  # streams of one file of features; every third one is plain, and a part needs such
PROBED_STREAMS, PROBED_TEXTS = 6, 40  # held-out streams, and texts that are put together from their pages


def train_on_features(
    model: SenriForCausalLM,
    source: RecallPages,
    settings: FeatureSettings,
    seed: int,
    folder: Path,
    identity: Identity,
    *,
    calibrates: bool,
    dtype: torch.dtype,
    notes: dict[str, Any],
    probed: RecallPages | None = None,
    probe_steps: int = 50,
    show: Callable[[dict[str, Any]], None] = lambda entry: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """One run, or what is left of it; returns the adapter's path.

    Killed, it loses at most the reading of the last dozen streams, or the steps since the last ``save_steps``.

    Args:
        model: converted, float32; trained in place.
        calibrates: whether keys and queries are set anew, from the features, and the write gate begins anew. The way
            of a value through the memory is set anew always.
        dtype: that the base reads the pages in; the memory learns in float32.
        probed: held-out pages to look at every ``probe_steps``, and at the end.

    Raises:
        TrainingError: see :func:`senri.training.fit.check_model`; a model to which another token is the end of a chat
            turn than to the tokenizer; ``learns`` end without what it goes on from; and a folder with another run.
    """
    check_model(model)
    _check_ends(model, source)
    if settings.learns == "end" and (calibrates or settings.gate_steps or None in _ends(model)):
        raise TrainingError(
            "features.learns end needs an init_adapter of rule slot, which stays as it is otherwise, and gate_steps 0"
        )
    if calibrates and not settings.gate_steps:
        raise TrainingError("gate_steps 0 keeps the write gate of init_adapter, and there is none: name one")
    checkpoint.open_folder(folder, identity)
    started = time.perf_counter()
    held_out = None if probed is None else _held_out(model, probed, folder, dtype, say)
    features = _features(model, source, settings.streams, folder, dtype, show, say)
    state = torch.load(folder / STATE, weights_only=True) if (folder / STATE).is_file() else None
    fitted = (folder / GATES).is_file() or not settings.gate_steps
    gate_steps = settings.gate_steps * len(model.model.memories)
    log = TrainingLog(folder, gate_steps + (0 if state is None else state["step"]) if fitted else 0)

    def record(entry: dict[str, Any]) -> None:
        before = 0 if entry["stage"] == "write gate" else gate_steps  # one count for the whole run
        entry = {**entry, "step": before + entry["step"], "seconds": time.perf_counter() - started}
        log.write(entry)
        show(entry)

    try:
        if settings.learns == "all":
            prepare(model, features, addresses=calibrates)
        gates = {str(i): memory.write_gate for i, memory in model.model.memories.items()}
        if (folder / GATES).is_file():
            for i, weights in torch.load(folder / GATES, weights_only=True).items():
                gates[i].load_state_dict(weights)
        elif not fitted:  # else those that it starts from
            fit_write_gates(model, features, settings, seed, record, anew=calibrates)
            _save({i: gate.state_dict() for i, gate in gates.items()}, folder / GATES)
        dev = None if held_out is None else Reading(model, held_out, settings, seed)

        def probe(step: int) -> None:
            if dev is not None and (step % probe_steps == 0 or step == settings.steps):
                model.eval()
                counts = count_answers(dev, PROBED_TEXTS, seed)
                model.train()
                shares = {name: good / total for name, (good, total) in counts.items() if total}
                record({"stage": "probe", "step": step, **shares})

        model.train()  # a store that is trained as one memory is one
        Reading(model, features, settings, seed).train(record, state, lambda s: _save(s, folder / STATE), probe)
    finally:
        log.close()
    save_adapter(model.eval(), folder / ADAPTER, **notes, seed=seed, settings=dataclasses.asdict(settings))
    return folder / ADAPTER


def _ends(model: SenriForCausalLM) -> list[int | None]:
    return [memory.end_token for memory in model.model.memories.values()]


def _check_ends(model: SenriForCausalLM, source: RecallPages) -> None:
    ends = {*_ends(model)} - {None}
    trained = source.tokenizer.eos_token_id
    if source.forms.chat and ends and ends != {trained}:
        raise TrainingError(
            f"the tokenizer ends a chat turn with token {trained}, the base model with {ends.pop()}: set eos_token_id "
            "in the base model's config.json to the tokenizer's"
        )


def _held_out(
    model: SenriForCausalLM, source: RecallPages, folder: Path, dtype: torch.dtype, say: Callable[[str], None]
) -> Features | None:
    """Of some streams that are not trained on; None where there is too little text for them."""
    path = folder / PROBED
    if not path.is_file():
        say("reading held-out pages for the probe ...")
        try:
            with _reading(model, dtype):
                save_features(collect(model, source, range(PROBED_STREAMS), batch=BATCH, unrelated=False), path)
        except SampleError as error:
            say(f"nothing is probed, for the text that is kept back is too short: {error}")
            return None
    return load_features(path)


def _features(
    model: SenriForCausalLM,
    source: RecallPages,
    streams: int,
    folder: Path,
    dtype: torch.dtype,
    show: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> Features:
    """Of all streams; those parts are read that the folder does not hold yet."""
    starts = range(0, max(streams - 2, 1), PART)  # what would be a last part of one or two belongs to the one before
    paths = [folder / f"features-{number}.pt" for number in range(1, len(starts) + 1)]
    missing = [path.is_file() for path in paths].count(False)
    for number, (start, path) in enumerate(zip(starts, paths, strict=True), start=1):
        if not path.is_file():
            say(f"making part {number} of {len(paths)} of the pages, and asking the base for its own answers ...")
            part = range(start, streams if number == len(paths) else start + PART)
            progress = _progress(show, {"part": number, "parts": len(paths)})
            with _reading(model, dtype):
                read = collect(model, source, part, batch=BATCH, unrelated=number == 1, show=progress)
            save_features(read, path)
    features = join([load_features(path) for path in paths])
    size = f"{len(features.ids):,} tokens and {len(features.asked):,} questions"
    say(f"{missing} of {len(paths)} parts read, {size} in all" if missing else f"features of {size} are there already")
    return features


@contextmanager
def _reading(model: SenriForCausalLM, dtype: torch.dtype) -> Iterator[None]:
    """The model where and as pages are read; then again as the memory learns, from what came back to the CPU."""
    model.to(device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    try:
        yield
    finally:
        model.to(device="cpu", dtype=torch.float32)


def _progress(show: Callable[[dict[str, Any]], None], part: dict[str, int]) -> Callable[[int, int], None]:
    started = time.perf_counter()

    def report(done: int, total: int) -> None:
        speed = done / max(time.perf_counter() - started, 1e-9)
        show({"stage": "features", **part, "step": done, "of": total, "tokens_per_second": speed})

    return report


def _save(state: dict[str, Any], path: Path) -> None:
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    scratch.rename(path)
