"""Pictures [B, 3, H, W] in [0, 1], the samples of several domains: checks and PNG files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition

__all__ = ["check_pictures", "save_pictures", "to_image"]

_TOLERANCE = 1e-3  # beyond [0, 1], for rounding


def to_image(picture: Tensor) -> Image.Image:
    """Return a PIL image of a picture [3, H, W] in [0, 1]."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_pictures(pictures: Iterable[Tensor], folder: Path, names: Sequence[str]) -> list[Path]:
    """Write each picture as `<folder>/<name>.png`, grey ones in grey; return the paths."""
    paths = [folder / f"{name}.png" for name in names]
    for picture, path in zip(pictures, paths, strict=True):
        image = to_image(picture)
        first, *others = image.split()
        grey = all(channel.tobytes() == first.tobytes() for channel in others)
        (first if grey else image).save(path)
    return paths


def check_pictures(samples: Any, condition: Condition) -> Tensor:
    """Return samples that are pictures, as they are.

    Raises:
        UsageError: They are not float32 or float64 [B, 3, H, W] in [0, 1], one per condition.
    """
    if not isinstance(samples, Tensor):
        raise UsageError(
            f"this reward takes pictures [B, 3, H, W], got {type(samples).__name__}; choose a "
            "reward of the pipeline's own domain"
        )
    if samples.dtype not in (torch.float32, torch.float64):
        remedy = "samples.float()" if samples.is_floating_point() else "samples.float() / 255"
        raise UsageError(
            f"pictures must be float32 in [0, 1], got {samples.dtype}; convert with {remedy}"
        )
    if samples.shape[0] != len(condition) or samples.dim() != 4 or samples.shape[1] != 3:
        raise UsageError(
            f"pictures must have shape ({len(condition)}, 3, H, W), one per condition, got "
            f"{tuple(samples.shape)}; decode them to RGB first"
        )
    if samples.numel():
        low, high = torch.stack(samples.detach().aminmax()).tolist()
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # also false for NaN
            raise UsageError(
                f"pictures must be float32 in [0, 1], got values from {low:g} to {high:g}; "
                "rescale and clamp them when decoding"
            )
    return samples
