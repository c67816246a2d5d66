"""What a run keeps for its report: samples before and after, small, in `report/*.json.gz`.

A record is an object of JSON. Its `entries` are pairs of samples from the same condition and noise:
`label`, `row` and `sample` (the data's row and which of its samples), and for `reference` and
`tuned` each `values` by metric and `svg`, a drawing, or `image`, a data URI; molecules have `body`,
their shape in space.
"""

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, features

from lit_rlft.core.checks import loading
from lit_rlft.core.figure import Figure
from lit_rlft.runs.files import write_whole

if TYPE_CHECKING:  # a reader of what was kept need not wait for it
    from torch import Tensor

__all__ = ["SHOWN", "TEST", "read_shown", "shown", "write_shown"]

SHOWN = "report"
"""Folder within a run's own."""
TEST = "test.json.gz"
"""File of the test's samples; those of a validation are named after the number of updates."""

_LARGEST = 256
"""Pixels of a picture's longer side; larger ones are reduced."""
_LOSSLESS = 96
"""Pixels up to which a picture is kept as it is."""
_QUALITY = 85


def shown(picture: "Tensor", figure: Figure | None, values: Mapping[str, float]) -> dict[str, Any]:
    """Return one sample as a record has it.

    Args:
        picture: [3, H, W] uint8; not kept where there is a figure.
        figure: Its drawing, if it has one.
        values: What was measured of it; None takes the place of what is no finite number.
    """
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if figure is None:
        return {"values": known, "image": _uri(picture)}
    body = {} if figure.body is None else {"body": asdict(figure.body)}
    return {"values": known, "svg": figure.svg, **body}


def write_shown(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    return write_whole(path, gzip.compress(text.encode(), mtime=0))


def read_shown(path: Path) -> dict[str, Any]:
    """Return what `write_shown` wrote.

    Raises:
        UsageError: The file is damaged.
    """
    with loading(f"{path} is damaged"):
        record = json.loads(gzip.decompress(path.read_bytes()))
        if not isinstance(record, dict) or not isinstance(record.get("entries"), list):
            raise TypeError("it holds no samples")
        return record


def _uri(picture: "Tensor") -> str:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    kind = "PNG"
    if max(image.size) > _LOSSLESS:
        kind = "WEBP" if features.check("webp") else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
