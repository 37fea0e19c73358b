"""What several commands share: the configured model, and a reading that shows how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from senri.config import ConfigManager

if TYPE_CHECKING:
    from senri.hf.session_mixin import ReadProgress
    from senri.session import Session


class _Console(Console):
    """Leaves lines whole: a terminal wraps them, a log or a pipe should not."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with ``soft_wrap`` for plain text."""
        options.setdefault("soft_wrap", all(isinstance(o, str) for o in objects))
        super().print(*objects, **options)


# no markup: what is printed are paths and answers, and "[/x]" in one of them is no mark-up
console = _Console(highlight=False, markup=False, emoji=False)
MemoryFile = Annotated[Path, typer.Argument(metavar="FILE.senri", help="A saved memory.")]


def open_session(config: ConfigManager | None = None) -> Session:
    """The configured model, loaded and ready."""
    config = config or ConfigManager()
    with console.status("loading the model ..."):
        import torch

        quiet_transformers()
        from senri.hf.base import load_model
        from senri.session import Session

        model, tokenizer = load_model(
            config.base_model_name, config.model.dtype, config.model.adapter, **config.senri_overrides()
        )
        if torch.cuda.is_available():
            model.cuda()
        torch.manual_seed(config.experiment.seed)  # for sampling
    generation = config.experiment.generation
    options: dict[str, Any] = {"max_new_tokens": generation.max_new_tokens, "do_sample": generation.do_sample}
    if generation.do_sample:
        options |= {"temperature": generation.temperature, "top_p": generation.top_p}
    return Session(model, tokenizer, piece_size=config.experiment.reading.piece_size, generation=options)


def quiet_transformers() -> None:
    """No bars and notes of transformers between our own lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class ReadingDisplay:
    """Tokens, tokens/s, state size and time left while a text is read: one line that renews itself on a terminal,
    a line every few seconds elsewhere.

    Args:
        total: tokens to come, where known.
    """

    EVERY = 5.0  # seconds between two lines outside a terminal

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self.last_line = time.monotonic()
        self.shown = False

    def __call__(self, now: ReadProgress) -> None:
        """Show where the reading stands."""
        live = console.is_terminal
        if not live and time.monotonic() - self.last_line < self.EVERY:
            return
        self.last_line = time.monotonic()
        self.shown = True
        text = self.line(now)
        if self.total:
            left = max(self.total - now.tokens, 0) / max(now.tokens_per_second, 1e-9)
            text += f"   about {left:.0f} s left"
        console.print(text, end="\r" if live else "\n")

    def finish(self, now: ReadProgress) -> None:
        """The last line."""
        if console.is_terminal and self.shown:
            console.print(" " * 90, end="\r")
        console.print(self.line(now))

    @staticmethod
    def line(now: ReadProgress) -> str:
        """One state of a reading in words."""
        return (
            f"read {now.tokens:>9,} tokens   {now.tokens_per_second:>5,.0f} tokens/s   "
            f"state {now.state_bytes / 1e6:.2f} MB"
        )


def estimate_tokens(path: Path) -> int | None:
    """About how many tokens a file has (4.3 bytes each in English prose), for the time left."""
    return None if str(path) == "-" or not path.is_file() else int(path.stat().st_size / 4.3)


def stream_answer(session: Session) -> object:
    """A streamer that prints an answer as it comes."""
    from transformers import TextStreamer

    return TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def resumable() -> Iterator[None]:
    """Around a script that goes on where it stopped: one line on stderr and status 1 for what the user can mend,
    130 for Ctrl-C.
    """
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        warn(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        warn("interrupted; the same command goes on from the last checkpoint")
        sys.exit(130)


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"senri: {text}", file=sys.stderr)
