r"""Measures of single layouts, [B] each, and their smooth twins.

Every function takes `smooth`: without it, slots are full or empty and minima and pixels are hard;
with it, elements count by their `presence`, minima and pixels are soft, and gradients reach boxes
and presence. Boxes are l, t, r, b, centres xc, yc; N valid elements. What boxes of empty slots hold
does not matter; a layout with an element whose box is not finite has NaN, but for N.

References:
    Constrained Graphic Layout Generation via Latent Optimization (Kikuchi et al., 2021; alignment
    and overlap), https://arxiv.org/abs/2108.00871
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from domains.layout.samples import Layouts

__all__ = [
    "alignment",
    "columns_below",
    "coverage",
    "gap_deviation",
    "inside_page",
    "intersections",
    "num_elements",
    "overlap",
    "share_of_size",
]

P = ParamSpec("P")

RASTER = 64  # cells a side
_SOFT_MIN = 0.0015  # of the page: distances of lines beyond the smallest, by which they count
_SOFT_EDGE = 100.0  # slope of a soft box's edge, per page
_SOFT_SIZE = 0.1  # width of the soft step at a smallest size, as a share of it
_TINY = 1e-6


def _of_boxes(
    measure: Callable[Concatenate[Layouts, P], Tensor],
) -> Callable[Concatenate[Layouts, P], Tensor]:
    """Return a measure in which empty slots count nothing; NaN where a box is not finite."""

    @wraps(measure)
    def measured(layouts: Layouts, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        boxes, valid = layouts.boxes, layouts.valid.unsqueeze(-1)
        # Not finite times 0 is not 0. Smooth twins have gradients at boxes of slots that are empty.
        kept = valid | boxes.isfinite() if kwargs.get("smooth") else valid
        values = measure(replace(layouts, boxes=boxes.where(kept, 0)), *args, **kwargs)
        return values.where(layouts.finite, torch.nan)

    return measured


def num_elements(layouts: Layouts, *, smooth: bool = False) -> Tensor:
    """Return N."""
    return _weights(layouts, smooth).sum(dim=1)


@_of_boxes
def alignment(layouts: Layouts, *, smooth: bool = False, compat: bool = False) -> Tensor:
    r"""Return A, 0 where every element shares a line with another, lower is better.

    .. math::
        A = \frac1N \sum_i -\log(1 - \min_{j \ne i} \min_k |e_k^i - e_k^j|),
        \qquad e = (l, xc, r, t, yc, b).

    Papers print 100 A. A layout of fewer than two elements has 0. Distances of a whole page and
    more, which boxes on a page do not have, count as one of 1 - 1e-6: A stays finite.

    Args:
        layouts: B layouts.
        smooth: Use soft minima and presence.
        compat: Compare each element with empty slots too, as boxes 0, which the code that most
            papers use does by mistake; one element alone then has more than 0.
    """
    weights = _weights(layouts, smooth)
    lines = _lines(layouts)
    if compat:
        lines = lines.where(layouts.valid.unsqueeze(-1), 0)
    distances = (lines.unsqueeze(2) - lines.unsqueeze(1)).abs()  # [B, N, N, 6]
    partners = _others(torch.ones_like(weights) if compat else weights)
    if smooth:
        nearness = (-distances / _SOFT_MIN).exp() * partners.unsqueeze(-1)
        total = nearness.sum(dim=(2, 3))
        nearest = (nearness * distances).sum(dim=(2, 3)) / total.clamp(min=1e-30)
        # Far from all others the weights vanish in single precision: the hard minimum then.
        nearest = nearest.where(total > 1e-20, _nearest(distances, partners))
    else:
        nearest = _nearest(distances, partners)
    return _mean(-torch.log1p(-nearest.clamp(max=1 - _TINY)), weights)


@_of_boxes
def overlap(layouts: Layouts, *, smooth: bool = False, ignored: Tensor | None = None) -> Tensor:
    r"""Return O, the area that elements share with others, in own areas, lower is better.

    .. math:: O = \frac1N \sum_i \sum_{j \ne i} |b_i \cap b_j| / |b_i|

    A box without area has no share of itself to give, and nothing in common with others: its term
    is 0, and it counts in N.

    Args:
        layouts: B layouts.
        smooth: Count elements by their presence.
        ignored: Labels that are left out, such as RICO's backgrounds.
    """
    weights = _weights(layouts, smooth)
    if ignored is not None:
        weights = weights * ~torch.isin(layouts.labels, ignored)
    shared = (_shared(layouts.boxes) * _others(weights)).sum(dim=2)
    return _mean(shared, weights)


@_of_boxes
def coverage(layouts: Layouts, *, smooth: bool = False) -> Tensor:
    """Return the share of the page that elements cover, in [0, 1], on a raster of 64 x 64."""
    weights = _weights(layouts, smooth)
    edges = layouts.edges
    ticks = (torch.arange(RASTER, device=edges.device, dtype=edges.dtype) + 0.5) / RASTER
    across, down = (
        _between(ticks, edges[..., i, None], edges[..., i + 2, None], smooth) for i in (0, 1)
    )  # [B, N, 64]
    cells = (weights.unsqueeze(-1) * down).unsqueeze(-1) * across.unsqueeze(2)
    return 1 - (1 - cells).prod(dim=1).mean(dim=(1, 2))


@_of_boxes
def inside_page(layouts: Layouts, *, smooth: bool = False) -> Tensor:
    """Return the mean share of an element's area that lies on the page, in [0, 1].

    Of a box without area nothing does: its share is 0.
    """
    centre, size = layouts.boxes[..., :2], layouts.boxes[..., 2:]
    # From each side of the page to the box's other end; a box within has its size, to the bit.
    reach = torch.minimum(centre, 1 - centre) + size / 2
    inside = torch.minimum(size, reach).clamp(0, 1)
    return _mean(_of_sizes(inside, size), _weights(layouts, smooth))


@_of_boxes
def share_of_size(
    layouts: Layouts, min_width: float, min_height: float, *, smooth: bool = False
) -> Tensor:
    """Return the share of elements that are at least so wide and so high, in [0, 1]."""
    passed = torch.ones_like(layouts.presence)
    for size, least in ((layouts.boxes[..., 2], min_width), (layouts.boxes[..., 3], min_height)):
        excess = size - least
        step = torch.sigmoid(excess / (_SOFT_SIZE * least)) if smooth else (excess >= 0).to(excess)
        passed = passed * step
    return _mean(passed, _weights(layouts, smooth))


@_of_boxes
def gap_deviation(layouts: Layouts) -> Tensor:
    """Return the standard deviation of vertical gaps in columns, in pages; 0 for fewer than two.

    A gap lies between an element and the next one below it in its column; where they overlap it
    is negative. Differentiable as it is.
    """
    gaps, found = columns_below(layouts)
    counts = found.sum(dim=1)
    means = gaps.where(found, 0).sum(dim=1) / counts.clamp(min=1)
    squares = ((gaps - means.unsqueeze(1)) ** 2).where(found, 0).sum(dim=1) / counts.clamp(min=1)
    # The root of 0 has no gradient: a small number inside keeps it finite.
    deviation = (squares + _TINY**2).sqrt() - _TINY
    return deviation.where(counts > 1, 0)


def columns_below(layouts: Layouts) -> tuple[Tensor, Tensor]:
    """Return the gap below each element to the next one of its column, and whether there is one.

    Two elements are in a column where half of the narrower one's width is common.
    """
    left, top, right, bottom = layouts.edges.unbind(dim=-1)
    common = _pairs(torch.minimum, right) - _pairs(torch.maximum, left)
    narrower = _pairs(torch.minimum, right - left)
    middle = layouts.boxes[..., 1]
    below = (middle.unsqueeze(1) > middle.unsqueeze(2)) & (common > narrower / 2)
    below &= (layouts.valid.unsqueeze(1) & layouts.valid.unsqueeze(2)) & (narrower > 0)
    gaps = (top.unsqueeze(1) - bottom.unsqueeze(2)).masked_fill(~below, torch.inf)
    found = below.any(dim=2)
    return gaps.amin(dim=2).where(found, 0), found


def intersections(a: Tensor, b: Tensor) -> Tensor:
    """Return the common area of every two boxes, [..., N, M], from edges [..., N or M, 4]."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    corner = torch.maximum(a[..., :2], b[..., :2])
    opposite = torch.minimum(a[..., 2:], b[..., 2:])
    return (opposite - corner).clamp(min=0).prod(dim=-1)


