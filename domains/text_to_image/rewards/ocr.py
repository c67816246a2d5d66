"""How exactly a picture shows the text that its prompt asks for."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.images import to_image

__all__ = ["OCRAccuracy", "edit_distance"]

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')

Engine = Callable[[np.ndarray], list[str]]
"""From a picture, uint8 [H, W, 3] in RGB, to the lines that are read in it."""


class OCRAccuracy(Reward):
    r"""Share of the wanted text that can be read in the picture, in [0, 1].

    The wanted text is what stands between the prompt's first double quotes. With D the edit
    distance between it and all that is read, both without spaces and in lower case,

    .. math:: r = 1 - \min(D, n) / n,

    n being the wanted text's length; 1 where it is a part of what is read. Reads with PP-OCR by the
    package rapidocr. Not differentiable. Licence of PP-OCR's models and of rapidocr: Apache-2.0.

    Args:
        engine: Path of a function that reads pictures, from uint8 [H, W, 3] in RGB to a list of
            lines; None takes rapidocr.

    Raises:
        UsageError: rapidocr is not installed; or, for a sample, the prompt has nothing in quotes.

    References:
        Flow-GRPO (Liu et al., 2025; the reward), https://arxiv.org/abs/2505.05470
        PP-OCR (Du et al., 2020), https://arxiv.org/abs/2009.09941
    """

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__()
        if engine is None and importlib.util.find_spec("rapidocr") is None:
            raise UsageError(
                "reward: OCRAccuracy needs rapidocr; install it with pip install lit-rlft[ocr], or "
                "give a function of yours that reads pictures as reward.init_args.engine"
            )
        self.engine = engine
        self._rapid: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies load the engine's models anew, which cannot be copied."""
        return {**super().__getstate__(), "_rapid": None}  # type: ignore[no-untyped-call]

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the accuracy of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        wanted = [_wanted(prompt) for prompt in prompts_of(condition)]
        read = [self._read(np.asarray(to_image(picture))) for picture in pictures]
        return torch.tensor([_accuracy(w, r) for w, r in zip(wanted, read, strict=True)])

    def _read(self, pixels: np.ndarray) -> str:
        if self.engine is not None:
            return "".join(self.engine(pixels))
        if self._rapid is None:
            from rapidocr import RapidOCR

            self._rapid = RapidOCR(params={"Global.log_level": "critical"})
        return "".join(self._rapid(np.ascontiguousarray(pixels[..., ::-1])).txts or ())


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and replacements that make one text the other."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
    return row[-1]


def _wanted(prompt: str) -> str:
    found = _QUOTED.search(prompt)
    text = _plain(found[1] or found[2]) if found else ""
    if not text:
        raise UsageError(
            f"OCRAccuracy: the prompt {prompt!r} has no text in double quotes, which the picture "
            'should show; write prompts such as: a sign that says "OPEN"'
        )
    return text


def _accuracy(wanted: str, read: str) -> float:
    read = _plain(read)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
