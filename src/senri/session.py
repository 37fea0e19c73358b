"""A model and its tokenizer with one running memory: files in, answers out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senri.data import TextError, iter_pieces, iter_text, iter_tokens
from senri.hf.cache import SenriCache, without_memory
from senri.hf.memory_file import MemoryFileError, read_header
from senri.hf.modeling_senri import SenriForCausalLM
from senri.hf.session_mixin import ReadProgress
from senri.memory.svd import SVDCleaning, SVDCleaningStats


class ReadingStopped(RuntimeError):
    """A reading ended early; what was read is in the session, unflushed, ready to be saved and resumed."""

    def __init__(self, reason: str, tokens: int) -> None:
        super().__init__(reason)
        self.reason, self.tokens = reason, tokens


class _Ledger:
    """Which tokens of one text the state holds: how many, and their digest, so that a reading can be resumed.

    Args:
        source: names the text.
        done, expected: tokens read by an earlier call, and their digest.
    """

    def __init__(self, source: str, done: int = 0, expected: str | None = None) -> None:
        self.source, self.done, self.expected = source, done, expected
        self.digest = hashlib.sha256()
        self.fresh: list[int] = []  # given to the model, not counted yet
        self.counted = 0  # read by this call

    def unread(self, pieces: Iterator[list[int]]) -> Iterator[list[int]]:
        """The pieces without what was read before, which must be the same.

        Raises:
            TextError: it is not.
        """
        seen = 0
        for piece in pieces:
            if seen < self.done:
                known, piece = piece[: self.done - seen], piece[self.done - seen :]
                self._update(known)
                seen += len(known)
                if seen == self.done and self.digest.hexdigest() != self.expected:
                    break
            if piece:
                self.fresh.extend(piece)
                yield piece
        else:
            if seen == self.done:
                return
        raise TextError(f"{self.source} is not the text whose reading was stopped: name that one")

    def count(self, tokens: int) -> bool:
        """The state holds ``tokens`` of this call by now; returns whether that is news."""
        news = tokens - self.counted
        self._update(self.fresh[:news])
        del self.fresh[:news]
        self.counted = tokens
        return news > 0

    def notes(self, *, complete: bool) -> dict[str, Any]:
        """What a saved memory says of its reading."""
        return {
            "source": Path(self.source).name,
            "read_tokens": self.done + self.counted,
            "read_digest": self.digest.hexdigest(),
            "complete": complete,
        }

    def _update(self, ids: list[int]) -> None:
        self.digest.update(torch.tensor(ids, dtype=torch.int32).numpy().tobytes())


class Session:
    """Read, ask, chat, save, load.

    Args:
        model: in ``eval()``.
        tokenizer: the model's.
        piece_size: tokens of one pass while reading.
        generation: arguments of ``generate`` for answers, e.g. ``max_new_tokens``.
        cleaning: of the memory while a text is read; None: never.
    """

    def __init__(
        self,
        model: SenriForCausalLM,
        tokenizer: Any,
        *,
        piece_size: int = 1024,
        generation: dict[str, Any] | None = None,
        cleaning: SVDCleaning | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.piece_size, self.cleaning = piece_size, cleaning
        self.generation = {"max_new_tokens": 64, "do_sample": False, **(generation or {})}
        self.notes: dict[str, Any] = {}
        self._unfed: Tensor | None = None  # [1, 0 or 1]: the last answer's token that the memory has not seen
        self._resumed = False  # after resume(): the next reading goes on, whatever its source is called now

    @property
    def state(self) -> SenriCache:
        """The running state, ready to be forked for an answer."""
        self.model.model.catch_up(self.model._open_session())
        return self.model._open_session()

    # reading --------------------------------------------------------------------------------------------------

    def read_file(
        self,
        path: str | Path,
        progress: Callable[[ReadProgress], None] | None = None,
    ) -> ReadProgress:
        """Read a UTF-8 file (``-``: standard input) to its end and flush.

        Goes on where a reading stopped: after :meth:`resume`, or when the same source is read again.

        Raises:
            TextError: nothing of the file could be read; or it is not the text whose reading is resumed.
            ReadingStopped: Ctrl-C, or a fault in the middle of the file.
        """
        return self.read_tokens(iter_tokens(iter_text(path), self.tokenizer), str(path), progress)

    def read_tokens(
        self,
        tokens: Iterator[list[int]],
        source: str,
        progress: Callable[[ReadProgress], None] | None = None,
    ) -> ReadProgress:
        """As :meth:`read_file`, from a stream of token ids; ``source`` names it in messages and in the saved file."""
        stopped = not self.notes.get("complete", True)
        goes_on = stopped and (self._resumed or self.notes["source"] == Path(source).name)
        ledger = _Ledger(source, self.notes["read_tokens"], self.notes["read_digest"]) if goes_on else _Ledger(source)
        before = sum(self.model.session.tokens_read) if self.model.session is not None else 0

        def account() -> int:
            """Note what the state holds of this text by now, and return how many tokens this call brought."""
            if self.model.session is not None and ledger.count(sum(self.model.session.tokens_read) - before):
                self._unfed = None  # a conversation before it is over
                self.notes = ledger.notes(complete=False)
            return ledger.counted

        def after_piece(now: ReadProgress) -> None:
            account()
            if progress is not None:
                progress(now)

        last = ReadProgress(0, None, 0.0, 0)
        try:
            stream = ledger.unread(iter_pieces(tokens, self.piece_size))
            if (first := next(stream, None)) is not None:
                blocks = itertools.chain([first], stream)
                last = self.model.read(blocks, piece_size=self.piece_size, progress=after_piece, cleaning=self.cleaning)
            elif not ledger.done:  # else all was read already, and only the end is missing
                raise TextError(f"{source} is empty: there is nothing to read")
            self.model.flush()
        except (KeyboardInterrupt, TextError, OSError) as error:
            if not account():
                raise
            raise ReadingStopped(str(error) or "interrupted", ledger.done + ledger.counted) from None
        self.notes, self._resumed = ledger.notes(complete=True), False
        return last if ledger.counted else last._replace(state_bytes=self.model._open_session().nbytes)

    def svd_cleaning(self, energy_threshold: float = 0.95, max_rank: int | None = None) -> SVDCleaningStats:
        """Clean the memory now: see :meth:`senri.hf.session_mixin.SessionMixin.svd_cleaning`."""
        return self.model.svd_cleaning(energy_threshold, max_rank)

    # answering ------------------------------------------------------------------------------------------------

    def ask(self, question: str, streamer: Any = None, *, memory: bool = True) -> str:
        """Answer from the memory and leave it as it was.

        Args:
            memory: False empties it for this answer: the control.

        Raises:
            ValueError: an empty question, or one longer than the window.
        """
        unfed, state = self._unfed, self.state
        answer = self._generate(self.prompt(question), state.fork() if memory else without_memory(state), streamer)
        self._unfed = unfed
        return answer

    def say(self, message: str, streamer: Any = None) -> str:
        """One turn of a conversation: the message becomes part of the memory, message and answer part of the window.

        What the model says itself is nothing that it was told: an old value repeated in an answer would be the last
        that the memory hears of it, and stand against the message. A turn that Ctrl-C or an error cuts short leaves no
        trace.

        Raises:
            ValueError: an empty message, or one longer than the window.
        """
        prompt = self.prompt(message, first=self._unfed is None)
        if self._unfed is not None:  # generate() never feeds its last token back
            prompt = torch.cat([self._unfed, prompt], dim=1)
        if self.model.session is None:
            self.model.reset_memory()
        state = self.state.fork()
        answer = self._generate(prompt, state, streamer)
        self.model.session = state
        return answer

    def prompt(self, message: str, *, first: bool = True) -> Tensor:
        """Token ids ``[1, T]`` of a message in the model's chat format, up to where the answer begins.

        Args:
            first: False goes on after an answer of the same conversation.
        """
        if not message.strip():
            raise ValueError("the question is empty: ask something")
        turns = [{"role": "user", "content": message}]
        if not self.tokenizer.chat_template:
            text = f"Question: {message}\nAnswer:" if first else f"\n\nQuestion: {message}\nAnswer:"
        elif first:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        else:
            marker = "\x00"  # stands for the answer before: what follows it opens the next turn
            turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": marker}, *turns]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            text = text.partition(marker)[2]
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        window = self.model.config.sliding_window_size
        if ids.shape[1] > window:
            raise ValueError(
                f"the question has {ids.shape[1]} tokens, more than the window of {window}: shorten it, or put the "
                "long part into a file and read it with: senri read"
            )
        return ids.to(self.model.device)

    def _generate(self, prompt: Tensor, cache: SenriCache, streamer: Any) -> str:
        self.model.model.write_window(cache)
        cache.offset = cache.columns  # generate() counts the prompt alone
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            streamer=streamer,
            **self.generation,
        )
        answer = out[0, prompt.shape[1] :]
        ended = int(answer[-1]) == self.tokenizer.eos_token_id
        self._unfed = out[:, out.shape[1] :] if ended else out[:, -1:]  # the next turn's format brings the end token
        cache.leave_out(len(answer) - 1)  # all that was fed back; an unfed last token comes with the next message
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    # files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the memory to ``path``, atomically.

        Raises:
            FileError: the file cannot be written.
        """
        self.model.save_memory(path, self.tokenizer, **self.notes)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Open a saved memory; returns its header.

        Raises:
            MemoryFileError: it cannot be used with this model, naming why.
        """
        header = self.model.load_memory(path, self.tokenizer)
        self.notes = {k: header[k] for k in ("source", "read_tokens", "read_digest", "complete") if k in header}
        self._unfed, self._resumed = None, False
        return header

    def resume(self, path: str | Path) -> None:
        """Open the memory of a reading that was stopped, so that the next ``read_file`` goes on from there.

        Raises:
            MemoryFileError: it cannot be used with this model, or the reading was complete.
        """
        if read_header(path).get("complete", True):
            raise MemoryFileError(f"{path} holds a finished reading: there is nothing to resume")
        self.load(path)
        self._resumed = True
