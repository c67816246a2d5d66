"""How a report shows a sample that is no picture: a drawing, and a body in space."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Body", "Figure"]


@dataclass(frozen=True)
class Body:
    """Balls and sticks, which a report lets people turn.

    Attributes:
        points: Centres of N balls, [N, 3] in any unit of length.
        names: What each ball is, N words.
        colors: Colour of each ball as "#rrggbb", N of them.
        radii: Radius of each ball in the unit of `points`, N numbers.
        sticks: Pairs of balls that a stick joins, numbers in [0, N).
    """

    points: Sequence[Sequence[float]]
    names: Sequence[str]
    colors: Sequence[str]
    radii: Sequence[float]
    sticks: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Figure:
    """A drawing of one sample that stays crisp at any size.

    Attributes:
        svg: An SVG document.
        body: The sample in space, if it has a shape there.
    """

    svg: str
    body: Body | None = None
