"""What a frozen model makes of pages and questions, computed once.

With the ``head`` read-out the memory's inputs come from the base alone: while only the memory learns they never change.
So each page is read once, and the memory is then trained on what was kept, over texts that are put together from pages
at will: a step costs no pass through the base, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from senri.data.pages import Page, Question, RecallPages
from senri.data.training_forms import Exchange
from senri.hf.cache import SenriCache
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers import taps_of
from senri.training.settings import TrainingError

BATCH, REPLIES = 16, 64  # questions of one pass, and of one pass that the base replies to
REPLY_TOKENS = 24  # of the base's own answer


@dataclass
class AskedFeatures:
    """One question: the answer's tokens and what predicts each."""

    page: int  # -1: one that no page answers
    fact: int  # of its page; -1: it stands in sight of the question
    left_to_base: bool  # the answer is the base's own: no page answers, or the question tells the fact itself
    target: Tensor  # [A] int64
    at: Tensor  # [A] int64: the token at which each is predicted, the one before it
    final: Tensor  # [A, hidden]: the base's last hidden state that predicts each target
    hidden: dict[int, Tensor]  # memory layer -> [K - 1 + A, hidden]: its inputs there, and before
    missing: int  # of the K - 1 before: the text begins behind them; zeros


@dataclass
class Features:
    """Pages as one row of tokens; those of a running text follow each other."""

    page_size: int
    ids: Tensor  # [N] int64
    write: Tensor  # [N] int8
    stream: Tensor  # [N] int64: number of the running text
    final: Tensor  # [M, hidden]: the base's last hidden states where they are known, in order
    final_at: Tensor  # [N] int64: row of a token's; -1: of a stream with facts, read no further than its memory needs
    surprise: Tensor  # [N] float32, nats; zeros where no write gate asks for it
    hidden: dict[int, Tensor]  # memory layer -> [N, hidden]
    facts: list[list[str]]  # of each page, see Page
    fact_of: Tensor  # [N] int16
    asked: list[AskedFeatures]


def save_features(features: Features, path: Path) -> None:
    """Write them to one file, whole or not at all."""
    asked = [dict(vars(question)) for question in features.asked]
    scratch = path.with_suffix(".part")
    torch.save({**vars(features), "asked": asked}, scratch)
    scratch.rename(path)


def load_features(path: Path) -> Features:
    """What :func:`save_features` wrote."""
    saved = torch.load(path, weights_only=True)
    saved["asked"] = [AskedFeatures(**question) for question in saved["asked"]]
    return Features(**saved)


