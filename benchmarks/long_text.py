"""One long text, read once as ``senri read`` does it: what that takes, and which of the keys told in it come back.

``python benchmarks/long_text.py BOOKS [TOKENS [SEED]]`` (1,048,576 and 0; half an hour on two cores). BOOKS: a folder
of texts, read one behind the other, with 20 people's secret keys told among their sentences; SEED decides which keys,
and where. They are asked for twice: where the text runs on, the answer begun in the fact's words (``memory off``: the
same window, the memory emptied); and in the chat format after its end, when the memory is all that is left (control:
the memory emptied, too).
The tables go to the terminal, all answers to runs/benchmarks/long_text.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from senri import load_base
from senri.benchmark.process import Peak, process_peak
from senri.data import TextError
from senri.data.corpus import load_documents
from senri.data.haystack import BookHaystack
from senri.data.needles import shared_context
from senri.data.samples import Context, SampleError
from senri.evaluation.readers import SenriReader
from senri.evaluation.scoring import score
from senri.evaluation.statistics import share
from senri.hf.base import base_directory, load_tokenizer
from senri.hf.cache import without_memory
from senri.hf.session_mixin import ReadProgress
from senri.session import Session

TOKENS, PIECE = 1 << 20, 1024
DEPTHS, PER_DEPTH = (0.0, 0.2, 0.4, 0.6, 0.8), 4
SAID = 24  # tokens of an answer in the chat format
MINUTE = 60


def prepare(folder: str, tokens: int, seed: int) -> Context:
    """The text and its questions."""
    tokenizer = load_tokenizer(base_directory())
    books = BookHaystack(load_documents([folder]), tokenizer)
    return shared_context(books, tokenizer, lengths=[tokens], depths=DEPTHS, per_cell=PER_DEPTH, seed=seed, sample=0)


def measure(model: Any, tokenizer: Any, context: Context, show: Callable[[str], None]) -> dict[str, Any]:
    """Read and ask: ``reading`` and a row for each question of ``context``."""
    at = min(question.at for question in context.questions)
    session, due = Session(model, tokenizer, piece_size=PIECE, generation={"max_new_tokens": SAID}), [0.0]

    def progress(now: ReadProgress) -> None:
        if now.seconds >= due[0]:
            due[0] = now.seconds + MINUTE
            show(f"{now.tokens:,} of {at:,} tokens, {now.tokens / now.seconds:,.0f} a second")

    with Peak() as peak:
        read = model.read(torch.from_numpy(context.ids[:at]).long(), piece_size=PIECE, progress=progress)
    reading = {
        "tokens": at, "texts": context.source, "seconds": read.seconds, "peak_bytes": peak.bytes,
        "process_peak_bytes": process_peak(), "state_bytes": read.state_bytes, "dtype": str(model.dtype),
    }  # fmt: skip
    reader, running = SenriReader(model, tokenizer), session.state
    rows = []
    for question in context.questions:
        said = reader.answer([running, without_memory(running)], [question, question])
        (key,) = question.answers
        name = re.search(r"secret key of (.+?) mentioned", tokenizer.decode(question.prompt))
        assert name is not None
        rows.append({
            "name": name[1], "key": key, "depth": question.cell["depth"], "tokens_ago": at - question.evidence[0][1],
            **{arm: [text, score(text, question)] for arm, text in zip(("memory", "memory off"), said, strict=True)},
        })  # fmt: skip
        show(f"{name[1]}: {said}")
    model.flush()
    reading["memory_bytes"] = session.state.memory_nbytes
    for row in rows:
        for memory in (True, False):
            text = session.ask(f"What is the secret key of {row['name']}?", memory=memory).partition("\n")[0]
            row[f"chat, {'memory' if memory else 'memory emptied'}"] = [text, float(row["key"] in text)]
            show(text)
    return {"reading": reading, "questions": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, by depth; the last line with 95 % Wilson intervals."""
    arms = [arm for arm, value in rows[0].items() if isinstance(value, list)]
    depths = sorted({row["depth"] for row in rows})

    def line(name: str, some: Iterable[dict[str, Any]], shown: Callable[[int, int], str]) -> str:
        some = list(some)
        return f"| {name} | {' | '.join(shown(sum(r[a][1] == 1 for r in some), len(some)) for a in arms)} |"

    def interval(right: int, asked: int) -> str:
        found = share(right, asked)
        return f"{right} of {asked} [{100 * found.low:.0f}, {100 * found.high:.0f}]"

    lines = [f"| depth | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
    lines += [
        line(f"{d:g}", (r for r in rows if r["depth"] == d), lambda right, asked: f"{right} of {asked}") for d in depths
    ]
    return "\n".join([*lines, line("all", rows, interval)])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("tokens", type=int, nargs="?", default=TOKENS)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # elsewhere: four books' tokens, and what making them leaves behind, are no part of what reading takes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            context = pool.apply(prepare, (given.books, given.tokens, given.seed))
        except (TextError, SampleError) as error:
            parser.error(str(error))
    model, tokenizer = load_base()
    found = measure(model, tokenizer, context, lambda text: print(text, file=sys.stderr, flush=True))
    path = Path("runs/benchmarks/long_text.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    reading = found["reading"]
    print(f"{reading['tokens']:,} tokens ({reading['texts']}) in {reading['seconds']:,.0f} s")
    print(f"{reading['tokens'] / reading['seconds']:,.0f} tokens/s, {reading['dtype']}; peak while reading "
          f"{reading['peak_bytes'] / 1e6:,.0f} MB, of the process {reading['process_peak_bytes'] / 1e6:,.0f} MB; "
          f"state {reading['state_bytes'] / 1e6:.1f} MB, memory {reading['memory_bytes'] / 1e6:.2f} MB\n")  # fmt: skip
    print(table(found["questions"]))


if __name__ == "__main__":
    main()
