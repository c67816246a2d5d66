"""Prompts that are longer than a text encoder reads; said once for a model."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from domains.text_to_image.networks.texts import Reader, quiet

__all__ = ["CutPrompts"]


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
