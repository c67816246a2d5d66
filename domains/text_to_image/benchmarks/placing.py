"""T2I-CompBench++'s scores of places and numbers, of what a detector found."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from domains.text_to_image.benchmarks.boxes import Box, Found, overlap
from domains.text_to_image.benchmarks.phrases import (
    count_of,
    head,
    noun_phrases,
    without_article,
)

__all__ = ["Placed", "alone", "number_score", "place_score", "placed_of", "wanted_numbers"]

Objects = Mapping[str, Sequence[Found]]
"""What was found, by its name, the surest first."""
Placed = tuple[str, str, str]
"""One thing, where it lies, and the other thing."""

_RELATIONS = {
    "on side of": "beside",
    "next to": "beside",
    "near": "beside",
    "on the left": "left",
    "on the right": "right",
    "on the bottom of": "below",
    "on bottom of": "below",
    "on the top of": "above",
    "on top of": "above",
    "in front of": "front",
    "behind": "behind",
    "hidden by": "behind",
}
_PERSONS = ("girl", "boy", "man", "woman")
_SIDE = 480.0
"""The original's pictures have this shorter side, in pixels; distances below are of it."""
_FAR = 150.0
_LITTLE, _MUCH = 0.1, 0.5
"""Overlaps: two things beside each other have little, one before the other has much."""


def placed_of(prompt: str, *, by_head: bool = False) -> Placed | None:
    """Return which two things a prompt puts where; None where it names no place.

    Args:
        prompt: "a girl on the left of a frog" has ("person", "left", "frog").
        by_head: Take of each thing its last word alone, as for the complex prompts.
    """
    text = f" {prompt.strip().rstrip('.')} "
    for words, relation in _RELATIONS.items():
        before, found, after = text.partition(f" {words} ")
        one, other = noun_phrases(before), noun_phrases(after.removeprefix("of "))
        if found and one and other:
            name = head if by_head else without_article
            first, second = (name(phrase) for phrase in (one[-1], other[0]))
            return _person(first), relation, _person(second)
    return None


def place_score(
    placed: Placed, objects: Objects, size: tuple[int, int], depth: Tensor | None = None
) -> float:
    """Return how well two things lie where they should, in [0, 1].

    A quarter of each one's score, and half of how right the place is, 0 to 1; without depth a
    total below one half is 0, as in the original.

    Args:
        placed: Which things, and where.
        objects: What was found.
        size: Height and width of the picture, in pixels.
        depth: Nearness of each pixel [H, W], for "front" and "behind".
    """
    first, relation, second = placed
    best = [objects[name][0] if objects.get(name) else None for name in (first, second)]
    score = sum(0.25 * one.score for one in best if one is not None)
    if best[0] is not None and best[1] is not None:
        a, b = best[0].box, best[1].box
        if relation in ("front", "behind"):
            score += 0.5 * _depth_score(relation, a, b, depth)
        else:
            score += 0.5 * _side_score(relation, a, b, _SIDE / min(size))
    return score if depth is not None or score >= 0.5 else 0.0


def _side_score(relation: str, a: Box, b: Box, scale: float) -> float:
    """Return how right it is that a lies beside, left, right, above or below b, in [0, 1]."""
    x, y = (scale * ((b[i] + b[i + 2]) - (a[i] + a[i + 2])) / 2 for i in (0, 1))
    if relation == "beside":
        near = abs(x) < _FAR or abs(y) < _FAR
        return 1.0 if near else _FAR / max(abs(x), abs(y))
    along, across = (x, y) if relation in ("left", "right") else (y, x)
    ahead = along > 0 if relation in ("left", "above") else along < 0
    if not ahead or abs(along) <= abs(across):
        return 0.0
    common = overlap(a, b)
    return 1.0 if common < _LITTLE else _LITTLE / common


def _depth_score(relation: str, a: Box, b: Box, depth: Tensor | None) -> float:
    """Return how right it is that a lies in front of b, or behind it, in [0, 1]."""
    assert depth is not None, "front and behind are told by depth"
    nearness = []
    for box in (a, b):
        left, top, right, bottom = (max(0, int(edge)) for edge in box)
        nearness.append(
            float(depth[top : max(bottom, top + 1), left : max(right, left + 1)].mean())
        )
    before = nearness[0] - nearness[1]
    right = before > 0 if relation == "front" else before < 0
    return min(overlap(a, b) / _MUCH, 1.0) if right else 0.0


def wanted_numbers(prompt: str) -> list[tuple[int, str]]:
    """Return how many of what a prompt asks for: (2, "dog") of "two dogs"."""
    found = [count_of(phrase) for phrase in noun_phrases(prompt)]
    return [(one[0], _person(one[1])) for one in found if one is not None]


def number_score(wanted: Sequence[tuple[int, str]], objects: Objects) -> float:
    """Return how right the numbers are, in [0, 1]: of each thing half that it is there at all.

    Args:
        wanted: How many of what.
        objects: What was found, each thing once.
    """
    total = 0.0
    for number, name in wanted:
        found = len(objects.get(name, ()))
        total += 0.5 * (found > 0) + 0.5 * (found == number)
    return total / len(wanted) if wanted else 0.0


def alone(objects: Sequence[Found], limit: float = 0.9) -> list[Found]:
    """Return things of one name, each once: boxes that all but cover another's are left out."""
    kept: list[Found] = []
    for one in objects:
        if not any(_same(one.box, other.box, limit) for other in kept):
            kept.append(one)
    return kept


def _same(a: Box, b: Box, limit: float) -> bool:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height > limit * min(areas)


def _person(name: str) -> str:
    return "person" if name in _PERSONS else name
