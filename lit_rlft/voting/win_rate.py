"""How often one model's samples win against another's, with the interval that chance leaves."""

from typing import NamedTuple

__all__ = ["WinRate", "wilson"]

_QUANTILE = 1.959963984540054
"""Of the normal distribution, for 95%."""


def wilson(wins: int, total: int, quantile: float = _QUANTILE) -> tuple[float, float]:
    r"""Return Wilson's interval of a probability, of which `wins` of `total` trials came true.

    It holds the values p whose score test is not rejected,
    :math:`|\hat p - p| \le z \sqrt{p (1 - p) / n}`; all of [0, 1] without trials.

    Args:
        wins: Trials that came true.
        total: All trials.
        quantile: z of the normal distribution; that of 95% unless given.

    References:
        Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927)
    """
    if not total:
        return 0.0, 1.0
    share, square = wins / total, quantile**2 / total
    middle = (share + square / 2) / (1 + square)
    half = (square * share * (1 - share) + (square / 2) ** 2) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


class WinRate(NamedTuple):
    """Comparisons of two models' samples.

    Its interval takes them as independent, which those of one prompt are only for that prompt.

    Attributes:
        wins: The first one's sample was better.
        losses: The second one's was.
        ties: Neither was.
    """

    wins: int
    losses: int
    ties: int

    def sentence(self) -> str:
        """Return the share of wins among what was decided, with its interval."""
        decided = self.wins + self.losses
        ties = f", {self.ties} without a difference" if self.ties else ""
        if not decided:
            return f"no comparison was decided{ties}"
        low, high = wilson(self.wins, decided)
        return (
            f"the tuned model's sample won {self.wins} of {decided} comparisons{ties}: "
            f"{self.wins / decided:.1%}, 95% interval {low:.1%} to {high:.1%} if all comparisons "
            "are independent"
        )
