"""Metrics of layouts as plain loops over lists of elements, written from their definitions.

An element is (label, left, top, right, bottom).
"""

import itertools
import math

from domains.layout.samples import Layouts

SlowElement = tuple[int, float, float, float, float]


def lists(layouts: Layouts) -> list[list[SlowElement]]:
    result = []
    for boxes, labels in zip(layouts.boxes.tolist(), layouts.labels.tolist(), strict=True):
        result.append(
            [
                (label, x - w / 2, y - h / 2, x + w / 2, y + h / 2)
                for (x, y, w, h), label in zip(boxes, labels, strict=True)
                if label >= 0
            ]
        )
    return result


def lines(e: SlowElement) -> list[float]:
    _, left, top, right, bottom = e
    return [left, (left + right) / 2, right, top, (top + bottom) / 2, bottom]


def area(e: SlowElement) -> float:
    return max(0.0, e[3] - e[1]) * max(0.0, e[4] - e[2])


def common(a: SlowElement, b: SlowElement) -> float:
    width = min(a[3], b[3]) - max(a[1], b[1])
    height = min(a[4], b[4]) - max(a[2], b[2])
    return max(0.0, width) * max(0.0, height)


def alignment(elements: list[SlowElement], num_padding: int = 0) -> float:
    """num_padding > 0 reproduces the mistake: zero boxes are partners too."""
    partners = [lines(e) for e in elements] + [[0.0] * 6] * num_padding
    total = 0.0
    for i, element in enumerate(elements):
        own = lines(element)
        others = [p for j, p in enumerate(partners) if j != i]
        if not others:
            return 0.0
        nearest = min(abs(a - b) for other in others for a, b in zip(own, other, strict=True))
        total -= math.log(1 - nearest)
    return total / max(1, len(elements))


def overlap(elements: list[SlowElement]) -> float:
    total = 0.0
    for i, a in enumerate(elements):
        total += sum(common(a, b) for j, b in enumerate(elements) if j != i) / area(a)
    return total / max(1, len(elements))


def iou(a: SlowElement, b: SlowElement) -> float:
    union = area(a) + area(b) - common(a, b)
    return common(a, b) / union if union else 0.0


def best(table: list[list[float]]) -> float:
    """Largest sum of an assignment, by trying all."""
    if not table or not table[0]:
        return 0.0
    if len(table) > len(table[0]):
        table = [list(column) for column in zip(*table, strict=True)]
    columns = range(len(table[0]))
    return max(
        sum(table[i][j] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(columns, len(table))
    )


def pair_iou(a: list[SlowElement], b: list[SlowElement]) -> float:
    total = 0.0
    for label in {e[0] for e in a}:
        first, second = ([e for e in part if e[0] == label] for part in (a, b))
        total += best([[iou(x, y) for y in second] for x in first])
    return total / len(a)


def max_iou(a: list[list[SlowElement]], b: list[list[SlowElement]]) -> float:
    def key(elements: list[SlowElement]) -> tuple[int, ...]:
        return tuple(sorted(e[0] for e in elements))

    total, count = 0.0, 0
    for group in {key(e) for e in a} & {key(e) for e in b}:
        first, second = ([e for e in part if key(e) == group] for part in (a, b))
        total += best([[pair_iou(x, y) for y in second] for x in first])
        count += min(len(first), len(second))
    return total / count if count else 0.0


def docsim(a: list[SlowElement], b: list[SlowElement]) -> float:
    def weight(x: SlowElement, y: SlowElement) -> float:
        if x[0] != y[0]:
            return 0.0
        dx, dy = ((x[i] + x[i + 2] - y[i] - y[i + 2]) / 2 for i in (1, 2))
        dw, dh = ((x[i + 2] - x[i]) - (y[i + 2] - y[i]) for i in (1, 2))
        shape = abs(dw) + abs(dh)
        return math.sqrt(min(area(x), area(y))) * 2 ** (-math.hypot(dx, dy) - 2 * shape)

    return best([[weight(x, y) for y in b] for x in a]) / max(1, min(len(a), len(b)))
