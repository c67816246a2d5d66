"""Which checkpoints no other one beats in the trained reward and in a held-out measurement."""

from collections.abc import Sequence

__all__ = ["WORTH", "front"]

WORTH = {"lower": lambda y: y, "higher": lambda y: -y, "either": lambda y: -abs(y)}
"""What a change of a measurement is worth, by the direction in which it becomes worse."""


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return of each point whether it is on the Pareto front, where more is better in both.

    A point is, unless another one is at least as good in both numbers and better in one.

    Args:
        points: Pairs of numbers, n of them.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    found, highest, at = [False] * len(points), float("-inf"), float("inf")
    for i in order:
        x, y = points[i]
        # Equal points are all on the front, or none of them is.
        found[i] = y > highest or (y == highest and x == at)
        if y > highest:
            highest, at = y, x
    return found
