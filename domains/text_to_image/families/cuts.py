"""Prompts that are longer than a text encoder reads; said once for a model."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["CutPrompts", "Reader", "quiet"]

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
        long = [i for i, prompt in enumerate(prompts) if len(prompt) > kept]  # a letter at least
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


class CutPrompts:
    """Warns of prompts that are cut, once.

    Args:
        readers: The tokenizers that count; a prompt is cut where one of them cuts it.
        convert: What the family does to a prompt before a tokenizer reads it.
    """

    def __init__(self, readers: Sequence[Reader], convert: Any = None) -> None:
        self.readers, self.convert = readers, convert
        self.said = False

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int] | None = None) -> None:
        """Look for prompts that are cut, unless some were found before.

        Args:
            prompts: Texts.
            numbers: What each is called, from 0; None counts them.
        """
        if self.said:
            return
        lost: dict[int, tuple[str, Reader]] = {}
        for reader in self.readers:
            with quiet():
                read = [self._read(prompt, reader) for prompt in prompts]
                ends = reader.lost(read)
            for i, end in enumerate(ends):
                if len(end) > len(lost[i][0] if i in lost else ""):
                    lost[i] = end, reader
        if not lost:
            return
        self.said = True
        first = min(lost)
        end, reader = lost[first]
        number = first if numbers is None else numbers[first]
        others = "" if len(lost) == 1 else f" (and {len(lost) - 1} more of these {len(prompts)})"
        rank_zero_warn(
            f"prompt {number}{others} is longer than the {reader.length} tokens that {reader.name} "
            f"reads: {end!r} is cut off; {reader.remedy}. Later prompts are cut without a word"
        )

    def _read(self, prompt: str, reader: Reader) -> str:
        return prompt if self.convert is None else self.convert(prompt, reader.tokenizer)


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
