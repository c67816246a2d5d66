r"""Noise schedules: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` for :math:`t \in [0, 1]`.

| family | alpha_t | sigma_t |
|---|---|---|
| discrete VP (SD 1.x, 2.x, XL) | sqrt(abar_t) | sqrt(1 - abar_t) |
| cosine VP | cos(pi t / 2) | sin(pi t / 2) |
| polynomial VP (EDM for molecules) | sqrt((1 - 2p) (1 - t^2)^2 + p) | sqrt(1 - alpha_t^2) |
| rectified flow (SD3, FLUX) | 1 - t | t |

Coefficients are computed in float64 and cast where they are used.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, below_one, finite, one_of, positive, require
from lit_rlft.core.settings import Recorded
from lit_rlft.core.watched import Watched

__all__ = ["CosineVP", "DiscreteVP", "PolynomialVP", "RectifiedFlow", "Schedule", "vp_betas"]

Spacing = Literal["leading", "trailing", "linspace"]
Betas = Literal["linear", "scaled_linear"]
_ROUNDING = 1e-6
"""Of a table's levels: a level so little above an entry is that entry."""


class Schedule(Recorded, Watched, ABC):
    """The signal scale alpha_t and the noise scale sigma_t, and the sampler's grid of times.

    Attributes:
        start_scale: Standard deviation of a sampler's first state; 1 unless a scheduler of
            diffusers starts otherwise.
    """

    start_scale: float = 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t in float64, shape of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_t in float64, shape of `t`."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), each in float64 and of the shape of `t`."""
        return self.alpha(t), self.sigma(t)

    def times(self, num_steps: int) -> Tensor:
        """Return the sampler's grid [num_steps + 1], decreasing from noise to data, float64."""
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def ends(self, num_steps: int) -> Tensor:
        """Return the level that each step leads to, [num_steps], float64: the next of the grid.

        A schedule that steps past its own grid, as diffusers' DDIM can, says so here.
        """
        return self.times(num_steps)[1:]

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        """Map uniform numbers in [0, 1) to training times in (low, 1], float64.

        Uniform numbers give the distribution of t in the model's native loss.
        """
        return 1 - (1 - low) * uniform.double()


