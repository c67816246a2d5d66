"""Texts as tokens, cut to what a model reads; which were cut is known and said once."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from domains.text_to_image.networks.weightless import NoTokenizer

__all__ = ["Reader", "TextReader", "quiet"]

_NOISY = ("diffusers", "transformers.tokenization_utils_base")
"""Loggers that warn of every long prompt anew."""


@dataclass(frozen=True)
class Reader:
    """A tokenizer, and how much of a prompt its text encoder reads.

    Attributes:
        tokenizer: One of transformers.
        length: Tokens at most, with the marks of start and end.
        name: The encoder's, for the message.
        remedy: How to have more tokens read.
    """

    tokenizer: Any
    length: int
    name: str
    remedy: str = "shorten it"

    def lost(self, prompts: Sequence[str]) -> list[str]:
        """Return what is cut off the end of each prompt; "" where it is read whole."""
        kept = self.length - self.tokenizer.num_special_tokens_to_add()
        # A token has a byte at least, but the mark that some tokenizers put before the first word.
        long = [i for i, prompt in enumerate(prompts) if len(prompt.encode()) >= kept]
        ends = [""] * len(prompts)
        if not long:
            return ends
        found = self.tokenizer(
            [prompts[i] for i in long], add_special_tokens=False, return_offsets_mapping=True
        )
        for i, places in zip(long, found["offset_mapping"], strict=True):
            if len(places) > kept:
                ends[i] = prompts[i][places[kept][0] :].strip()
        return ends


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from warning of each long prompt."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class TextReader:
    """Turns texts into tokens; texts longer than the model's context are cut off at its end.

    Args:
        tokenizer: One of transformers.
        length: Tokens that the model reads at most.
        model: The model's name, for the message.
        padding: Pad to the longest text, or to `length`.

    Attributes:
        cut: The texts that were cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        model: str,
        padding: Literal["longest", "max_length"] = "longest",
    ) -> None:
        self.tokenizer, self.length, self.model, self.padding = tokenizer, length, model, padding
        self.cut: set[str] = set()

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both [B, L], on the CPU."""
        if isinstance(self.tokenizer, NoTokenizer):
            ones = torch.ones(len(texts), self.length, dtype=torch.int64)
            return {"input_ids": ones, "attention_mask": ones}
        self._count(texts)
        tokens = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _count(self, texts: Sequence[str]) -> None:
        new = [text for text in texts if text not in self.cut]
        with quiet():
            ends = Reader(self.tokenizer, self.length, self.model).lost(new)
        found = {text: end for text, end in zip(new, ends, strict=True) if end}
        if found and not self.cut:
            rank_zero_info(
                f"{self.model} reads {self.length} tokens of a text: the end of "
                f"{next(iter(found))!r} is cut off, and that of other long texts, which are not "
                "listed"
            )
        self.cut.update(found)
