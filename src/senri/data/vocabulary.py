"""A tokenizer for a model from scratch: byte-pair encoding, learned from the texts that it will be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from senri.data.corpus import Document, beginnings
from senri.data.text import TextError

END_OF_TEXT = "<|endoftext|>"
CHARACTERS = 20_000_000  # looked at; more do not change a vocabulary of some thousand much
_BLOCK = 100_000


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019) of ``vocab_size`` tokens at most, one of them for the end of a text.

    Raises:
        TextError: a vocabulary too small for all bytes.
    """
    if vocab_size <= 257:
        raise TextError(f"a vocabulary of {vocab_size} does not hold all bytes and the end of a text: take 512 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_blocks(documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer by folder or hub name.

    Raises:
        TextError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise TextError(f"the tokenizer {name} cannot be loaded ({reason})") from None


def _blocks(documents: Sequence[Document]) -> Iterator[str]:
    for document in beginnings(documents, CHARACTERS):
        for start in range(0, len(document.text), _BLOCK):
            yield document.text[start : start + _BLOCK]
