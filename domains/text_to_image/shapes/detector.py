"""A programmatic detector for the shapes world: finds the figures and judges pictures.

`detect` needs no learned weights: it tells figures from the ground by colour, and shapes from each
other by overlap with templates. `judge` compares what was found with what a prompt demands, as
GenEval does with an object detector, and stricter: extra objects count against the picture.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from domains.text_to_image.shapes.world import (
    COLORS,
    GROUNDS,
    HALF_EXTENTS,
    RELATIONS,
    SHAPES,
    SIZE,
    Prompt,
    Requirement,
    signed_distance,
)

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

_GRID = 20  # masks are compared after resampling to _GRID x _GRID
_TEMPLATE_RADII = (7.0, 9.0, 11.5, 14.0)
_TEMPLATE_BLURS = (0.0, 1.0)
_MIN_AREA = 30.0  # square pixels at 64 x 64; the smallest figure of a scene has about 100
_MIN_CORE = 12.0
_MIN_CONFIDENCE = 0.5
_MIN_OFFSET = 6.0
# Overlap with a template that counts as no likeness and as full likeness.
_OVERLAP_RANGE = (0.5, 0.95)
_OVERLAP_WIDTH = 0.08
_COLOR_WIDTH = 30.0
_MAX_COLOR_DISTANCE = 60.0
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_LUMA_WEIGHT = 0.6
_PALETTE: Array = np.array(list(COLORS.values()), np.float32)
_NEUTRAL: Array = np.array(list(GROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        shape: The likeliest of `SHAPES`.
        color: The likeliest of `COLORS`.
        x: Middle of the bounding box, in pixels from the left.
        y: Middle of the bounding box, in pixels from the top.
        radius: Radius of a `Figure` of that shape and size, in pixels.
        area: Area in square pixels.
        shape_scores: Likeness in [0, 1] for every shape.
        color_scores: Likeness in [0, 1] for every colour.
        confidence: The smaller of the two best likenesses.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    area: float
    shape_scores: dict[str, float]
    color_scores: dict[str, float]
    confidence: float


@dataclass(frozen=True)
class Judgement:
    """How well a picture shows what a prompt demands: `score` is 1 if and only if `correct`."""

    score: float
    correct: bool


def detect(picture: NDArray[Any]) -> list[Detection]:
    """Finds the figures of a picture, largest first.

    Args:
        picture: RGB [H, W, 3], uint8, or floating point in [0, 1].

    Raises:
        ValueError: The picture has another shape, dtype or range.
    """
    pixels = _as_float(picture)
    scale = math.sqrt(pixels.shape[0] * pixels.shape[1]) / SIZE
    ground = _estimate_ground(pixels)
    difference = pixels - ground
    nearest = _nearest_color(difference, ground)
    detections = [
        _describe(mask, others, pixels, difference, ground)
        for mask, others in _components(nearest, scale)
    ]
    return sorted(detections, key=lambda detection: -detection.area)


def judge(picture: NDArray[Any], prompt: Prompt) -> Judgement:
    """Judges a picture against a prompt; see `judge_detections` for the rule."""
    detections = detect(picture)
    height, width = picture.shape[:2]
    return judge_detections(detections, prompt, size=math.sqrt(height * width))


def judge_detections(
    detections: Sequence[Detection], prompt: Prompt, *, size: float = SIZE
) -> Judgement:
    """Judges the objects found in a picture against a prompt.

    Every demanded object is assigned a detection of its own, by greatest total likeness. The
    picture is correct if there are exactly as many detections as demanded objects and all agree in
    shape, in colour where one is demanded, and in relation: the offset of the box middles lies
    within 45 degrees of the demanded direction. Both likenesses must reach one half as well, so a
    blob that is nothing in particular satisfies no prompt. A correct picture has score 1. Any
    other, with n demanded and m found objects, has

        score = 0.9 * sum(0.2 + 0.8 * shape * (0.4 + 0.6 * colour)) / max(n, m) * (1 + relation) / 2

    where the sum is over assigned pairs, `shape` and `colour` are the likenesses of the detection
    (to its own colour where none is demanded) and `relation` is (1 + cos a) / 2 for an angle a
    between the offset and the demanded direction: 0 if one of the two objects is missing, 1 if no
    relation is demanded.
    """
    wanted = [
        (index, requirement)
        for index, requirement in enumerate(prompt.include)
        for _ in range(requirement.count)
    ]
    if not detections:
        return Judgement(0.0, False)
    likeness = np.array([[_likeness(d, r) for d in detections] for _, r in wanted])
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    found: dict[int, Detection] = {}
    agree = len(detections) == len(wanted)
    for row, column in zip(rows, columns, strict=True):
        index, requirement = wanted[row]
        found[index] = detections[column]
        agree &= _agrees(detections[column], requirement)
    relation, holds = _relation(found, prompt, size / SIZE)
    if agree and holds:
        return Judgement(1.0, True)
    match = float(likeness[rows, columns].sum()) / max(len(wanted), len(detections))
    return Judgement(0.9 * match * (1 + relation) / 2, False)


def _likeness(detection: Detection, requirement: Requirement) -> float:
    color = detection.color_scores[requirement.color or detection.color]
    return 0.2 + 0.8 * detection.shape_scores[requirement.shape] * (0.4 + 0.6 * color)


def _agrees(detection: Detection, requirement: Requirement) -> bool:
    return (
        detection.confidence >= _MIN_CONFIDENCE
        and detection.shape == requirement.shape
        and requirement.color in (None, detection.color)
    )


def _relation(found: dict[int, Detection], prompt: Prompt, scale: float) -> tuple[float, bool]:
    """Returns how well the demanded relations hold, in [0, 1], and whether they do."""
    softest, holds = 1.0, True
    for index, requirement in enumerate(prompt.include):
        if requirement.position is None:
            continue
        relation, other = requirement.position
        if index not in found or other not in found:
            return 0.0, False
        axis, sign = RELATIONS[relation]
        offset = (found[index].x - found[other].x, found[index].y - found[other].y)
        along, across = sign * offset[axis] / scale, abs(offset[1 - axis]) / scale
        softest = min(softest, (1 + along / max(math.hypot(along, across), 1e-6)) / 2)
        holds &= along > max(across, _MIN_OFFSET)
    return softest, holds


def _as_float(picture: NDArray[Any]) -> Array:
    """Returns the picture as float32 in [0, 255]."""
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < 16:
        raise ValueError(
            f"a picture must be [H, W, 3] with at least 16 pixels a side, got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a picture must be uint8 or floating point, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false for NaN
        raise ValueError(
            f"a floating-point picture must lie in [0, 1], got values from {low:g} to {high:g}"
        )
    return array.astype(np.float32) * 255


def _estimate_ground(pixels: Array) -> Array:
    """Returns the colour of the frame, [3]; a vivid one is taken for an object, not for ground."""
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    color: Array = np.median(frame, axis=0)
    to_neutral = np.square(_NEUTRAL - color).sum(-1)
    if np.square(_PALETTE - color).sum(-1).min() < to_neutral.min():
        color = _NEUTRAL[to_neutral.argmin()]
    return color


def _nearest_color(difference: Array, ground: Array) -> NDArray[np.int64]:
    """Returns the palette index of every pixel, [H, W], or -1 for ground.

    An edge pixel is a mixture (1 - a) ground + a colour, so the distance is taken to the segment
    from the ground to each colour, and a pixel belongs to a figure when a > 1/2.
    """
    nearest = np.full(difference.shape[:2], -1, np.int64)
    norm = np.square(difference).sum(-1)
    direction = _PALETTE - ground  # [colour, 3]
    length = np.square(direction).sum(-1)
    rows, columns = np.nonzero(norm > length.min() / 8)
    dot = difference[rows, columns] @ direction.T  # [pixel, colour]
    fraction = np.clip(dot / length, 0, 1)
    cost = norm[rows, columns, None] + fraction * (fraction * length - 2 * dot)
    # Between almost collinear colours, the one that needs less mixing is likelier.
    cost += 0.15 * np.square(1 - fraction) * length
    best = cost.argmin(1)
    is_figure = np.take_along_axis(fraction, best[:, None], 1)[:, 0] > 0.5
    nearest[rows[is_figure], columns[is_figure]] = best[is_figure]
    return nearest


def _components(nearest: NDArray[np.int64], scale: float) -> Iterator[tuple[Mask, Mask]]:
    """Yields the mask of every object and that of everything else that is not ground."""
    figures = nearest >= 0
    for mask in _label(figures, _MIN_AREA * scale**2):
        core = ndimage.binary_erosion(mask)
        counts = np.bincount(nearest[core], minlength=len(COLORS))
        threshold = max(_MIN_CORE * scale**2, 0.15 * counts.sum())
        colors = np.flatnonzero(counts >= threshold)
        pieces = [mask]
        if len(colors) > 1:
            # Figures that touch. A single figure of an odd colour falls apart into crumbs instead.
            split = [
                piece
                for color in colors
                for piece in _label(mask & (nearest == color), _MIN_AREA * scale**2)
            ]
            if sum(piece.sum() for piece in split) > 0.8 * mask.sum():
                pieces = split
        for piece in pieces:
            yield piece, figures & ~piece


def _label(mask: Mask, min_area: float) -> Iterator[Mask]:
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())
    for label in range(1, len(areas)):
        if areas[label] >= min_area:
            yield labels == label


def _describe(
    mask: Mask, others: Mask, pixels: Array, difference: Array, ground: Array
) -> Detection:
    box = _bounding_box(mask)
    inside = mask[box]
    core = ndimage.binary_erosion(inside)
    color_scores = _color_scores(pixels[box][core if core.any() else inside].mean(0))
    color = max(color_scores, key=color_scores.__getitem__)
    direction = np.array(COLORS[color], np.float32) - ground
    fraction = difference[box] @ (direction / np.square(direction).sum())
    cover = _steepen(fraction) * ~others[box]
    shape_scores = _shape_scores(cover)
    shape = max(shape_scores, key=shape_scores.__getitem__)
    height, width = cover.shape
    unit_width, unit_height = HALF_EXTENTS[shape]
    return Detection(
        shape=shape,
        color=color,
        x=(box[1].start + box[1].stop) / 2,
        y=(box[0].start + box[0].stop) / 2,
        radius=(width / unit_width + height / unit_height) / 4,
        area=float(cover.sum()),
        shape_scores=shape_scores,
        color_scores=color_scores,
        confidence=min(shape_scores[shape], color_scores[color]),
    )


def _steepen(cover: Array) -> Array:
    """Returns a soft mask with steeper edges, so that noise on the ground adds no area."""
    steep: Array = np.clip(1.5 * cover - 0.25, 0, 1)
    return steep


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _color_scores(color: Array) -> dict[str, float]:
    """Returns softmax likenesses in a distance that forgives lightness more than hue."""
    offset = _PALETTE - color
    luma = offset @ _LUMA
    chroma = offset - luma[:, None]
    squared = np.square(chroma).sum(-1) + 3 * _LUMA_WEIGHT * np.square(luma)
    scores = np.exp((squared.min() - squared) / (2 * _COLOR_WIDTH**2))
    scores /= scores.sum()
    # Nothing of the palette: grey, brown, black.
    scores *= min(1.0, float(_MAX_COLOR_DISTANCE**2 / max(squared.min(), 1.0)))
    return dict(zip(COLORS, scores.tolist(), strict=True))


def _shape_scores(cover: Array) -> dict[str, float]:
    """Returns the likeness of a cropped soft mask to every shape.

    It is the overlap (intersection over union) with the shape's best template, less if another
    shape overlaps more, for a box of other proportions, and for a middle that is empty where it
    should be full or the reverse.
    """
    grid = _resample(cover)
    templates = _templates()  # [size, shape, _GRID, _GRID]
    union = np.maximum(templates, grid).sum((-1, -2))
    overlap = (np.minimum(templates, grid).sum((-1, -2)) / union).max(0)
    low, high = _OVERLAP_RANGE
    scores = np.clip((overlap - low) / (high - low), 0, 1)
    # All shapes overlap: without this a square would be two thirds of a circle.
    scores *= np.exp((overlap - overlap.max()) / _OVERLAP_WIDTH)
    middle = slice(_GRID // 2 - 2, _GRID // 2 + 2)
    filled = float(grid[middle, middle].mean())
    proportion = cover.shape[1] / cover.shape[0]
    result = {}
    for shape, score in zip(SHAPES, scores.tolist(), strict=True):
        width, height = HALF_EXTENTS[shape]
        # A box edge is off by up to a pixel: the small deviations that causes are free.
        stretch = max(0.0, abs(math.log(proportion * height / width)) - 0.2)
        result[shape] = score * math.exp(-2 * stretch) * (1 - filled if shape == "ring" else filled)
    return result


@lru_cache
def _templates() -> Array:
    """Returns the shapes at several sizes and blurs as `_shape_scores` would see them.

    Cropping and resampling here as there makes their losses cancel.
    """
    offsets = np.arange(3) / 3
    y, x = np.meshgrid(np.arange(-20.0, 20.0), np.arange(-20.0, 20.0), indexing="ij")
    sizes = [(radius, blur) for radius in _TEMPLATE_RADII for blur in _TEMPLATE_BLURS]
    templates = np.zeros((len(sizes), len(SHAPES), _GRID, _GRID), np.float32)
    for i, (radius, blur) in enumerate(sizes):
        for j, shape in enumerate(SHAPES):
            for dx, dy in product(offsets, offsets):
                cover = np.clip(0.5 - signed_distance(shape, x - dx, y - dy, radius), 0, 1)
                soft: Array = ndimage.gaussian_filter(cover, blur).astype(np.float32)
                crop = _steepen(soft[_bounding_box(soft > 0.5)])
                templates[i, j] += _resample(crop) / len(offsets) ** 2
    return templates


def _resample(cover: Array) -> Array:
    height, width = cover.shape
    return np.asarray(_interpolation(height) @ cover @ _interpolation(width).T, np.float32)


@lru_cache(maxsize=1024)
def _interpolation(length: int) -> Array:
    """Returns the matrix [_GRID, length] of linear interpolation at the middles of _GRID cells."""
    positions = np.clip((np.arange(_GRID) + 0.5) * length / _GRID - 0.5, 0, length - 1)
    distance = np.abs(positions[:, None] - np.arange(length))
    return np.asarray(np.maximum(0, 1 - distance), np.float32)
