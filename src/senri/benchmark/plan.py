"""What a run measures: its rows in order, each with all that the process that measures it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spec = dict[str, Any]  # of one row, as JSON values; "key" names it in its run

LONG = 16384  # a text that is longer is read once: its pieces are enough for a median
BUFFER = 1 << 29  # bytes, well beyond any cache
FEATURE_STREAMS, FEATURE_STEPS = 12, 25  # of the training on features
STATES = "states"  # folder of the saved memories that decoding starts from


@dataclass(frozen=True)
class Settings:
    """Names and meanings as in config/experiment.yaml, section benchmark; what else a row needs stands below."""

    measurements: tuple[str, ...]
    lengths: tuple[int, ...]
    repeats: int
    batch_sizes: tuple[int, ...]
    batch_length: int
    decoding_after: tuple[int, ...]
    decoding_tokens: int
    training_length: int
    peers: tuple[str, ...]
    peer_lengths: tuple[int, ...]
    llama_cpp_python: str | None
    model: dict[str, Any]  # name, dtype, adapter, overrides: arguments of load_model
    piece_size: int
    training: dict[str, Any]  # of TrainingSettings, as training.yaml has them
    features: dict[str, Any]  # of FeatureSettings, and chat (see RecallPages) and seed


def plan(settings: Settings, folder: Path) -> list[Spec]:
    """The rows of a run in ``folder``, cheap ones first; the machine's bounds at both ends."""
    s = settings
    common = {"model": s.model, "piece_size": s.piece_size}
    bounds = {**common, "measurement": "bounds", "buffer_bytes": BUFFER}
    makers: dict[str, Callable[[], list[Spec]]] = {
        "load": lambda: [{"key": f"load/{i}", "measurement": "load"} for i in range(1, s.repeats + 1)],
        "conversion": lambda: [{"key": "conversion", "measurement": "conversion", "repeats": s.repeats}],
        "reading": lambda: [_reading(s, tokens) for tokens in _lengths(s)],
        "batch": lambda: [
            {
                "key": f"batch/{size}",
                "measurement": "reading",
                "tokens": s.batch_length,
                "batch": size,
                "repeats": s.repeats,
            }
            for size in s.batch_sizes
        ],
        "decoding": lambda: _decoding(s, folder / STATES),
        "memory": lambda: [{"key": "memory", "measurement": "memory", "tokens": max(s.peer_lengths)}],
        "training": lambda: [_training(s, trainable) for trainable in ("memory", "all")],
        "features": lambda: [{"key": "features", "measurement": "features", "features": s.features}],
        "peers": lambda: [_peer(s, name, tokens) for name in s.peers for tokens in s.peer_lengths],
    }
    wanted = [name for name in makers if name in s.measurements]
    rows = [{**common, **row} for name in wanted for row in makers[name]()]
    return [{**bounds, "key": "bounds/at first"}, *rows, {**bounds, "key": "bounds/at the end"}]


def _lengths(s: Settings) -> list[int]:
    """Peers are compared at their own lengths, so Senri is read at these too."""
    return sorted({*s.lengths, *(s.peer_lengths if "peers" in s.measurements else ())})


def _repeats(s: Settings, tokens: int) -> int:
    return 1 if tokens > LONG else s.repeats


def _reading(s: Settings, tokens: int) -> Spec:
    return {
        "key": f"reading/{tokens}",
        "measurement": "reading",
        "tokens": tokens,
        "batch": 1,
        "repeats": _repeats(s, tokens),
    }


def _decoding(s: Settings, folder: Path) -> list[Spec]:
    after = sorted(set(s.decoding_after))
    states: Spec = {"key": "states", "measurement": "states", "after": after, "folder": str(folder)}
    return [
        states,
        *(
            {
                "key": f"decoding/{tokens}",
                "measurement": "decoding",
                "after": tokens,
                "tokens": s.decoding_tokens,
                "repeats": s.repeats,
                "folder": str(folder),
            }
            for tokens in after
        ),
    ]


def _training(s: Settings, trainable: str) -> Spec:
    return {
        "key": f"training/{trainable}",
        "measurement": "training",
        "repeats": s.repeats,
        "training": {
            **s.training,
            "trainable": trainable,
            "batch_size": 1,
            "max_length": s.training_length,
            "piece_length": s.piece_size,
            "gradient_accumulation_steps": 1,
            "curriculum": [],
            "distillation_weight": 0.0,
        },
    }


def _peer(s: Settings, name: str, tokens: int) -> Spec:
    options = {"python": s.llama_cpp_python} if name == "llama_cpp" else {}
    return {
        "key": f"peer/{name}/{tokens}",
        "measurement": "peer",
        "peer": name,
        "tokens": tokens,
        "decode": s.decoding_tokens,
        "repeats": _repeats(s, tokens),
        "options": options,
    }
