"""Noise levels and grids of schedulers that were saved with a model, as diffusers steps them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, positive, within
from lit_rlft.core.schedule import DiscreteVP, RectifiedFlow

__all__ = [
    "CONVERSIONS",
    "Clip",
    "SavedFlow",
    "SavedVP",
    "SolvedFlow",
    "Threshold",
    "own_flow",
    "plain_flow",
]

Blend = Literal["power", "linear", "log"]
CONVERSIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Options that lay a grid by its sigmas."""
_MADE_OF = "_made_of"
"""Setting of an exported flow: the model's own shift, and the number of steps of its grid."""


@dataclass(frozen=True)
class Clip:
    """Clipping of x_0 to [-limit, limit] ("clip_sample")."""

    limit: float

    def __post_init__(self) -> None:
        positive(self, "limit")

    def __call__(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding ("thresholding"): clipping to a quantile of |x_0|, scaled to [-1, 1].

    Attributes:
        ratio: Which quantile of a sample's numbers, in [0, 1].
        limit: Its upper bound; the lower one is 1.

    References:
        Imagen (Saharia et al., 2022), section 2.3, https://arxiv.org/abs/2205.11487
    """

    ratio: float
    limit: float

    def __post_init__(self) -> None:
        within(0, 1, self, "ratio")
        positive(self, "limit")

    def __call__(self, x_0: Tensor) -> Tensor:
        sizes = x_0.flatten(start_dim=1).abs().quantile(self.ratio, dim=1)
        sizes = sizes.clamp(1, self.limit).view(-1, *[1] * (x_0.ndim - 1))
        return x_0.clamp(-sizes, sizes) / sizes


class SavedVP(DiscreteVP):
    """The table of a saved scheduler, and its own grid.

    Args:
        scheduler: One of diffusers' schedulers with a table; a copy is kept.
        asked: Whether the grid is what its `set_timesteps` gives; otherwise it is computed.
        scaled: Whether it steps variance-exploding states, x_t / alpha_t: timesteps may then lie
            between the entries, and samplers start at its `init_noise_sigma`.
        converted: Whether its timesteps follow from sigmas (karras, exponential, beta); then
            log sigma is interpolated between the entries of a scaled one, sigma otherwise.
        strides: As in `DiscreteVP`.
        ends_at_zero: The same; where the grid is asked for, its last sigma decides.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        asked: bool = False,
        scaled: bool = False,
        converted: bool = False,
        strides: bool = False,
        ends_at_zero: bool = True,
    ) -> None:
        config = scheduler.config
        super().__init__(
            scheduler.betas,
            spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            ends_at_zero=ends_at_zero,
            strides=strides,
        )
        # Euler's last entry under zero SNR is 2^-24, which the betas do not say.
        self.alpha_bar[1:] = scheduler.alphas_cumprod.double()
        self.scaled = scaled
        self.blend: Blend = "power"
        if scaled:
            self.blend = "log" if converted else "linear"
        self._scheduler = copy.deepcopy(scheduler) if asked else None
        if scaled:
            self._ask(2)
            self.start_scale = self._start()

    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network is told: a table index, or float32 between the entries."""
        if not self.scaled:
            return super().timestep(t)
        return (t.double() * self.num_levels - 1).clamp(min=0).float()

    def times(self, num_steps: int) -> Tensor:
        if self._scheduler is None:
            return super().times(num_steps)
        starts = (self.timesteps(num_steps) + 1) / self.num_levels
        last = float(self._scheduler.sigmas[-1])
        lowest = float((1 / self.alpha_bar[1] - 1).sqrt())
        if last == 0:
            end = 0.0
        else:  # UniPC's karras grid repeats its last level
            end = 1 / self.num_levels if last <= 1.001 * lowest else float(starts[-1])
        return torch.cat([starts, torch.tensor([end], dtype=torch.float64)])

    def timesteps(self, num_steps: int) -> Tensor:
        if self._scheduler is None:
            return super().timesteps(num_steps)
        if not 1 <= num_steps <= self.num_levels:
            return super().timesteps(num_steps)  # which refuses
        timesteps = self._ask(num_steps)
        moved = self.scaled and not math.isclose(self._start(), self.start_scale, rel_tol=1e-6)
        if len(timesteps) != num_steps or moved:
            raise UsageError(
                f"num_steps {num_steps} does not work with a {type(self._scheduler).__name__}: its "
                f"set_timesteps gives {len(timesteps)} timesteps from {float(timesteps[0]):g} on; "
                "take another number"
            )
        return timesteps.clamp(max=self.num_levels - 1)

    def _ask(self, num_steps: int) -> Tensor:
        """Return the scheduler's timesteps, once where it evaluates the network twice a step."""
        assert self._scheduler is not None
        try:
            self._scheduler.set_timesteps(num_steps)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"num_steps {num_steps} does not work with a {type(self._scheduler).__name__} "
                f"({reason}); take another number"
            ) from error
        return self._scheduler.timesteps.double()[:: self._scheduler.order]

    def _start(self) -> float:
        """Return the standard deviation of the first state in units of ours."""
        assert self._scheduler is not None
        largest = float(self._scheduler.sigmas.max())
        scale = float(self._scheduler.init_noise_sigma) / math.sqrt(largest**2 + 1)
        return 1.0 if math.isclose(scale, 1, rel_tol=1e-6) else scale  # it is in single precision

    def _at(self, t: Tensor) -> Tensor:
        if self.blend == "power":
            return super()._at(t)
        level = t.double() * self.num_levels
        below = level.floor().long().clamp(max=self.num_levels - 1)
        share = level - below
        sigmas = (1 / self.alpha_bar - 1).sqrt()
        low, high = sigmas[below], sigmas[below + 1]
        between = (1 - share) * low + share * high
        if self.blend == "log":  # not next to clean data, where the logarithm has no value
            between = between.where(below == 0, low ** (1 - share) * high**share)
        return 1 / (1 + between**2)


