"""Pictures to PNG files."""

from pathlib import Path

from PIL import Image
from torch import Tensor

__all__ = ["save_png", "to_image"]


def to_image(picture: Tensor) -> Image.Image:
    """Return a PIL image of a picture [3, H, W] in [0, 1]."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_png(picture: Tensor, path: Path) -> None:
    """Write a picture [3, H, W] in [0, 1]."""
    to_image(picture).save(path)
