"""Comparisons of two sets of layouts, or of the pairs of two sets.

References:
    Constrained Graphic Layout Generation via Latent Optimization (Kikuchi et al., 2021; Max IoU),
    https://arxiv.org/abs/2108.00871
    READ: Recursive Autoencoders for Document Layout Generation (Patil et al., 2019; DocSim),
    https://arxiv.org/abs/1909.00302
"""

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import Tensor
from tqdm.auto import tqdm

from domains.layout.page import measures
from domains.layout.samples import Layouts

__all__ = ["box_wasserstein", "class_total_variation", "docsim", "max_iou"]


def max_iou(a: Layouts, b: Layouts, *, progress: bool = False) -> float:
    """Return Max IoU of two sets, in [0, 1]: how well their layouts of the same classes match.

    A box that is not finite has an IoU of 0 with every other.

    Both sets are grouped by the multiset of labels. A pair of layouts scores the mean over
    elements of the IoU under the best assignment of elements of equal labels; each group scores
    under the best assignment of layouts, summed, and divided by the number of pairs.

    Args:
        a: Generated layouts.
        b: Real ones.
        progress: Show a progress bar.
    """
    groups = [_by_labels(layouts) for layouts in (a, b)]
    common = sorted(set(groups[0]) & set(groups[1]))
    scores: list[float] = []
    for key in tqdm(common, "Max IoU", disable=not progress, leave=False):
        table = _pair_scores(
            _sorted_edges(a, groups[0][key]), _sorted_edges(b, groups[1][key]), key
        )
        chosen = linear_sum_assignment(table, maximize=True)
        scores += table[chosen].tolist()
    return float(np.mean(scores)) if scores else 0.0


def docsim(a: Layouts, b: Layouts, *, normalised: bool = False) -> NDArray[np.float64]:
    r"""Return DocSim of the i-th layout of each set, [B].

    Elements of equal classes are assigned so that the sum of weights is largest,

    .. math:: w = \min(a_1, a_2)^{1/2}\; 2^{-d - 2 (|\Delta w| + |\Delta h|)}

    with areas a and the distance d of centres; DocSim is the mean weight over the elements of the
    smaller layout.

    Args:
        a: B layouts.
        b: B layouts.
        normalised: Divide the sum by the number of elements of the larger layout instead, and by
            the geometric mean of each layout's DocSim to itself: in [0, 1], and 1 for equal
            layouts. Two whose DocSim to themselves is 0, without elements or area, are equal.

    NaN where an element's box is not finite.
    """
    lost = ~(a.finite & b.finite).numpy()
    weights = np.where(lost[:, None, None], 0, _docsim_weights(a, b))
    counts = torch.minimum(a.num_elements, b.num_elements).clamp(min=1).numpy()
    totals = np.array([w[linear_sum_assignment(w, maximize=True)].sum() for w in weights])
    totals[lost] = np.nan
    if not normalised:
        return totals / counts
    own = [_self_similarity(layouts) for layouts in (a, b)]
    larger = torch.maximum(a.num_elements, b.num_elements).clamp(min=1).numpy()
    scale = np.sqrt(own[0] * own[1])
    similarity = totals / larger / np.where(scale > 0, scale, 1)
    return np.where((own[0] == 0) & (own[1] == 0), 1.0, similarity)


def class_total_variation(a: Layouts, b: Layouts) -> float:
    """Return half of the sum of differences of class shares, in [0, 1].

    1 where one of the sets has no elements.
    """
    counts = [
        torch.bincount(layouts.labels[layouts.valid], minlength=len(layouts.classes)).double()
        for layouts in (a, b)
    ]
    if not all(count.any() for count in counts):
        return 1.0
    first, second = (count / count.sum() for count in counts)
    return 0.5 * float((first - second).abs().sum())


