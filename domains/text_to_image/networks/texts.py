"""Texts as tokens, cut to what a model reads; how often that happened is known and said once."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from domains.text_to_image.networks.weightless import NoTokenizer

__all__ = ["TextReader"]


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
        # Every token has a character at least, the marks of start and end aside.
        long = [text for text in texts if len(text) > self.length - 2 and text not in self.cut]
        if not long:
            return
        ids = self.tokenizer(long, verbose=False)["input_ids"]
        found = [text for text, own in zip(long, ids, strict=True) if len(own) > self.length]
        if found and not self.cut:
            rank_zero_info(
                f"{self.model} reads {self.length} tokens of a text: the end of {found[0]!r} is "
                "cut off, and that of other long texts, which are not listed"
            )
        self.cut.update(found)
