"""A reward that is a plain function of pictures and prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.called import name_of, numbers_of
from lit_rlft.kit.images import to_image

__all__ = ["FunctionReward"]


class FunctionReward(Reward):
    """Scores pictures by any Python function: of another package, or of one's own.

    Args:
        function: Takes a list of PIL pictures in RGB and the list of their prompts; returns a
            number per picture, or None for one that it could not score. On the command line its
            path, such as my_scores.sharpness.

    Raises:
        UsageError: It returns something else.
    """

    def __init__(
        self, function: Callable[[list[Image], list[str]], Sequence[float | None]]
    ) -> None:
        super().__init__()
        self.function = function

    @property
    def name(self) -> str:
        return name_of(self.function, type(self).__name__)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        pictures = [to_image(picture) for picture in check_pictures(samples, condition)]
        values = numbers_of(self.function, "pictures", pictures, prompts_of(condition))
        return torch.tensor(values)
