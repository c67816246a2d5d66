r"""Gaussian processes: VP diffusion and rectified flow under every prediction type and eta.

Everything is linear in :math:`(\hat x_0, \hat\epsilon)` with
:math:`x_t = \alpha_t \hat x_0 + \sigma_t \hat\epsilon`, and every prediction type is
:math:`a \hat x_0 + b \hat\epsilon`:

| prediction type | a | b |
|---|---|---|
| epsilon | 0 | 1 |
| sample | 1 | 0 |
| v | -sigma_t | alpha_t |
| velocity | -1 | 1 |

References:
    Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502
    Progressive Distillation (Salimans & Ho, 2022; v-prediction), https://arxiv.org/abs/2202.00512
    Flow Straight and Fast (Liu et al., 2023), https://arxiv.org/abs/2209.03003
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.core.distribution import Gaussian, density_of
from lit_rlft.core.process.base import Process, Step
from lit_rlft.core.process.noise import CPS, FlowSDE
from lit_rlft.core.process.problems import shape_problem
from lit_rlft.core.randomness import Generators, randn_like
from lit_rlft.core.schedule import Schedule
from lit_rlft.core.state import State, described, expand_as, tensor_of
from lit_rlft.core.subspace import Subspace

__all__ = ["GaussianProcess", "Linear", "PredictionType"]

PredictionType = Literal["epsilon", "sample", "v", "velocity"]
_MIN_SIGNAL = 1e-5
"""Smallest alpha_1 at which x_0 = (x_1 - sigma eps) / alpha survives single precision: rounding
moves it by 0.6 % there. The cosine table of 1,000 levels ends at 4.9e-5, of 4,000 at 1.2e-5."""


class GaussianProcess(Process):
    r"""A Gaussian process on tensor states.

    The reverse step from t to s < t is DDIM(eta) in alpha/sigma form,

    .. math::
        std^2 = \eta^2 \frac{\sigma_s^2}{\sigma_t^2}
                \left(\sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2}\sigma_s^2\right), \qquad
        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - std^2}\,\hat\epsilon + std\, z,

    the probability-flow ODE at eta = 0 (Euler on the velocity for the rectified flow) and the
    exact posterior (ancestral step) at eta = 1.

    Args:
        schedule: The noise schedule.
        prediction_type: What the denoiser predicts.
        subspace: Where states live; None is all of the tensor. Noise, predictions and losses are
            projected onto it, and log-probabilities are densities in it.
        bound: What reverse steps do to the estimate of x_0 before they use it, such as clipping;
            the steps then have no inverse. Losses and `denoised` know nothing of it.
        keeps_noise: Whether a step under `bound` goes on with the noise that was predicted, as
            diffusers' DDIM does; otherwise with (x_t - alpha_t x_0) / sigma_t of the bounded x_0,
            as its DDPM does.
        wide_above: Above this time noise has the variance of q(x_t | x_s) in place of the
            posterior's, at eta = 1 that of DDPM's "fixed_large", and none up to it; None is
            never. The mean stays.
    """

    differentiable = True
    invertible = True
    has_flow_steps = True
    one_way = (
        "its steps clip their estimate of x_0; set clip_sample and thresholding to false in the "
        "scheduler_config.json of pipeline.init_args.pretrained"
    )

    def __init__(
        self,
        schedule: Schedule,
        prediction_type: PredictionType = "epsilon",
        subspace: Subspace | None = None,
        *,
        bound: Callable[[Tensor], Tensor] | None = None,
        keeps_noise: bool = True,
        wide_above: float | None = None,
    ) -> None:
        super().__init__()
        one_of(self, "prediction_type", get_args(PredictionType), prediction_type)
        if prediction_type == "epsilon" and schedule.alpha(torch.ones(1)).item() < _MIN_SIGNAL:
            raise UsageError(
                f"{type(schedule).__name__} starts at pure noise, where prediction_type 'epsilon' "
                "says nothing about x_0; use 'v', 'velocity' or 'sample' (or CosineVP's min_alpha)"
            )
        at_least(0, self, wide_above=wide_above)
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self.subspace = subspace
        self.bound, self.keeps_noise, self.wide_above = bound, keeps_noise, wide_above
        self.invertible = bound is None

    def state_problem(self, x: State) -> str | None:
        if isinstance(x, Tensor) and x.is_floating_point():
            return None
        return f"{described(x)}; states of a {type(self).__name__} are floating-point tensors"

    def prediction_problem(self, prediction: State, x_t: State) -> str | None:
        return shape_problem(prediction, tensor_of(x_t).shape)

    def prior(self, blank: State) -> Gaussian:
        loc = torch.zeros_like(tensor_of(blank))
        std = torch.full((), self.schedule.start_scale, dtype=loc.dtype, device=loc.device)
        return self._law(loc, std, tensor_of(blank))

    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> Tensor:
        """Return the columns of `Linear`, or of `_Bounded` under a bound, float64 [B, C]."""
        (alpha_t, alpha_s), (sigma_t, sigma_s) = self.schedule.levels(torch.stack([t, s]))
        variance = _forward_variance(alpha_s, sigma_s, alpha_t, sigma_t)
        std = eta * (sigma_s / sigma_t) * variance.sqrt()
        direction = (sigma_s**2 - std**2).clamp(min=0).sqrt()
        if self.wide_above is not None:
            std = eta * variance.sqrt() * (t > self.wide_above)
        return self._stacked((alpha_t, alpha_s), (sigma_t, sigma_s), direction, std)

    def flow_coefficients(self, t: Tensor, s: Tensor, noise: FlowSDE | CPS) -> Tensor:
        rule = self.flow_sde if isinstance(noise, FlowSDE) else self.cps
        return rule(t, s, noise.scale)

    def flow_sde(self, t: Tensor, s: Tensor, scale: float) -> Tensor:
        r"""Return `coefficients` of Euler-Maruyama's step of Flow-GRPO's equation, float64 [B, C].

        With :math:`y = x / (\alpha + \sigma)` and :math:`\tau = \sigma / (\alpha + \sigma)` every
        Gaussian process is the rectified flow :math:`y = (1 - \tau) x_0 + \tau \epsilon`. Its step
        over :math:`\Delta = \tau_t - \tau_s` is, in x,

        .. math::
            x_s = \alpha_s \hat x_0 + \Big(\sigma_s - (\alpha_s + \sigma_s)
                  \frac{a^2 \Delta}{2 (1 - \tau)}\Big) \hat\epsilon
                  + (\alpha_s + \sigma_s)\, a \sqrt{\frac{\tau_t \Delta}{1 - \tau}}\; z.

        :math:`1 - \tau` is that of t. It is that of s where the step is more than twice as long,
        as the first one from pure noise is, where nothing of the data is left: with
        :math:`u = a^2 \Delta / (1 - \tau)` Euler's step has :math:`1 + u^2 / 4` times the variance.
        A step to clean data draws no noise.

        References:
            Flow-GRPO (Liu et al., 2025), https://arxiv.org/abs/2505.05470
        """
        (alpha_t, alpha_s), (sigma_t, sigma_s) = self.schedule.levels(torch.stack([t, s]))
        size = alpha_s + sigma_s
        tau, kept = sigma_t / (alpha_t + sigma_t), alpha_t / (alpha_t + sigma_t)
        length = (tau - sigma_s / size).clamp(min=0)
        kept = kept.where(length <= 2 * kept, alpha_s / size)
        direction = sigma_s - size * scale**2 * length / (2 * kept)
        std = size * scale * (tau * length / kept).sqrt() * (sigma_s > 0)
        return self._stacked((alpha_t, alpha_s), (sigma_t, sigma_s), direction, std)

    def cps(self, t: Tensor, s: Tensor, scale: float) -> Tensor:
        r"""Return `coefficients` of the coefficients-preserving step, float64 [B, C].

        .. math::
            x_s = \alpha_s \hat x_0 + \sigma_s \big( \cos(\tfrac{\pi}{2} \eta)\, \hat\epsilon
                  + \sin(\tfrac{\pi}{2} \eta)\, z \big).

        Signal and noise of every level are those of the forward process, as under DDIM(eta), and
        the share of new noise is the same in steps of any length.

        References:
            Coefficients-Preserving Sampling (Wang & Yu, 2025), https://arxiv.org/abs/2509.05952
        """
        alphas, (sigma_t, sigma_s) = self.schedule.levels(torch.stack([t, s]))
        angle = math.pi / 2 * scale
        std = math.sin(angle) * sigma_s
        return self._stacked(alphas, (sigma_t, sigma_s), math.cos(angle) * sigma_s, std)

    def _stacked(
        self,
        alphas: Sequence[Tensor] | Tensor,
        sigmas: Sequence[Tensor] | Tensor,
        direction: Tensor,
        std: Tensor,
    ) -> Tensor:
        """Return the columns of x_s = alpha_s x_0 + direction eps + std z; levels are t's, s's."""
        (alpha_t, alpha_s), (sigma_t, _) = alphas, sigmas
        a, b = self._weights(alpha_t, sigma_t)
        determinant = b * alpha_t - a * sigma_t
        columns: Linear | _Bounded
        if self.bound is None:
            of_x = (alpha_s * b - direction * a) / determinant
            of_p = (direction * alpha_t - alpha_s * sigma_t) / determinant
            columns = Linear(of_x, of_p, std, *density_of(std))
        else:
            estimate = (b / determinant, -sigma_t / determinant)
            columns = _Bounded(
                alpha_s, direction, std, *density_of(std), *estimate, alpha_t, sigma_t
            )
        return torch.stack(columns, dim=-1)

    def stepper(self, x_1: State) -> Step:
        if self.subspace is None:
            return self.step
        return partial(self.step, support=self.subspace.support(tensor_of(x_1)))

    def step(
        self, prediction: State, x_t: State, coefficients: State, support: Any = None
    ) -> Gaussian:
        """Return the distribution of x_s, as of any process.

        Args:
            prediction: The denoiser's for x_t.
            x_t: [B, ...].
            coefficients: [B, C] or [C].
            support: What `Subspace.support` found of the states, where it is known.
        """
        x = tensor_of(x_t)
        p, columns = tensor_of(prediction).to(x.dtype), _columns(tensor_of(coefficients), x)
        if self.bound is None:
            of_x, of_p, std, *density = Linear(*columns)
            return self._law(of_x * x + of_p * p, std, x, density, support)
        step = _Bounded(*columns)
        x_0, eps = self._bounded(p, x, step)
        mean = step.alpha_s * x_0 + step.direction * eps
        return self._law(mean, step.std, x, (step.factor, step.peak), support)

    def noisy(self, coefficients: State) -> Tensor:
        of_each = Linear if self.bound is None else _Bounded
        return of_each(*tensor_of(coefficients).unbind(dim=-1)).std > 0

    def balance(self, coefficients: Tensor) -> Tensor:
        """Return weights of steps under which predictions move the means of all alike, [S].

        They are inverse to what a step's mean moves with the prediction, 1 on average over the
        steps with noise, and 0 for those without.

        Args:
            coefficients: [S, C], of a process without a bound.
        """
        step = Linear(*coefficients.unbind(dim=-1))
        noisy = self.noisy(coefficients)
        inverse = step.of_p.abs().where(noisy, 1).reciprocal().where(noisy, 0)
        return inverse * noisy.sum() / inverse.sum()

    def _bounded(self, p: Tensor, x: Tensor, step: "_Bounded") -> tuple[Tensor, Tensor]:
        """Return the bounded estimate of x_0, and the noise that a step goes on with."""
        assert self.bound is not None
        free = p if self.prediction_type == "sample" else step.x_0_of_x * x + step.x_0_of_p * p
        free = self.projected(free, x)
        x_0 = self.bound(free)
        if self.keeps_noise and self.prediction_type == "epsilon":
            return x_0, p
        kept = free if self.keeps_noise else x_0
        return x_0, (x - step.alpha_t * kept) / step.sigma_t

    def inverted(self, prediction: State, x_t: State, x_s: State, t: Tensor, s: Tensor) -> Tensor:
        r"""Return x_t plus its transition's error divided by the slope of a known transition.

        With F the transition, :math:`x_t + (x_s - F(x_t)) / \gamma`. For velocities
        :math:`\gamma = (\alpha_s + \sigma_s) / (\alpha_t + \sigma_t)`: on the rectified flow it is
        1 and this is :math:`x_s + (t - s)\, v(x_t)`. For the others
        :math:`\gamma = (\alpha_s \alpha_t + \sigma_s \sigma_t) / (\alpha_t^2 + \sigma_t^2)`, the
        slope of F for data of unit variance.
        """
        x = tensor_of(x_t)
        (alpha_t, alpha_s), (sigma_t, sigma_s) = self.schedule.levels(torch.stack([t, s]))
        if self.prediction_type == "velocity":
            slope = (alpha_s + sigma_s) / (alpha_t + sigma_t)
        else:
            slope = (alpha_s * alpha_t + sigma_s * sigma_t) / (alpha_t**2 + sigma_t**2)
        error = tensor_of(x_s) - tensor_of(self.transition(prediction, x, t, s, 0.0).mean)
        # Projected: no transition would remove what iterations add up outside the subspace.
        return self.projected(x + error / expand_as(slope, x), x)

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> Tensor:
        x = tensor_of(x_t)
        p = tensor_of(prediction).to(x.dtype)
        if self.prediction_type == "sample":
            return self.projected(p, x)
        alpha, sigma = self.schedule.levels(t)
        a, b = self._weights(alpha, sigma)
        determinant = b * alpha - a * sigma
        x_0 = expand_as(b / determinant, x) * x - expand_as(sigma / determinant, x) * p
        return self.projected(x_0, x)

    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> Tensor:
        x = tensor_of(x_s)
        (alpha_t, alpha_s), (sigma_t, sigma_s) = self.schedule.levels(torch.stack([t, s]))
        ratio = alpha_t / alpha_s
        std = _forward_variance(alpha_s, sigma_s, alpha_t, sigma_t).sqrt()
        epsilon = self.projected(randn_like(x, noise), x)
        if self.subspace is not None:
            epsilon = self.subspace.couple(epsilon, x)
        return expand_as(ratio, x) * x + expand_as(std, x) * epsilon

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        r"""Return the weighted squared error to the target, mean over (free) dimensions, [B].

        With :math:`r = \alpha_t/\alpha_s` and :math:`v = \sigma_t^2 - r^2 \sigma_s^2` the target is
        :math:`\epsilon^* = \sigma_t (x_t - r x_s)/v`, converted to the prediction type, and the
        weight is :math:`v/\sigma_t^2`: the target's variance grows without bound as t -> s.
        """
        source, levels = tensor_of(x_s), self.schedule.levels(torch.stack([t, s]))
        target = self._target(source, tensor_of(x_t), *levels)
        error = tensor_of(prediction).to(target.dtype) - target
        squares = self.projected(error, source).square().unsqueeze(-1).flatten(start_dim=1)
        (alpha_t, alpha_s), (sigma_t, sigma_s) = levels
        weight = _forward_variance(alpha_s, sigma_s, alpha_t, sigma_t) / sigma_t**2
        if self.subspace is None:
            return weight.to(target.dtype) * squares.mean(dim=1)
        size = self.num_dimensions(source).clamp(min=1)
        return (weight / size).to(target.dtype) * squares.sum(dim=1)

    def target(self, x_s: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return the regression target of `loss` in the process's prediction type, [B, ...]."""
        return self._target(x_s, x_t, *self.schedule.levels(torch.stack([t, s])))

    def _target(self, x_s: Tensor, x_t: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """Return `target` for levels that are known, those of t and s each [2, B]."""
        (alpha_t, alpha_s), (sigma_t, sigma_s) = alphas, sigmas
        variance = _forward_variance(alpha_s, sigma_s, alpha_t, sigma_t)
        # Written so that neither s = 0 nor alpha_t = 0 divides by zero.
        x_0 = (
            expand_as(sigma_t**2 / (alpha_s * variance), x_t) * x_s
            - expand_as(alpha_t * sigma_s**2 / (alpha_s**2 * variance), x_t) * x_t
        )
        eps = (x_t - expand_as(alpha_t / alpha_s, x_t) * x_s) * expand_as(sigma_t / variance, x_t)
        return self._mixed(x_0, eps, *self._weights(alpha_t, sigma_t))

    def prediction(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what a denoiser that estimates x_0 and the noise would predict, [B, ...]."""
        return self._mixed(x_0, eps, *self._weights(*self.schedule.levels(t)))

    def _mixed(self, x_0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return expand_as(a, x_0) * x_0 + expand_as(b, x_0) * eps

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        r"""Return the factor of `loss` at s = 0 under min-SNR weighting, [B], float64.

        The error of x_0 then counts :math:`\min(\alpha_t^2 / \sigma_t^2, \gamma)`, for
        every prediction type (Hang et al., 2023, https://arxiv.org/abs/2303.09556).
        """
        alpha, sigma = self.schedule.levels(t)
        a, b = self._weights(alpha, sigma)
        # The prediction's error is (a - b alpha / sigma) times that of x_0.
        return torch.minimum(alpha**2, gamma * sigma**2) / (a * sigma - b * alpha) ** 2

    def num_dimensions(self, x: State) -> Tensor:
        if self.subspace is not None:
            return self.subspace.num_dimensions(tensor_of(x))
        return super().num_dimensions(x)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        return self.schedule.draw_times(uniform, low)

    def times(self, num_steps: int) -> Tensor:
        return self.schedule.times(num_steps)

    def ends(self, num_steps: int) -> Tensor:
        return self.schedule.ends(num_steps)

    def _law(
        self,
        loc: Tensor,
        std: Tensor,
        like: Tensor,
        density: Sequence[Tensor] | None = None,
        support: Any = None,
    ) -> Gaussian:
        known = None if density is None else (density[0], density[1])
        if self.subspace is None:
            return Gaussian(loc, std, known)
        support = self.subspace.support(like) if support is None else support
        return self.subspace.gaussian(loc, std, support, known)

    def projected(self, x: State, like: State) -> Tensor:
        own = tensor_of(x)
        return own if self.subspace is None else self.subspace.project(own, tensor_of(like))

    def _weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of the prediction type at a level."""
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.prediction_type == "epsilon":
            return zero, one
        if self.prediction_type == "sample":
            return one, zero
        if self.prediction_type == "v":
            return -sigma, alpha
        return -one, one


class Linear(NamedTuple):
    """A step as x_s = of_x x_t + of_p p + std z, written in x_t and the prediction p.

    That is alpha_s x_0 + direction eps + std z in few passes over states. The rest is
    `density_of(std)`.
    """

    of_x: Tensor
    of_p: Tensor
    std: Tensor
    factor: Tensor
    peak: Tensor


class _Bounded(NamedTuple):
    """A step as x_s = alpha_s x_0 + direction eps + std z.

    x_0 is the bound of x_0_of_x x_t + x_0_of_p p, and x_t is alpha_t x_0 + sigma_t eps. Factor
    and peak are `density_of(std)`.
    """

    alpha_s: Tensor
    direction: Tensor
    std: Tensor
    factor: Tensor
    peak: Tensor
    x_0_of_x: Tensor
    x_0_of_p: Tensor
    alpha_t: Tensor
    sigma_t: Tensor


def _columns(coefficients: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Return the columns of [B, ..., C] or [C], each to broadcast against [B, ...]."""
    table = coefficients.to(like.dtype)
    if table.dim() == 1:
        return table.unbind()
    ones = (1,) * (like.dim() - table.dim() + 1)
    return table.reshape(*table.shape[:-1], *ones, table.shape[-1]).unbind(dim=-1)


def _forward_variance(alpha_s: Tensor, sigma_s: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return the variance of q(x_t | x_s)."""
    return (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0)
