"""The Pareto front, against its definition."""

import random

from lit_rlft.report.pareto import front


def on_front(points: list[tuple[float, float]]) -> list[bool]:
    """Compare each point with every other."""
    return [not any(x >= a and y >= b and (x > a or y > b) for x, y in points) for a, b in points]


def test_the_front_is_what_nothing_beats() -> None:
    chance = random.Random(0)
    for count in range(7):
        for _ in range(60):  # few different numbers: many of them are equal
            points = [
                (float(chance.randrange(4)), float(chance.randrange(4))) for _ in range(count)
            ]
            assert front(points) == on_front(points)
