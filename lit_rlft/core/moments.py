r"""Mean and deviation of values that come a few at a time.

With n values of mean m and sum of squared deviations S known, and n' new ones of mean m' and S':

.. math::
    m \leftarrow m + \frac{n'}{n + n'} (m' - m), \qquad
    S \leftarrow S + S' + \frac{n n'}{n + n'} (m' - m)^2.

References:
    Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan, Golub and
    LeVeque, 1979)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningMoments"]


class RunningMoments:
    """Mean and standard deviation of all values so far, in double precision.

    Attributes:
        count: Number of values.
        mean: Their mean.
        squares: Sum of their squared deviations from it.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The population's standard deviation; 0 where all values are equal."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def update(self, values: Tensor) -> None:
        """Take further values; those that are not finite are left out.

        Args:
            values: Of any shape. Their order can change the last bits.
        """
        values = values.detach().double().flatten().cpu()
        values = values[values.isfinite()]
        if not (num := len(values)):
            return
        mean = float(values.mean())
        equal = bool((values == values[0]).all())  # the mean of equal values may be rounded
        squares = 0.0 if equal else float((values - mean).square().sum())
        mean = float(values[0]) if equal else mean
        total, step = self.count + num, mean - self.mean
        self.squares += squares + step**2 * self.count * num / total
        self.mean += step * num / total
        self.count = total

    def standardised(self, values: Tensor) -> Tensor:
        """Return (values - mean) / std in the type of `values`.

        Before there are any values they stay as they are; where all were equal, none counts: 0.
        """
        if not self.count:
            return values
        if not self.std:
            return torch.zeros_like(values).where(values.isfinite(), values)
        return ((values.double() - self.mean) / self.std).to(values.dtype)

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers, which `load_state_dict` takes."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self.squares = float(state["squares"])