class SavedFlow(RectifiedFlow):
    """A rectified flow that diffusers' FlowMatchEulerDiscreteScheduler was saved for.

    A plain config has the grid of evenly spaced levels 1, ..., 1 / N, shifted, which pipelines such
    as FLUX's pass to the scheduler. With `shift_terminal` or a conversion of the sigmas the grid is
    what the scheduler's `set_timesteps` gives.

    Args:
        scheduler: Its `config` is read; a copy is kept.
        mu: What the pipeline passes for a dynamic shift; None takes the fixed shift.
        own_grid: Whether the pipeline leaves the levels to the scheduler, which spaces them down to
            the table's lowest one, or passes 1, ..., 1 / N. None leaves to it what a plain config
            has not.
        logit_normal: The distribution of training times, as of `RectifiedFlow`.
        mu_of: What the pipeline passes instead for a grid of so many steps; training times keep the
            shift of `mu`. None passes `mu` for each.

    Attributes:
        num_steps: Number of steps of the last grid, None before the first.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        mu: float | None = None,
        own_grid: bool | None = None,
        logit_normal: tuple[float, float] | None = None,
        mu_of: Callable[[int], float] | None = None,
    ) -> None:
        config = scheduler.config
        shift, lowest = config["shift"], 1 / config["num_train_timesteps"]
        self._is_linear = config.get("time_shift_type") == "linear"
        if mu is not None:
            shift = self._shift_of(mu)
        else:  # a fixed shift is applied to the lowest level, and to the whole grid once more
            lowest = shift * lowest / (1 + (shift - 1) * lowest)
        super().__init__(shift, logit_normal, last=lowest if own_grid else None)
        self.num_levels: int = config["num_train_timesteps"]
        self.num_steps: int | None = None
        asked = config.get("shift_terminal") or any(config.get(n) for n in CONVERSIONS)
        self._scheduler = copy.deepcopy(scheduler) if asked else None
        self._mu, self._mu_of = mu, mu_of
        self._passes_levels = own_grid is False

    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network is told, t times the number of levels, float32."""
        return (t.double() * self.num_levels).float()

    def times(self, num_steps: int) -> Tensor:
        self.num_steps = num_steps
        if self._scheduler is None or num_steps == 1:  # one step leaves nothing to stretch
            return super().times(num_steps)
        passed: dict[str, Any] = {} if self._mu is None else {"mu": self._mu_at(num_steps)}
        if self._passes_levels:
            passed["sigmas"] = torch.linspace(1, 1 / num_steps, num_steps).tolist()
        self._scheduler.set_timesteps(num_steps, **passed)
        return self._scheduler.sigmas.double()

    def grid_shift(self, num_steps: int) -> float:
        mu = self._mu_at(num_steps)
        return self.shift if mu is None else self._shift_of(mu)

    def _mu_at(self, num_steps: int) -> float | None:
        return self._mu if self._mu_of is None else self._mu_of(num_steps)

    def _shift_of(self, mu: float) -> float:
        """Return the shift that the scheduler makes of what a pipeline passes."""
        return mu if self._is_linear else math.exp(mu)


