"""The picture that shows a model before and after: same conditions, same noise."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lit_rlft.runs.files import write_whole, writing

__all__ = ["before_after", "comparison", "png", "write_png"]

_TILE, _GAP, _LABEL, _MARGIN = 96, 4, 34, 92


def before_after(reference: Tensor, tuned: Tensor, num_columns: int) -> Tensor:
    """Return one picture [3, H, W] uint8: rows of reference samples, each above its tuned twin.

    Args:
        reference: [B, 3, h, w] uint8.
        tuned: [B, 3, h, w] uint8, from the same conditions and noise.
        num_columns: Samples in a row.
    """
    rows = []
    for start in range(0, len(tuned), num_columns):
        for pictures in (reference, tuned):
            row = pictures[start : start + num_columns]
            missing = num_columns - len(row)
            row = torch.cat([row, row.new_full((missing, *row.shape[1:]), 255)])
            rows.append(torch.nn.functional.pad(row, (1, 1, 1, 1), value=255))
        rows.append(rows[-1].new_full((num_columns, 3, 3, rows[-1].shape[-1]), 255))
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def comparison(
    reference: Tensor, tuned: Tensor, labels: Sequence[str], groups: Sequence[int], title: str
) -> Image.Image:
    """Return a labelled side-by-side picture: a column per condition, reference above tuned.

    Args:
        reference: [B, 3, h, w] uint8; samples of one condition follow each other.
        tuned: The same samples from the tuned model.
        labels: [B] what each sample was conditioned on.
        groups: First row of each condition to show, and the number of rows of one condition last.
        title: One line above everything.
    """
    *starts, size = groups
    width = _MARGIN + len(starts) * (_TILE + _GAP)
    block = size * (_TILE + _GAP)
    canvas = Image.new("RGB", (width, 28 + _LABEL + 2 * block + _GAP * 4), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    draw.text((_GAP, 6), title, fill="black", font=ImageFont.load_default(14))
    for arm, pictures in enumerate((reference, tuned)):
        top = 28 + _LABEL + arm * (block + _GAP * 3)
        draw.text((_GAP, top + block // 2), ("reference", "tuned")[arm], fill="black", font=font)
        for column, start in enumerate(starts):
            left = _MARGIN + column * (_TILE + _GAP)
            if arm == 0:
                text = "\n".join(textwrap.wrap(labels[start], 16)[:2])
                draw.multiline_text((left, 28), text, fill="black", font=font, spacing=2)
            for row in range(size):
                picture = _image(pictures[start + row])
                tile = ImageOps.pad(
                    picture, (_TILE, _TILE), Image.Resampling.BICUBIC, color="white"
                )
                canvas.paste(tile, (left, top + row * (_TILE + _GAP)))
    return canvas


def write_png(picture: Tensor, path: Path) -> None:
    """Write a picture [3, H, W] uint8.

    Raises:
        DiskError: The disk is full or broken.
    """
    with writing(path):
        write_whole(path, png(_image(picture)))


def png(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
