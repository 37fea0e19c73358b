"""How a training sample asks and answers, as token ids: begun, free, bare, and in the tokenizer's chat format."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from senri.data.haystack import encode
from senri.data.training_recall import Asked

OPENINGS = ("It is", "The answer is", "That is", "As far as I remember, it is", "According to the text it is")
OPENED = 0.25  # share of the answers that begin in such words instead of the fact's
_QUESTION = "\nQuestion: {question}\nAnswer:"  # behind an empty line


class Exchange(NamedTuple):
    """A question and its answer; each tokenized for itself, as it is when a model is asked."""

    prompt: list[int]
    answer: list[int]
    value_from: int  # the answer's tokens before the value


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
        if rng.random() < self.chat:
            return self._chat(asked)
        return [self._plain(item, place == 0, rng) for place, item in enumerate(asked)]

    def prompts(self, question: str) -> list[list[int]]:
        """The question in every format that leaves the answer open."""
        texts = ["\n" + _QUESTION.format(question=question)]
        if self.chat:
            texts.append(self._first + question + self._end)
        return [encode(self.tokenizer, text) for text in texts]

    def message(self, text: str) -> Exchange:
        """A chat turn that leaves the whole answer open."""
        return Exchange(encode(self.tokenizer, self._first + text + self._end), [], 0)

    def _plain(self, asked: Asked, first: bool, rng: Random) -> Exchange:
        form = rng.choice(("begun", "begun", "free", "bare"))  # begun: what most evaluations ask
        prompt, begun = _QUESTION.format(question=asked.question), f" {asked.begun}"
        if first:  # an answer ends its line itself
            prompt = "\n" + prompt
        if form == "begun":
            prompt += begun
        lead = begun if form == "free" else ""
        answer = f"{lead} {asked.value}.\n"  # as the fact ends
        value_from = len(encode(self.tokenizer, lead))
        return Exchange(encode(self.tokenizer, prompt), encode(self.tokenizer, answer), value_from)

    def _chat(self, asked: Sequence[Asked]) -> list[Exchange]:
        exchanges = []
        for place, item in enumerate(asked):
            prompt = (self._next if place else self._first) + item.question + self._end
            answer = encode(self.tokenizer, f"{item.begun} {item.value}.")
            value_from = len(encode(self.tokenizer, item.begun))
            answer = [*answer, self.tokenizer.eos_token_id]
            exchanges.append(Exchange(encode(self.tokenizer, prompt), answer, value_from))
        return exchanges


def _turns(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template writes before a first question, before a further one, and from there to the answer."""
    user, assistant = {"role": "user", "content": "\x00"}, {"role": "assistant", "content": "\x01"}

    def render(*turns: dict[str, str]) -> str:
        return tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)

    first, _, end = render(user).partition("\x00")
    between = render(user, assistant, user).partition("\x01")[2].partition("\x00")[0]
    return first, between.removeprefix(tokenizer.eos_token), end  # the answer before has its end already