class DiscreteVP(Schedule):
    """A variance-preserving schedule with a table of betas, as diffusers stores them.

    Table index k (diffusers' timestep) is time `t = (k + 1) / T`; t = 0 is clean data. Between the
    entries, which another field's clock may visit, log abar is interpolated linearly.

    Args:
        betas: [T], each in (0, 1).
        spacing: How diffusers lays the timesteps of a sampler ("timestep_spacing").
        steps_offset: Added to every timestep for "leading" spacing.
        ends_at_zero: Whether the last step goes to t = 0 exactly ("set_alpha_to_one"); otherwise
            it ends at table index 0, the level 1 / T, and that state is taken for data.
        strides: Whether every step leads T // num_steps entries down, as diffusers' DDIM does,
            wherever the next timestep lies; otherwise to the next timestep. The two agree for
            "leading", and for "trailing" where num_steps divides T.
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        spacing: Spacing = "leading",
        steps_offset: int = 0,
        ends_at_zero: bool = True,
        strides: bool = False,
    ) -> None:
        super().__init__()
        one_of(self, "spacing", get_args(Spacing), spacing)
        # cumprod in the dtype of the betas: diffusers' tables are float32 and must be met exactly.
        alphas_bar = torch.cumprod(1 - betas, dim=0).double()
        table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar.cpu()])
        self.register_buffer("alpha_bar", table, persistent=False)
        middles = (torch.arange(1, len(table) - 1) + 0.5) / (len(table) - 1)
        self.register_buffer("middles", middles.double(), persistent=False)
        self.spacing, self.steps_offset, self.ends_at_zero = spacing, steps_offset, ends_at_zero
        self.strides = strides

    alpha_bar: Tensor
    middles: Tensor
    """Where the nearest table index changes: halfway between neighbouring levels, [T - 1]."""

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        # `pipeline.half()` must not round the tables; a device move is all that is wanted.
        exact, middles = self.alpha_bar, self.middles
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha_bar = exact.to(self.alpha_bar.device)
        self.middles = middles.to(self.middles.device)
        return self

    @property
    def num_levels(self) -> int:
        """T, the number of noise levels in the table."""
        return self.alpha_bar.shape[0] - 1

    def timestep(self, t: Tensor) -> Tensor:
        """Return the table index in [0, T - 1] that the network was trained with, int64."""
        return torch.bucketize(t.double().contiguous(), self.middles)

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._at(t)).sqrt()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._at(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _at(self, t: Tensor) -> Tensor:
        level = t.double() * self.num_levels
        below = level.floor().long().clamp(max=self.num_levels - 1)
        share = level - below
        # Powers, not logarithms: abar is 0 at the end of a table with zero terminal signal.
        return self.alpha_bar[below] ** (1 - share) * self.alpha_bar[below + 1] ** share

    def times(self, num_steps: int) -> Tensor:
        starts = (self.timesteps(num_steps) + 1) / self.num_levels
        if self.strides:
            return torch.cat([starts, self.ends(num_steps)[-1:]])
        # Where the timesteps end at 0, the level that not ends_at_zero asks for, the last step
        # changes nothing; diffusers takes it, and so do we, to visit the same states.
        return torch.cat([starts, self._last()])

    def ends(self, num_steps: int) -> Tensor:
        if not self.strides:
            return super().ends(num_steps)
        below = self.timesteps(num_steps) - self.num_levels // num_steps
        return ((below + 1) / self.num_levels).where(below >= 0, self._last())

    def timesteps(self, num_steps: int) -> Tensor:
        """Return the table indices that a sampler visits, [num_steps], decreasing, float64.

        Raises:
            UsageError: The table has fewer levels, or the spacing leads past its ends.
        """
        total = self.num_levels
        if not 1 <= num_steps <= total:
            raise UsageError(
                f"num_steps must be in [1, {total}] for this schedule, got {num_steps}"
            )
        if self.spacing == "leading":
            steps = torch.arange(num_steps, dtype=torch.float64)
            timesteps = (steps * (total // num_steps)).flip(0) + self.steps_offset
            if timesteps[0] > total - 1:
                raise UsageError(
                    f"num_steps {num_steps} with steps_offset {self.steps_offset} leads beyond "
                    f"this schedule's {total} levels; take at most {total // 2} steps"
                )
        elif self.spacing == "trailing":
            timesteps = _trailing(total, num_steps)
        else:
            steps = torch.arange(num_steps, dtype=torch.float64)
            timesteps = (steps * ((total - 1) / max(num_steps - 1, 1))).round().flip(0)
        return timesteps

    def _last(self) -> Tensor:
        """Return the level of the samples, [1]."""
        level = 0.0 if self.ends_at_zero else 1 / self.num_levels
        return torch.tensor([level], dtype=torch.float64)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        """Map uniform numbers to table levels above `low`, each equally likely."""
        first = math.floor(low * self.num_levels + _ROUNDING)
        levels = first + 1 + (uniform.double() * (self.num_levels - first)).floor()
        return levels.clamp(max=self.num_levels) / self.num_levels


class CosineVP(Schedule):
    """alpha_t = cos(w t), sigma_t = sin(w t), with w = pi / 2 unless some signal is kept at t = 1.

    Args:
        min_alpha: alpha at t = 1, in [0, 1); epsilon prediction needs about 1e-3.
    """

    def __init__(self, min_alpha: float = 0.0) -> None:
        super().__init__()
        below_one(self, min_alpha=min_alpha)
        self.angle = math.acos(min_alpha)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t.double() * self.angle).clamp(min=0)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t.double() * self.angle)


class PolynomialVP(Schedule):
    r"""alpha_t^2 = (1 - 2p) (1 - t^power)^2 + p for t > 0, and clean data at t = 0.

    EDM's table ("polynomial_2", 1,000 levels) at its own levels, but for its bound on the ratio of
    neighbours, which changes the last level by 4e-9. The level p next to the data, which EDM rounds
    away when it decodes, is left out of the sampler's grid.

    Args:
        power: Exponent of the time.
        precision: p, in (0, 1/2): the smallest variance of noise and of signal.

    References:
        Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022), Appendix B,
        https://arxiv.org/abs/2203.17003
    """

    def __init__(self, power: float = 2.0, precision: float = 1e-5) -> None:
        super().__init__()
        positive(self, power=power, precision=precision)
        require(precision < 0.5, self, "precision", f"below 0.5, got {precision}")
        self.power, self.precision = power, precision

    def alpha(self, t: Tensor) -> Tensor:
        return self.levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.levels(t)[1]

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t, p = t.double(), self.precision
        alpha_bar = (1 - 2 * p) * (1 - t**self.power).square() + p
        alpha_bar = alpha_bar.where(t > 0, 1.0)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class RectifiedFlow(Schedule):
    """alpha_t = 1 - t, sigma_t = t, with the resolution-dependent time shift of SD3.

    Args:
        shift: Grid and training times are mapped by t -> shift t / (1 + (shift - 1) t); 1 is the
            identity (Esser et al., 2024, arXiv 2403.03206, section 5.3.2).
        logit_normal: Mean and standard deviation of the logit of the training times before the
            shift, where they are not uniform (the same, section 3.1): more of them lie where
            samples take their shape.
        last: The last time of the sampler above 0, before the shift, as SD3's scheduler has it:
            all others are then evenly spaced between 1 and this one. None spaces them evenly
            between 1 and 0.
        knots: Points (share of the steps done, time) of the sampler's grid between (0, 1) and
            (1, 0). The times of any number of steps lie on straight lines between them, without the
            shift, so that one list that was found for a model serves all of its samplers (as the
            lists of Sabour et al., 2024, arXiv 2404.14507, do). None takes `shift` and `last`.
    """

    def __init__(
        self,
        shift: float = 1.0,
        logit_normal: tuple[float, float] | None = None,
        last: float | None = None,
        knots: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        positive(self, shift=shift)
        finite(self, logit_normal=logit_normal)
        require(last is None or 0 < last < 1, self, "last", f"between 0 and 1, got {last}")
        if logit_normal is not None and (len(logit_normal) != 2 or logit_normal[1] <= 0):
            raise UsageError(
                "logit_normal must be a mean and a standard deviation above 0, got "
                f"{list(logit_normal)}"
            )
        self.shift, self.logit_normal, self.last = shift, logit_normal, last
        self.knots = None if knots is None else _knots(knots)
        require(None in (last, knots), self, "last", "left out where there are knots")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def times(self, num_steps: int) -> Tensor:
        if self.knots is not None:
            points = torch.tensor([(0, 1), *self.knots, (1, 0)], dtype=torch.float64)
            return _on_lines(points, torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
        if self.last is None:
            return _shifted(super().times(num_steps), self.grid_shift(num_steps))
        above = torch.linspace(1, self.last, num_steps, dtype=torch.float64)
        return _shifted(torch.cat([above, above.new_zeros(1)]), self.grid_shift(num_steps))

    def grid_shift(self, num_steps: int) -> float:
        """Return the shift of the sampler's grid, which is that of the training times here."""
        return self.shift

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        """Map uniform numbers to shifted times in (low, 1]."""
        unshifted_low = low / (self.shift - (self.shift - 1) * low)
        if self.logit_normal is None:
            return _shifted(super().draw_times(uniform, unshifted_low), self.shift)
        mean, std = self.logit_normal
        below = torch.tensor(unshifted_low, dtype=torch.float64).logit()
        mass = super().draw_times(uniform, float(torch.special.ndtr((below - mean) / std)))
        return _shifted((mean + std * torch.special.ndtri(mass)).sigmoid(), self.shift)


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _knots(knots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points as tuples, which go down from (0, 1) to (1, 0)."""
    if all(isinstance(point, Sequence) and len(point) == 2 for point in knots):
        done, times = zip((0.0, 1.0), *knots, (1.0, 0.0), strict=True)
        if all(a < b for a, b in pairwise(done)) and all(a > b for a, b in pairwise(times)):
            return [(float(share), float(time)) for share, time in knots]
    raise UsageError(
        "knots must be pairs of a share of the steps that rises between 0 and 1 and a time that "
        f"falls between 1 and 0, such as [[0.2, 0.4], [0.9, 0.05]], got {list(knots)}"
    )


def _on_lines(points: Tensor, x: Tensor) -> Tensor:
    """Return y of each x on the lines through points (x, y) [P, 2], whose x rise."""
    after = torch.searchsorted(points[:, 0].contiguous(), x).clamp(min=1)
    (x_0, y_0), (x_1, y_1) = points[after - 1].T, points[after].T
    return torch.lerp(y_0, y_1, (x - x_0) / (x_1 - x_0))


def _trailing(total: int, num_steps: int) -> Tensor:
    """Return round(T - i T / N) - 1 in the arithmetic of numpy's `arange`, diffusers' own.

    Where T / N is not exact its rounding decides ties, and whether there is one number too many.
    """
    step = total / num_steps
    if math.ceil(total / step) != num_steps:
        fits = [n for n in range(1, num_steps) if math.ceil(total / (total / n)) == n]
        raise UsageError(
            f"num_steps {num_steps} does not work with timestep_spacing 'trailing': rounding gives "
            f"diffusers one timestep more, below the table; take {fits[-1]}"
        )
    steps = torch.arange(num_steps, dtype=torch.float64)
    return (total + steps * ((total - step) - total)).round() - 1


def vp_betas(
    num_levels: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    kind: Betas = "scaled_linear",
) -> Tensor:
    """Return betas [num_levels] of a discrete VP schedule, float32; defaults are SD 1.x's."""
    one_of(vp_betas, "kind", get_args(Betas), kind)
    if kind == "linear":
        return torch.linspace(beta_start, beta_end, num_levels)
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_levels) ** 2
