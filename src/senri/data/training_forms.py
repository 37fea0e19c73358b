"""How a training sample asks and answers, as token ids: begun or bare, as a line of text or in the chat format.

No answer has words before its value that a model would have to find: a memory that adds what it holds to the logits
cannot say them, and what the base says there leads it past the question as often as not.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from senri.data.haystack import encode
from senri.data.training_recall import Asked

OPENINGS = ("It is", "The answer is", "That is", "As far as I remember, it is", "According to the text it is")
OPENED = 0.25  # share of the answers that are begun in such words instead of the fact's
BEGUN = 0.5  # share of the answers whose words before the value are given
_QUESTION = "\nQuestion: {question}\nAnswer:"  # behind an empty line


class Exchange(NamedTuple):
    """A question and its answer; each tokenized for itself, as it is when a model is asked."""

    prompt: list[int]
    answer: list[int]  # the value, and the answer's end


class Forms:
    """Puts questions into a form, drawn by chance.

    Args:
        chat: share of the samples whose questions are chat turns; none where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, chat: float) -> None:
        self.tokenizer = tokenizer
        self.chat = chat if tokenizer.chat_template and tokenizer.eos_token_id is not None else 0.0
        if self.chat:
            self._first, self._next, self._end = _turns(tokenizer)

    def exchanges(self, asked: Sequence[Asked], rng: Random) -> list[Exchange]:
        """One for each question, in order."""
        asked = [item._replace(begun=rng.choice(OPENINGS)) if rng.random() < OPENED else item for item in asked]
        chat = rng.random() < self.chat
        return [self._exchange(item, place == 0, chat, rng) for place, item in enumerate(asked)]

    def prompts(self, question: str) -> list[list[int]]:
        """The question in every format that leaves the answer open."""
        texts = ["\n" + _QUESTION.format(question=question)]
        if self.chat:
            texts.append(self._first + question + self._end)
        return [encode(self.tokenizer, text) for text in texts]

    def message(self, text: str) -> Exchange:
        """A chat turn that leaves the whole answer open."""
        return Exchange(encode(self.tokenizer, self._first + text + self._end), [])

    def _exchange(self, asked: Asked, first: bool, chat: bool, rng: Random) -> Exchange:
        begun = asked.begun if rng.random() < BEGUN else ""
        if chat:
            prompt = (self._first if first else self._next) + asked.question + self._end
        else:
            prompt = _QUESTION.format(question=asked.question)
            if first:  # an answer ends its line itself
                prompt = "\n" + prompt
            begun = f" {begun}" if begun else ""
        ids = encode(self.tokenizer, f" {asked.value}." if chat else f" {asked.value}.\n")  # as the fact ends
        end = [self.tokenizer.eos_token_id] if chat else []
        return Exchange([*encode(self.tokenizer, prompt), *encode(self.tokenizer, begun)], [*ids, *end])


def _turns(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template writes before a first question, before a further one, and from there to the answer."""
    user, assistant = {"role": "user", "content": "\x00"}, {"role": "assistant", "content": "\x01"}

    def render(*turns: dict[str, str]) -> str:
        return tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)

    first, _, end = render(user).partition("\x00")
    between = render(user, assistant, user).partition("\x01")[2].partition("\x00")[0]
    return first, between.removeprefix(tokenizer.eos_token), end  # the answer before has its end already