def _weights(layouts: Layouts, smooth: bool) -> Tensor:
    return layouts.presence if smooth else layouts.valid.to(layouts.boxes.dtype)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Average over elements, 0 where there are none."""
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=_TINY)


def _shared(boxes: Tensor) -> Tensor:
    """Return the share of box i that lies in box j, in [0, 1], [B, N, N], from boxes [B, N, 4].

    From centres and sizes: edges in single precision lose a box of a pixel, and areas one of less.
    """
    centres, sizes = boxes[..., :2], boxes[..., 2:]
    first, second = sizes.unsqueeze(2), sizes.unsqueeze(1)
    apart = (centres.unsqueeze(2) - centres.unsqueeze(1)).abs()
    common = torch.minimum((first + second) / 2 - apart, torch.minimum(first, second))
    return _of_sizes(common.clamp(min=0), first)


def _of_sizes(parts: Tensor, sizes: Tensor) -> Tensor:
    """Return the share of boxes that parts are, [...], from extents [..., 2]; 0 without area."""
    full = sizes > 0
    shares = (parts / sizes.where(full, 1)).clamp(max=1)
    return shares.where(full, 0).prod(dim=-1)


def _lines(layouts: Layouts) -> Tensor:
    """Return l, xc, r, t, yc, b of each box, [B, N, 6]."""
    edges, (x, y) = layouts.edges, layouts.boxes[..., :2].unbind(dim=-1)
    left, top, right, bottom = edges.unbind(dim=-1)
    return torch.stack([left, x, right, top, y, bottom], dim=-1)


def _others(weights: Tensor) -> Tensor:
    """Return the weight of j as a partner of i, 0 for i itself, [B, N, N]."""
    size = weights.shape[1]
    apart = ~torch.eye(size, dtype=torch.bool, device=weights.device)
    return weights.unsqueeze(1) * apart


def _nearest(distances: Tensor, partners: Tensor) -> Tensor:
    """Return the smallest distance to a partner, [B, N]; 0 where there is none."""
    others = partners >= 0.5
    nearest = distances.amin(dim=-1).masked_fill(~others, torch.inf).amin(dim=2)
    return nearest.where(others.any(dim=2), 0)


def _between(ticks: Tensor, low: Tensor, high: Tensor, smooth: bool) -> Tensor:
    """Return whether ticks [K] lie between bounds [B, N, 1], [B, N, K]; soft at the edges."""
    if smooth:
        return torch.sigmoid(_SOFT_EDGE * (ticks - low)) * torch.sigmoid(
            _SOFT_EDGE * (high - ticks)
        )
    return ((ticks >= low) & (ticks < high)).to(low.dtype)


def _pairs(function: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
    """Combine the values of every two elements, [B, N, N]."""
    return function(values.unsqueeze(1), values.unsqueeze(2))