def box_wasserstein(a: Layouts, b: Layouts) -> float:
    """Return the mean Wasserstein-1 distance of centres, widths and heights of all elements.

    1 where one of the sets has no elements. Boxes that are not finite are left out.
    """
    first, second = (
        layouts.boxes[layouts.valid & layouts.boxes.isfinite().all(dim=-1)].double().numpy()
        for layouts in (a, b)
    )
    if not len(first) or not len(second):
        return 1.0
    return float(np.mean([wasserstein_distance(first[:, i], second[:, i]) for i in range(4)]))


def _by_labels(layouts: Layouts) -> dict[tuple[int, ...], list[int]]:
    """Return the layouts of each multiset of labels."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (row, valid) in enumerate(
        zip(layouts.labels.tolist(), layouts.valid.tolist(), strict=True)
    ):
        key = tuple(sorted(label for label, full in zip(row, valid, strict=True) if full))
        if key:
            groups[key].append(i)
    return groups


def _sorted_edges(layouts: Layouts, members: list[int]) -> Tensor:
    """Return the elements' edges by label, [n, k, 4], of layouts of the same multiset."""
    part = layouts.index(torch.tensor(members))
    last = len(layouts.classes)
    order = part.labels.where(part.valid, last).argsort(dim=1, stable=True)
    count = int(part.num_elements[0])
    # Single precision loses the edges of a box of a pixel.
    edges = Layouts.of(part.boxes.double(), part.labels, part.classes).edges
    return edges.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))[:, :count]


def _pair_scores(a: Tensor, b: Tensor, key: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the score of every pair of layouts [n, k, 4] and [m, k, 4] of equal labels, [n, m]."""
    labels, total = np.array(key), np.zeros((len(a), len(b)))
    for label in np.unique(labels):
        places = torch.from_numpy(np.flatnonzero(labels == label))
        table = _iou(a[:, places].unsqueeze(1), b[:, places].unsqueeze(0)).numpy()
        total += _best_sums(table)
    return total / len(key)


def _best_sums(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest sum of an assignment in each table [n, m, k, k], [n, m]."""
    size = tables.shape[-1]
    if size == 1:
        return tables[..., 0, 0]
    if size == 2:
        straight = tables[..., 0, 0] + tables[..., 1, 1]
        return np.maximum(straight, tables[..., 0, 1] + tables[..., 1, 0])
    flat = tables.reshape(-1, size, size)
    sums = [table[linear_sum_assignment(table, maximize=True)].sum() for table in flat]
    return np.array(sums).reshape(tables.shape[:2])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of every two boxes, [..., N, M]; 0 for boxes without area."""
    common = measures.intersections(a, b)
    areas = [(edges[..., 2:] - edges[..., :2]).clamp(min=0).prod(dim=-1) for edges in (a, b)]
    union = areas[0].unsqueeze(-1) + areas[1].unsqueeze(-2) - common
    found = (union > 0) & common.isfinite() & union.isfinite()
    return (common / union.where(found, 1)).where(found, 0)


def _docsim_weights(a: Layouts, b: Layouts) -> NDArray[np.float64]:
    """Return the weight of every two elements, [B, N, M]; 0 for other classes or empty slots."""
    first, second = a.boxes.double().unsqueeze(2), b.boxes.double().unsqueeze(1)
    distance = (first - second)[..., :2].norm(dim=-1)
    shape = (first - second)[..., 2:].abs().sum(dim=-1)
    area = torch.minimum(first[..., 2:].prod(dim=-1), second[..., 2:].prod(dim=-1)).clamp(min=0)
    same = (a.labels.unsqueeze(2) == b.labels.unsqueeze(1)) & a.valid.unsqueeze(2)
    return (area.sqrt() * 2 ** (-distance - 2 * shape)).where(same, 0).numpy()


def _self_similarity(layouts: Layouts) -> NDArray[np.float64]:
    """Return DocSim of each layout to itself: the mean root of the areas."""
    areas = layouts.boxes[..., 2:].double().prod(dim=-1).clamp(min=0)
    roots = areas.sqrt().where(layouts.valid, 0).sum(dim=1)
    return (roots / layouts.num_elements.clamp(min=1)).numpy()
