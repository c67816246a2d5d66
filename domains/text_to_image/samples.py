"""The domain's samples: pictures [B, 3, H, W] in [0, 1], each with its prompt."""

import torch.nn.functional as F
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.images import check_pictures

__all__ = ["check_pictures", "prompts_of", "square"]


def prompts_of(condition: Condition) -> list[str]:
    """Return the prompt of every sample.

    Raises:
        UsageError: The conditions have no prompts.
    """
    records = condition.each()
    for record in records:
        if "prompt" not in record:
            raise UsageError(
                f"this reward needs a 'prompt' for each sample, but the data only have "
                f"{sorted(record)}; use data with prompts or a reward that needs none"
            )
    return [record["prompt"] for record in records]


def square(pictures: Tensor, size: int, reward: str) -> Tensor:
    """Return square pictures at size x size, pooled or repeated.

    Args:
        pictures: [B, 3, H, W].
        size: Wanted height and width.
        reward: The name of the reward that needs them, for the message.

    Raises:
        UsageError: Height and width differ: squeezing would turn one shape into another.
    """
    height, width = pictures.shape[-2:]
    if height != width:
        raise UsageError(
            f"{reward} takes square pictures, got {height} x {width}; set "
            "pipeline.init_args.height and width to the same size"
        )
    return pictures if height == size else F.interpolate(pictures, (size, size), mode="area")