@contextmanager
def memory_left_out(model: SenriForCausalLM) -> Iterator[dict[int, Tensor]]:
    """The model as the base with a window; what each memory layer would have read last stands in what is yielded."""
    inputs: dict[int, Tensor] = {}
    layers, count = model.config.memory_layers, model.config.num_memory_layers

    def keep(index: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _args, out: inputs.__setitem__(index, out)

    hooks = [model.model.layers[i].input_layernorm.register_forward_hook(keep(i)) for i in layers]  # type: ignore[union-attr, operator]
    model.config.num_memory_layers = 0
    try:
        yield inputs
    finally:
        model.config.num_memory_layers = count
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def collect(
    model: SenriForCausalLM,
    source: RecallPages,
    streams: Sequence[int],
    *,
    batch: int,
    unrelated: bool = True,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Read the streams, ``batch`` at a time as running texts, and ask all their questions.

    Args:
        unrelated: ask what no page answers, too.
        show: called with the tokens done and their number.
    """
    flat = [page for index in streams for page in source.stream(index)]
    opens = [number for number, page in enumerate(flat) if page.opens]
    texts = [flat[start:stop] for start, stop in pairwise([*opens, len(flat)])]
    # read whole: plain text, whose prediction the memory must not disturb; and all where a gate asks for the surprise
    whole = [model.config.write_gate == "surprise" or not any(page.facts for page in pages) for pages in texts]
    asked = [(number, question) for number, page in enumerate(flat) for question in page.questions]
    asked_of_base = [(number, message) for number, page in enumerate(flat) for message in page.messages]
    asked_of_base += [(-1, question) for question in _unrelated(source)] if unrelated else []
    with memory_left_out(model):
        asked += _answered(model, asked_of_base, source.tokenizer.eos_token_id)
    asked.sort(key=lambda item: _length(item[1]))
    late = [item for item in asked if item[1].late]
    plain = [number for number, pages in enumerate(texts) if not any(page.facts for page in pages)]
    if late and not plain:
        raise TrainingError("no stream is plain text to ask questions behind: raise streams (every third one is)")
    behind = {number: late[place :: len(plain)] for place, number in enumerate(plain)}
    before = taps_of(model.config.memory_conv_size, model.config.memory_context_size) - 1
    total, done = len(flat) * source.size + sum(_length(q) for _, q in asked), 0
    layers = model.config.memory_layers
    finals: dict[int, Tensor] = {}
    hidden: dict[int, dict[int, Tensor]] = {i: {} for i in layers}
    answers: list[AskedFeatures] = []

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        show(done, total)

    def ask(
        questions: Sequence[tuple[int, Question]], tail: Sequence[int] = (), text: SenriCache | None = None
    ) -> None:
        answers.extend(_ask(model, questions, inputs, tail, text))
        count(sum(_length(q) for _, q in questions))

    with memory_left_out(model) as inputs:
        for kind, length in sorted({(entire, len(pages)) for entire, pages in zip(whole, texts, strict=True)}):
            alike = [n for n, pages in enumerate(texts) if (whole[n], len(pages)) == (kind, length)]
            for start in range(0, len(alike), batch):
                group = alike[start : start + batch]
                ids = torch.stack([_ids(texts[number]) for number in group]).to(model.device)
                # the last tokens are read once more with each question that follows on them
                pieces = _pieces(ids, source.size, before)
                with nullcontext() if kind else _up_to(model, max(layers)):
                    almost, final, kept = _read(model, pieces, inputs, count)
                if kind:
                    finals.update(zip(group, final, strict=True))
                for i in layers:
                    hidden[i].update(zip(group, kept[i], strict=True))
                for row, number in enumerate(group):
                    for questions in _batches(behind.get(number, [])):
                        text = almost.fork()
                        text.batch_select_indices(torch.full((len(questions),), row))
                        ask(questions, pieces[-1][row].tolist(), text)
        for questions in _batches([item for item in asked if not item[1].late]):
            ask(questions)
    ids = torch.cat([_ids(pages) for pages in texts])
    sizes = torch.tensor([source.size * len(pages) for pages in texts])
    stream = torch.arange(len(texts)).repeat_interleave(sizes)
    known = torch.tensor(whole).repeat_interleave(sizes)
    final_at = torch.where(known, known.cumsum(0) - 1, -1)
    final = torch.cat([finals[number] for number in sorted(finals)] or [torch.zeros(0, model.config.hidden_size)])
    return Features(
        source.size,
        ids,
        torch.cat([torch.from_numpy(page.write) for page in flat]),
        stream,
        final,
        final_at,
        _surprise(model, final, ids, stream),
        {i: torch.cat([rows[number] for number in range(len(texts))]) for i, rows in hidden.items()},
        [list(page.facts) for page in flat],
        torch.cat([torch.from_numpy(page.fact_of) for page in flat]),
        answers,
    )


def join(parts: Sequence[Features]) -> Features:
    """Several readings as one, in order."""
    streams = pages = finals = 0
    stream, final_at, asked = [], [], []
    for part in parts:
        stream.append(part.stream + streams)
        final_at.append(torch.where(part.final_at >= 0, part.final_at + finals, -1))
        asked += [replace(q, page=q.page + pages if q.page >= 0 else -1) for q in part.asked]
        streams, pages, finals = streams + int(part.stream[-1]) + 1, pages + len(part.facts), finals + len(part.final)
    return Features(
        parts[0].page_size,
        torch.cat([part.ids for part in parts]),
        torch.cat([part.write for part in parts]),
        torch.cat(stream),
        torch.cat([part.final for part in parts]),
        torch.cat(final_at),
        torch.cat([part.surprise for part in parts]),
        {i: torch.cat([part.hidden[i] for part in parts]) for i in parts[0].hidden},
        [facts for part in parts for facts in part.facts],
        torch.cat([part.fact_of for part in parts]),
        asked,
    )


@contextmanager
def _up_to(model: SenriForCausalLM, layer: int) -> Iterator[None]:
    """The model without the layers behind ``layer``."""
    layers = model.model.layers
    model.model.layers = layers[: layer + 1]
    try:
        yield
    finally:
        model.model.layers = layers


def _ids(pages: Sequence[Page]) -> Tensor:
    return torch.cat([torch.from_numpy(page.ids) for page in pages]).long()


def _length(question: Question) -> int:
    return len(question.lead) + len(question.exchange.prompt) + len(question.exchange.answer)


def _unrelated(source: RecallPages) -> list[Question]:
    """Questions that no page answers, every other one behind a text; without answers yet."""
    prompts = sorted(source.unrelated(), key=len)
    nothing = np.zeros(0, dtype=np.int32)
    return [Question(nothing, n % 2 == 1, -1, Exchange(p, []), left_to_base=True) for n, p in enumerate(prompts)]


def _answered(
    model: SenriForCausalLM, asked: Sequence[tuple[int, Question]], end: int
) -> Iterator[tuple[int, Question]]:
    """The questions with the answers that the base gives in an empty window.

    Behind a text it would say something else, but this stays what is right there.
    """
    asked = sorted(asked, key=lambda item: _length(item[1]))
    for group in _batches(asked, REPLIES):
        prompts = [[*q.lead.tolist(), *q.exchange.prompt] for _, q in group]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
        there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            ids,
            attention_mask=there.to(model.device),
            max_new_tokens=REPLY_TOKENS,
            do_sample=False,
            pad_token_id=end,
        )[:, longest:]
        for (page, question), answer in zip(group, out.tolist(), strict=True):
            answer = answer[: answer.index(end) + 1] if end in answer else answer
            yield page, replace(question, exchange=question.exchange._replace(answer=answer))


def _surprise(model: SenriForCausalLM, final: Tensor, ids: Tensor, stream: Tensor, block: int = 512) -> Tensor:
    out = torch.zeros(len(ids))
    if model.config.write_gate == "surprise":
        for start in range(0, len(ids) - 1, block):
            target = ids[start + 1 : start + 1 + block]
            logits = model.lm_head(final[start : start + len(target)].to(model.device)).float().cpu()
            out[start + 1 : start + 1 + block] = F.cross_entropy(logits, target, reduction="none")
        out[1:] *= stream[1:] == stream[:-1]
    return out


def _read(
    model: SenriForCausalLM, pieces: Sequence[Tensor], inputs: dict[int, Tensor], count: Callable[[int], None]
) -> tuple[SenriCache, Tensor, dict[int, Tensor]]:
    """Texts of one length in pieces ``[B, T]``: the state before the last piece, the last hidden states and the memory
    layers' ``inputs`` ``[B, all T, hidden]``.
    """
    cache = before_last = model.model.new_cache()
    parts = []
    for number, piece in enumerate(pieces, start=1):
        if number == len(pieces):
            before_last = cache.fork()
        out = model.model(piece, past_key_values=cache).last_hidden_state
        parts.append((out.cpu(), {i: x.cpu() for i, x in inputs.items()}))
        count(piece.numel())
    kept = {i: torch.cat([part[i] for _, part in parts], 1) for i in inputs}
    return before_last, torch.cat([final for final, _ in parts], 1), kept


def _pieces(ids: Tensor, size: int, last: int) -> list[Tensor]:
    """``ids`` ``[B, T]`` in pieces of ``size`` tokens, but the last one of ``last``, or of one token."""
    cut = ids.shape[1] - max(last, 1)
    return [*ids[:, :cut].split(size, 1), ids[:, cut:]]


def _batches(asked: Sequence[tuple[int, Question]], size: int = BATCH) -> Iterator[Sequence[tuple[int, Question]]]:
    return (asked[start : start + size] for start in range(0, len(asked), size))


def _ask(
    model: SenriForCausalLM,
    group: Sequence[tuple[int, Question]],
    inputs: dict[int, Tensor],
    tail: Sequence[int] = (),
    cache: SenriCache | None = None,
) -> list[AskedFeatures]:
    """One pass over some questions, padded on the right: causal, so that the padding changes nothing.

    Args:
        tail: tokens before them all; cache: what was read before these, a row for each question. It is used up.
    """
    before = taps_of(model.config.memory_conv_size, model.config.memory_context_size) - 1
    rows = [[*tail, *q.lead.tolist(), *q.exchange.prompt, *q.exchange.answer] for _, q in group]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    out = model.model(ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    made = []
    for r, (page, q) in enumerate(group):
        first = len(tail) + len(q.lead) + len(q.exchange.prompt) - 1  # predicts the answer's first token
        stop = first + len(q.exchange.answer)
        missing = max(before - first, 0)
        start = first - before + missing
        made.append(
            AskedFeatures(
                page,
                q.fact,
                q.left_to_base,
                torch.tensor(q.exchange.answer),
                ids[r, first:stop].cpu().clone(),
                out[r, first:stop].cpu().clone(),
                {i: F.pad(h[r, start:stop].cpu(), (0, 0, missing, 0)) for i, h in inputs.items()},
                missing,
            )
        )
    return made
