r"""Inputs of unit size for a network, and predictions from outputs of unit size.

With :math:`x_t = \alpha x_0 + \sigma\epsilon`, data of standard deviation :math:`\sigma_d`, a
correlation :math:`\rho` of data and noise (0 unless they are coupled) and a prediction type
:math:`a x_0 + b \epsilon`, the network's output F stands for the prediction

.. math::
    \frac{a \alpha \sigma_d^2 + b \sigma + (a \sigma + b \alpha) \rho \sigma_d}{V}\, x_t
    + \frac{|a \sigma - b \alpha|\, \sigma_d \sqrt{1 - \rho^2}}{\sqrt V}\, F, \qquad
    V = \alpha^2 \sigma_d^2 + \sigma^2 + 2 \alpha \sigma \rho \sigma_d,

the best linear guess plus F in units of that guess's error.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Section 5: the same for one prediction type and independent noise,
    https://arxiv.org/abs/2206.00364
"""

import torch
from torch import Tensor

from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.state import expand_as

__all__ = ["Preconditioning"]


class Preconditioning:
    """The scales at some levels.

    Args:
        process: Whose x_t and predictions are scaled.
        t: [B].
    """

    def __init__(self, process: GaussianProcess, t: Tensor) -> None:
        self.alpha, self.sigma = process.schedule.levels(t)
        one, zero = torch.ones_like(self.alpha), torch.zeros_like(self.alpha)
        self.a, self.b = process.prediction(one, zero, t), process.prediction(zero, one, t)

    def input(self, x: Tensor, std: float, correlation: float = 0.0) -> Tensor:
        """Return x_t in units of its standard deviation."""
        return x * expand_as(self._variance(std, correlation).rsqrt(), x)

    def output(self, x: Tensor, outputs: Tensor, std: float, correlation: float = 0.0) -> Tensor:
        """Return the prediction that a denoiser's outputs stand for."""
        variance, shared = self._variance(std, correlation), correlation * std
        own = self.a * self.alpha * std**2 + self.b * self.sigma
        guess = (own + (self.a * self.sigma + self.b * self.alpha) * shared) / variance
        error = (self.a * self.sigma - self.b * self.alpha).abs() * variance.rsqrt()
        error = error * std * (1 - correlation**2) ** 0.5
        return expand_as(guess, x) * x + expand_as(error, x) * outputs.to(x.dtype)

    def _variance(self, std: float, correlation: float) -> Tensor:
        shared = 2 * self.alpha * self.sigma * correlation * std
        return self.alpha**2 * std**2 + self.sigma**2 + shared
