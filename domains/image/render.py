"""Pictures to PNG files."""

from pathlib import Path

from PIL import Image
from torch import Tensor

__all__ = ["save_png"]


def save_png(picture: Tensor, path: Path) -> None:
    """Write a picture [3, H, W] in [0, 1], in grey where its channels are equal."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    if bool((pixels == pixels[:1]).all()):
        Image.fromarray(pixels[0].numpy()).save(path)
        return
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
