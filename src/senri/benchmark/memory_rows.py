"""The memory path alone: what it takes of reading and of predicting, and as a layer by itself."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from senri.benchmark.plan import Spec
from senri.benchmark.process import LeftOut
from senri.benchmark.rows import WARM_UP, about, open_model, session, texts
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers import MemoryAttention, MemoryStream

TIMED = ("forward", "writing", "write")  # all ways into a memory layer


class MemoryClock:
    """Seconds spent in the memory layers of a model between enter and exit.

    A model without its memories would do other work besides (nothing could be put off while reading), so the memories
    are timed where they stand: their methods take the time, the outermost call counts. What the rest of the model does
    for them (keeping ids and inputs of a window) is not in it; on a CPU a call is over when it returns.
    """

    def __init__(self, model: SenriForCausalLM) -> None:
        self.memories = list(model.model.memories.values())
        self.seconds, self._inside = 0.0, False

    def __enter__(self) -> MemoryClock:
        self.seconds = 0.0
        for memory in self.memories:
            for name in TIMED:
                setattr(memory, name, self._timed(getattr(memory, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for memory in self.memories:
            for name in TIMED:
                delattr(memory, name)

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return method(*args, **options)
            self._inside, started = True, time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started
                self._inside = False

        return timed


@torch.no_grad()
def memory(spec: Spec) -> dict[str, Any]:
    """Piece by piece: ``reading`` (it writes) and ``predicting`` (it writes and reads), whole and in the memory alone,
    and ``layer``: the first memory layer by itself on the inputs that it had, writing and reading.

    Each is a list of seconds of the pieces behind the first ones, while which nothing leaves the window.
    """
    model, tokenizer = open_model(spec)
    if not model.config.num_memory_layers:
        raise LeftOut("the model has no memory")
    size = spec["piece_size"]
    skipped = -(-model.config.sliding_window_size // size)
    ids = texts(spec["tokens"], 1, tokenizer)
    pieces = ids.split(size, dim=1)
    if len(pieces) <= skipped:
        raise LeftOut(f"{spec['tokens']:,} tokens do not leave the window: raise peer_lengths")
    clock = MemoryClock(model)

    def times(call: Any) -> dict[str, list[float]]:
        whole, inside = [], []
        for piece in pieces:
            with clock:
                started = time.perf_counter()
                call(piece)
                whole.append(time.perf_counter() - started)
            inside.append(clock.seconds)
        return {"whole": whole[skipped:], "memory": inside[skipped:]}

    with session(model):
        model.read(texts(WARM_UP * size, 1, tokenizer), piece_size=size)
    with session(model):
        read = times(lambda piece: model.read(piece, piece_size=size))
    inputs: list[Tensor] = []
    first = model.config.memory_layers[0]
    hook = model.model.memories[first].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    cache = model.model.new_cache()
    predicted = times(lambda piece: model.model(piece, past_key_values=cache))
    hook.remove()
    alone = _layer_alone(model, model.model.memories[first], inputs, list(pieces))[skipped:]
    return {
        **about(model),
        "tokens": spec["tokens"],
        "piece_size": size,
        "reading": read,
        "predicting": predicted,
        "layer": alone,
        "state_bytes": cache.memory_nbytes,
    }


def _layer_alone(
    model: SenriForCausalLM, memory: MemoryAttention, inputs: list[Tensor], pieces: list[Tensor]
) -> list[float]:
    """Seconds of each piece."""
    whole = model.model.empty_state(1, model.dtype)
    state = memory.init_state(1, model.dtype, model.device)
    valid, ids, embedding = whole.valid, whole.ids, model.model.embed_tokens.weight
    slots, times = ids.shape[1], []
    for hidden, piece in zip(inputs, pieces, strict=True):
        valid = torch.cat([valid, torch.ones_like(piece, dtype=torch.bool)], 1)
        ids = torch.cat([ids, piece], 1)
        started = time.perf_counter()
        _, state = memory(hidden, MemoryStream(valid, ids, None), state, embedding)
        times.append(time.perf_counter() - started)
        valid, ids = valid[:, -slots:], ids[:, -slots:]
    return times
