"""Rewards of points; their optimum under a KL penalty is known in closed form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import MEANS
from domains.gaussian_mixture.samples import check_points
from lit_rlft.core.checks import UsageError, at_least, finite
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward

__all__ = ["ComponentIndicator", "Coordinate", "Quadratic"]


class Coordinate(Reward):
    """One coordinate of a point, r(x) = x[axis], unbounded.

    Args:
        axis: Which coordinate, counted from 0.
    """

    differentiable = True

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        at_least(0, self, axis=axis)
        self.axis = axis

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return one coordinate of points [B, d], [B].

        Raises:
            UsageError: The samples are no points, or have too few coordinates.
        """
        samples = check_points(samples)
        if self.axis >= samples.shape[1]:
            raise UsageError(
                f"reward.init_args.axis is {self.axis}, but the points have only "
                f"{samples.shape[1]} coordinates"
            )
        return samples[:, self.axis]


class Quadratic(Reward):
    """Minus the squared distance to a centre, r(x) = -||x - center||^2, in (-inf, 0].

    Args:
        center: [d], where the reward is highest.
    """

    differentiable = True
    center: Tensor

    def __init__(self, center: Sequence[float] = (0.0, 0.0)) -> None:
        super().__init__()
        finite(self, center=center)
        self.register_buffer("center", torch.tensor(list(center)), persistent=False)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return minus the squared distance of points [B, d] to the centre, [B].

        Raises:
            UsageError: The samples are no points, or have another number of coordinates.
        """
        samples = check_points(samples)
        if samples.shape[1:] != self.center.shape:
            raise UsageError(
                f"reward.init_args.center has {len(self.center)} coordinates, the points have "
                f"{samples.shape[1]}"
            )
        return -(samples - self.center.to(samples)).square().sum(dim=1)


class ComponentIndicator(Reward):
    """Whether the mode nearest to a point is one of those wanted, 0 or 1.

    Args:
        components: Numbers of the wanted components, counted from 0.
        means: [K, d] means of all components, as in the pipeline.

    Raises:
        UsageError: A component does not exist, or none is wanted.
    """

    means: Tensor

    def __init__(
        self, components: Sequence[int] = (4,), means: Sequence[Sequence[float]] = MEANS
    ) -> None:
        super().__init__()
        finite(self, means=means)
        if not components or not set(components) <= set(range(len(means))):
            raise UsageError(
                f"reward.init_args.components must name some of the {len(means)} components "
                f"counted from 0, got {list(components)}"
            )
        self.components = tuple(components)
        points = torch.tensor([list(mean) for mean in means], dtype=torch.float64)
        self.register_buffer("means", points, persistent=False)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the indicator for points [B, d], float32 [B] in {0, 1}.

        Raises:
            UsageError: The samples are no points, or have another number of coordinates.
        """
        samples = check_points(samples)
        if samples.shape[1] != self.means.shape[1]:
            raise UsageError(
                f"reward.init_args.means have {self.means.shape[1]} coordinates, the points have "
                f"{samples.shape[1]}"
            )
        nearest = torch.cdist(samples.detach().to(self.means), self.means).argmin(dim=1)
        wanted = torch.tensor(self.components, device=nearest.device)
        return torch.isin(nearest, wanted).float()
