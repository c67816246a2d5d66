"""Boxes of found objects: overlap, and where one lies beside another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Box", "Found", "apart", "kept", "overlap"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels; y grows downwards."""


@dataclass(frozen=True)
class Found:
    """An object that a detector found.

    Attributes:
        score: How sure the detector is, in [0, 1].
        box: Where it is.
        mask: Its pixels, bool [H, W] on the CPU; None where the detector gives boxes alone.
    """

    score: float
    box: Box
    mask: Tensor | None = None


def overlap(a: Box, b: Box, pixel: float = 0.0) -> float:
    """Return intersection over union of two boxes, in [0, 1].

    Args:
        a: A box.
        b: Another.
        pixel: 1 where right and bottom are the last pixels, 0 where they are edges.
    """
    width = min(a[2], b[2]) - max(a[0], b[0]) + pixel
    height = min(a[3], b[3]) - max(a[1], b[1]) + pixel
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + pixel) * (box[3] - box[1] + pixel) for box in (a, b)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def apart(a: Box, b: Box, threshold: float) -> set[str]:
    """Return where a lies from b: "left of", "right of", "above", "below", or none of these.

    The offset of the centres loses `threshold` times the sum of both sizes in each direction, and
    is divided by its full length; a direction counts beyond one half.
    """
    corners = np.array([a, b], dtype=float).reshape(2, 2, 2)
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    rest = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if (np.abs(rest) < 1e-3).all():
        return set()
    x, y = rest / np.linalg.norm(offset)
    known = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in known.items() if holds}


def kept(
    objects: Sequence[Found], threshold: float, max_objects: int, max_overlap: float = 1.0
) -> list[Found]:
    """Return the objects of one class that count, the surest first.

    Args:
        objects: Those found.
        threshold: Scores must be above it.
        max_objects: How many at most.
        max_overlap: Boxes that overlap a surer one's as much do not count; 1 is no limit.
    """
    sure = sorted((one for one in objects if one.score > threshold), key=lambda one: -one.score)
    chosen: list[Found] = []
    for one in sure[:max_objects]:
        alone = all(overlap(one.box, other.box, pixel=1) < max_overlap for other in chosen)
        if max_overlap == 1 or alone:
            chosen.append(one)
    return chosen
