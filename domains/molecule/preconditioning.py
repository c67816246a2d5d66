r"""Inputs of unit size for a network, and predictions from outputs of unit size.

With :math:`x_t = \alpha x_0 + \sigma\epsilon`, data of standard deviation :math:`\sigma_d` and a
prediction type :math:`a x_0 + b \epsilon`, the network's output F stands for the prediction

.. math::
    \frac{a \alpha \sigma_d^2 + b \sigma}{\alpha^2 \sigma_d^2 + \sigma^2}\, x_t
    + \frac{|a \sigma - b \alpha|\, \sigma_d}{\sqrt{\alpha^2 \sigma_d^2 + \sigma^2}}\, F,

the best linear guess plus F in units of that guess's error.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Section 5: the same for one prediction type, https://arxiv.org/abs/2206.00364
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

    def input(self, x: Tensor, std: float) -> Tensor:
        """Return x_t in units of its standard deviation."""
        return x * expand_as(self._variance(std).rsqrt(), x)

    def output(self, x: Tensor, outputs: Tensor, std: float) -> Tensor:
        """Return the prediction that a denoiser's outputs stand for."""
        variance = self._variance(std)
        guess = (self.a * self.alpha * std**2 + self.b * self.sigma) / variance
        error = (self.a * self.sigma - self.b * self.alpha).abs() * std * variance.rsqrt()
        return expand_as(guess, x) * x + expand_as(error, x) * outputs.to(x.dtype)

    def _variance(self, std: float) -> Tensor:
        return self.alpha**2 * std**2 + self.sigma**2
