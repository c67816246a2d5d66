"""How far points are from the distribution of a mixture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.samples import check_points
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import LeftOut, SetMetric
from lit_rlft.kit.leave_out import mmd_left_out
from lit_rlft.kit.statistics import gaussian, median_distance, mmd, similarity

__all__ = ["MMD"]


class MMD(SetMetric):
    """Unbiased squared MMD of all points of an evaluation from exact draws of a mixture.

    The kernel is Gaussian, its bandwidth the median distance of the exact draws. "mmd" may be
    negative: it is 0 on average for points of the mixture.

    Args:
        weights: [K] weights of the components, as in the pipeline.
        means: [K, d] means.
        stds: [K] standard deviations.
        num_points: Exact draws.
        num_draws: 0 leaves the standard errors of a test out; they have a closed form here.

    Raises:
        UsageError: The mixture's settings do not fit together.
    """

    def __init__(
        self,
        weights: Sequence[float] = WEIGHTS,
        means: Sequence[Sequence[float]] = MEANS,
        stds: Sequence[float] = STDS,
        num_points: int = 1000,
        num_draws: int = 20,
    ) -> None:
        super().__init__()
        at_least(2, self, num_points=num_points)
        at_least(0, self, num_draws=num_draws)
        mixture = Mixture.of(weights, means, stds, self)
        self.exact = mixture.sample(num_points, torch.Generator().manual_seed(0))
        self.kernel = gaussian(median_distance(self.exact))
        self._similarity = similarity(self.exact, self.kernel)
        self.num_draws = num_draws

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the points, {"points": [B, d]}.

        Raises:
            UsageError: The samples are no points, or have another number of coordinates.
        """
        samples = check_points(samples)
        if samples.shape[1:] != self.exact.shape[1:]:
            raise UsageError(
                f"metrics: means of MMD have {self.exact.shape[1]} coordinates, the points have "
                f"{samples.shape[1]}; give it the pipeline's mixture"
            )
        return {"points": samples}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"mmd"}, NaN for fewer than two points."""
        points = features["points"]
        return {"mmd": mmd(self.exact, points, self.kernel, self._similarity)}

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return "mmd"."""
        args = (self.exact, features["points"], self.kernel, self._similarity, pairs)
        return {"mmd": mmd_left_out(*args)}