class SolvedFlow(RectifiedFlow):
    """A rectified flow that a solver of diffusers was saved for, with its flow sigmas.

    The grid is what its `set_timesteps` gives. Its timesteps are whole numbers, as the network is
    told there.

    Args:
        scheduler: Its `config` is read; a copy is kept.
        logit_normal: The distribution of training times, as of `RectifiedFlow`.
    """

    def __init__(self, scheduler: Any, logit_normal: tuple[float, float] | None = None) -> None:
        super().__init__(scheduler.config["flow_shift"], logit_normal)
        self.num_levels: int = scheduler.config["num_train_timesteps"]
        self._scheduler = copy.deepcopy(scheduler)

    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network is told: t times the number of levels, without its fraction."""
        return (t.double() * self.num_levels + 1e-4).floor().float()  # levels are in single

    def times(self, num_steps: int) -> Tensor:
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.double()


def plain_flow(scheduler: Any, schedule: SavedFlow) -> Any:
    """Return a scheduler whose plain `set_timesteps(N)` gives the grid that was sampled last.

    Its config says of which grid it was made, so that `own_flow` undoes it; diffusers passes over
    settings of such a name.

    Args:
        scheduler: A FlowMatchEulerDiscreteScheduler; it is left as it is.
        schedule: Made from it. Without a grid so far, or with one that the scheduler gave itself,
            `scheduler` is returned.
    """
    num_steps = schedule.num_steps
    if num_steps is None or schedule._scheduler is not None:
        return scheduler
    settings = _plain(schedule.grid_shift(num_steps), num_steps, schedule.num_levels)
    if settings is None:
        return scheduler
    made = type(scheduler).from_config(scheduler.config, **settings)
    made.register_to_config(
        **{_MADE_OF: {"shift": scheduler.config["shift"], "num_steps": num_steps}}
    )
    return made


def own_flow(scheduler: Any) -> Any:
    """Return the scheduler that `plain_flow` was given, the model's own for any number of steps.

    One of elsewhere, or one whose settings were changed since, is returned as it is.
    """
    config = dict(scheduler.config)
    match config.pop(_MADE_OF, None):
        case {"shift": float() | int() as shift, "num_steps": int(n)} if shift > 0 and n > 0:
            made = _plain(shift, n, config["num_train_timesteps"])
        case _:
            return scheduler
    if made is None or not all(math.isclose(x, config[key] or 0) for key, x in made.items()):
        return scheduler
    return type(scheduler).from_config(config, shift=shift, shift_terminal=None)


def _plain(shift: float, num_steps: int, total: int) -> dict[str, float] | None:
    r"""Return the settings under which `set_timesteps(N)` gives levels 1, ..., 1 / N, shifted.

    Left to itself it lays N levels from 1 to the table's lowest, lo, and adds 0. With another shift
    s' and a terminal level they are ours, :math:`s u / (1 + (s - 1) u)` at u = 1, ..., 1 / N: both
    are Moebius maps of the step's number, and agree where

    .. math::
        \left(1 - \frac{1}{s'}\right)(1 - lo(s')) = \left(1 - \frac1s\right)
        \left(1 - \frac1N\right), \qquad terminal = \frac{s}{N + s - 1}.

    None where there are none: for one step, and shifts of about 17 and more.
    """
    right = (1 - 1 / shift) * (1 - 1 / num_steps)
    middle = right * (total + 1) - (total - 1)
    inside = middle**2 - 4 * right**2 * total
    if num_steps == 1 or inside < 0:
        return None
    own = 1 + 2 * right * total / (-middle + math.sqrt(inside))
    return {"shift": own, "shift_terminal": shift / (num_steps + shift - 1)}
