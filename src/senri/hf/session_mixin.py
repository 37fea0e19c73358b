"""The session: a memory that a caller opens on a model, continues over many calls, saves and closes."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from senri.data import iter_pieces, iter_tokens
from senri.files import fingerprint
from senri.hf import memory_file
from senri.hf.cache import SenriCache
from senri.memory.svd import SVDCleaning, SVDCleaningStats, svd_cleaning_of_all

if TYPE_CHECKING:
    from senri.hf.configuration_senri import SenriConfig

READ_PIECE = 1024  # tokens of one pass while reading
TRIM_AFTER = 16  # pieces that are read between two looks at what the C heap keeps


class ReadProgress(NamedTuple):
    """Where a reading stands."""

    tokens: int  # read by this call so far
    total: int | None  # of this call, where known
    seconds: float
    state_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of this call."""
        return self.tokens / max(self.seconds, 1e-9)


class SessionMixin:
    """Session methods of :class:`SenriForCausalLM`.

    The one running state a model may hold, and only between ``reset_memory()`` and ``end_session()``: in ``eval()``
    each ``forward`` and ``generate`` goes on from it. In ``train()`` it is left alone: every sample starts empty.

    As everywhere in transformers, ``generate`` does not read the last token it made: begin the next input with it.
    Rows of a batch that end earlier than others are padded and not written further.
    """

    session: SenriCache | None
    if TYPE_CHECKING:  # of the model that this is mixed into
        model: Any
        config: SenriConfig
        training: bool
        device: torch.device
        dtype: torch.dtype

    def reset_memory(
        self,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start a session with an empty memory (and end the one before).

        Args:
            batch_size: rows that all calls of the session will have.
            device, dtype: may be named, and must then be the model's; the memory itself is always float32.

        Raises:
            ValueError: a batch size below 1, or another device or dtype than the model's.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(f"the model is on {self.device}, not on {device}: move the model, the session follows it")
        if dtype is not None and dtype != self.dtype:
            raise ValueError(f"the model computes in {self.dtype}, not in {dtype}: leave dtype out")
        self.session = self.model.new_cache()
        self.session.state = self.model.empty_state(batch_size, self.dtype)

    def end_session(self) -> None:
        """Forget the session; later calls are stateless."""
        self.session = None

    def get_memory_state(self) -> SenriCache:
        """The session's state as a cache of its own: later calls do not change it.

        Given to ``generate`` as ``past_key_values``, it takes the ids as new text that goes on from it.

        Raises:
            RuntimeError: no session is open.
        """
        self.model.catch_up(self._open_session())
        state = self._open_session().detach()
        state.offset = state.columns
        return state

    def set_memory_state(self, state: SenriCache) -> None:
        """Go on from ``state`` (which stays as it is), opening a session.

        Raises:
            ValueError: the state's store or shapes are not this model's. Another dtype or device is converted.
        """
        session = state.fork()
        self.model.catch_up(session)
        if session.state is not None:
            empty = self.model.new_cache()
            empty.state = self.model.empty_state(session.state.position.shape[0], self.dtype)
            for mine, its in zip(empty.memories.values(), session.memories.values(), strict=False):
                if mine.store != its.store:
                    raise ValueError(
                        f"this memory state is of store {its.store or 'single'!r}, the model's of "
                        f"{mine.store or 'single'!r}"
                    )
            theirs = session.named_tensors()
            if _shapes(empty.named_tensors()) != _shapes(theirs):
                raise ValueError(
                    "this memory state has other shapes than the model: it belongs to another configuration"
                )
            session.state = memory_file.restore(empty.state, theirs)
        self.session = session

    def flush(self) -> None:
        """End a text: write what the window still holds and empty the window, so the memory holds all of it once.

        Raises:
            RuntimeError: no session is open.
        """
        with torch.no_grad():
            self.model.flush(self._open_session())

    def write_window(self) -> None:
        """Before a question in a running text: the memory gets what the window holds, too, and the window stays.

        :meth:`senri.Session.ask` does this by itself. See :meth:`senri.hf.SenriModel.write_window`.

        Raises:
            RuntimeError: no session is open.
        """
        self.model.write_window(self._open_session())

    @torch.no_grad()
    def read(
        self,
        source: str | Tensor | list[int] | Iterable[str] | Iterable[list[int]],
        tokenizer: Any = None,
        *,
        piece_size: int = READ_PIECE,
        progress: bool | Callable[[ReadProgress], None] = False,
        cleaning: SVDCleaning | None = None,
    ) -> ReadProgress:
        """Read a text of any length into the session (opening one if none is), without computing logits.

        Interrupted (Ctrl-C, an error in the source), the session holds every piece that was finished.

        Args:
            source: a text, token ids (a list, ``[T]`` or ``[B, T]``), or an iterable of texts or of id lists.
            tokenizer: for texts.
            piece_size: tokens of one pass.
            progress: True for a bar, or a function called after each piece.
            cleaning: when :meth:`svd_cleaning` is done after a piece; None: never.

        Raises:
            ValueError: a text without a tokenizer, nothing to read, a model in ``train()``; cleaning of rule ``slot``.
        """
        if self.training:
            raise ValueError("read() continues a session, which train() never does: call model.eval() first")
        pieces, total = _as_pieces(source, tokenizer, piece_size)
        started, tokens = time.perf_counter(), 0
        report = _progress_bar(total) if progress is True else progress or None
        now = ReadProgress(0, total, 0.0, 0)
        try:
            for number, piece in enumerate(pieces, start=1):
                if self.session is None:
                    self.reset_memory(piece.shape[0])
                assert self.session is not None
                before = list(self.session.memories.values())
                self.model.read(piece.to(self.device), self.session)
                if cleaning is not None and cleaning.is_due(before, list(self.session.memories.values())):
                    self.svd_cleaning(cleaning.energy_threshold, cleaning.max_rank)
                if number % TRIM_AFTER == 0:
                    _trim_heap()
                tokens += piece.shape[1]
                now = ReadProgress(tokens, total, time.perf_counter() - started, self.session.nbytes)
                if report is not None:
                    report(now)
        finally:
            if progress is True:
                report.close()  # type: ignore[union-attr]
        if not tokens:
            raise ValueError("there is nothing to read: the text is empty")
        return now

    def svd_cleaning(self, energy_threshold: float = 0.95, max_rank: int | None = None) -> SVDCleaningStats:
        """Replace the session's memory matrices by their best approximations of low rank, see
        :func:`senri.memory.svd.svd_cleaning`; the statistics are of all layers, which stand before the other axes.

        Raises:
            RuntimeError: no session is open, or its memories are empty.
            ValueError: impossible numbers; rule ``slot``.
        """
        session = self._open_session()
        memories = session.memories
        cleaned, stats = svd_cleaning_of_all(list(memories.values()), energy_threshold, max_rank)
        session.replace_memories(dict(zip(memories, cleaned, strict=True)))
        return stats

    def save_memory(self, path: str | Path, tokenizer: Any = None, **notes: Any) -> None:
        """Save the session to one file, atomically; call ``flush()`` first at the end of a text.

        Args:
            tokenizer: its fingerprint is kept, so that a reader with another one is refused.
            notes: further JSON values for the header, e.g. ``source="book.txt"``.

        Raises:
            RuntimeError: no session is open.
            FileError: the file cannot be written; nothing is left behind.
        """
        self.model.catch_up(self._open_session())
        memory_file.save(path, self._open_session(), {**notes, **self._header(tokenizer)})

    def load_memory(self, path: str | Path, tokenizer: Any = None) -> dict[str, Any]:
        """Open a session from a saved memory and return its header.

        Raises:
            MemoryFileError: no memory file, truncated or corrupt, or of another model or tokenizer, naming the field.
                An open session stays as it is then.
        """
        rows = memory_file.read_header(path).get("batch_size", 1)
        session = self.model.new_cache()
        header = memory_file.load(path, session, self.model.empty_state(rows, self.dtype), self._header(tokenizer))
        self.session = session
        return header

    def _header(self, tokenizer: Any) -> dict[str, Any]:
        return {
            **memory_file.expected_header(self.config),
            "model_fingerprint": fingerprint(self.model.named_parameters()),
            "tokenizer_fingerprint": None if tokenizer is None else memory_file.tokenizer_fingerprint(tokenizer),
        }

    def _open_session(self) -> SenriCache:
        if self.session is None:
            raise RuntimeError("no session is open: call reset_memory(), read() or load_memory() first")
        return self.session


def _trim_heap() -> None:
    """Give the system back what glibc keeps of freed memory, which grows with a text though nothing alive does."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Shapes by name, without the number of tokens that a window's keys and values happen to hold."""
    held = (".keys", ".values")
    return {name: [*t.shape[:2], t.shape[3]] if name.endswith(held) else [*t.shape] for name, t in tensors.items()}


def _as_pieces(source: Any, tokenizer: Any, piece_size: int) -> tuple[Iterator[Tensor], int | None]:
    """Any source as tensors ``[B, <= piece_size]``, and the number of tokens where it is known beforehand."""
    if piece_size < 1:
        raise ValueError(f"piece_size must be at least 1, not {piece_size}")
    if isinstance(source, Tensor):
        ids = source if source.dim() == 2 else source[None]
        return iter(ids.split(piece_size, dim=1) if ids.numel() else ()), ids.shape[1]
    if isinstance(source, list) and source and isinstance(source[0], int):
        return _as_pieces(torch.tensor(source), tokenizer, piece_size)
    if isinstance(source, str) and len(source) < 256 and "\n" not in source and Path(source).is_file():
        raise ValueError(f"{source!r} is the name of a file, not a text: read it with senri.data.iter_text({source!r})")
    blocks = iter([source] if isinstance(source, str) else source)
    return _text_pieces(blocks, tokenizer, piece_size), None


def _text_pieces(blocks: Iterator[Any], tokenizer: Any, piece_size: int) -> Iterator[Tensor]:
    first = next(blocks, None)
    if first is None:
        return

    def again() -> Iterator[Any]:
        yield first
        yield from blocks

    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("reading text needs its tokenizer: model.read(text, tokenizer)")
        tokens = iter_tokens(again(), tokenizer)
    else:
        tokens = again()
    for piece in iter_pieces(tokens, piece_size):
        yield torch.tensor([piece])


class _progress_bar:
    """A tqdm bar over tokens."""

    def __init__(self, total: int | None) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, unit="tok", unit_scale=True, desc="reading")

    def __call__(self, now: ReadProgress) -> None:
        self.bar.set_postfix_str(f"state {now.state_bytes / 1e6:.2f} MB", refresh=False)
        self.bar.update(now.tokens - self.bar.n)

    def close(self) -> None:
        self.bar.close()
