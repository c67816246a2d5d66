"""A flow along arcs, for distributions that are nearly normal."""

import math

import torch
from torch import Tensor

from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.process.gaussian import GaussianProcess
from lit_rlft.core.schedule import CosineVP
from lit_rlft.core.state import State, expand_as, tensor_of
from lit_rlft.core.subspace import Subspace

__all__ = ["AngularFlow"]


class AngularFlow(GaussianProcess):
    r"""Flow matching along :math:`x = \cos\phi\, x_0 + \sin\phi\, \epsilon` by Euler steps in phi.

    The velocity :math:`dx/d\phi` vanishes where x_0 is standard normal itself: any number of steps
    is exact then, and few are enough nearby. Euler's steps along a straight path, and DDIM's along
    this one, shrink such samples: 10 steps by 12 %, 5 by more than 22 %.

    Args:
        subspace: Where states live; None is all of the tensor.

    References:
        Building Normalizing Flows with Stochastic Interpolants (Albergo & Vanden-Eijnden, 2022;
        the trigonometric interpolant), https://arxiv.org/abs/2209.15571
    """

    def __init__(self, subspace: Subspace | None = None) -> None:
        super().__init__(CosineVP(), "v", subspace)

    def transition(
        self, prediction: State, x_t: State, t: Tensor, s: Tensor, eta: float
    ) -> Gaussian:
        if eta:
            return super().transition(prediction, x_t, t, s, eta)
        x = tensor_of(x_t)
        angle = math.pi / 2 * (t - s)
        mean = x - expand_as(angle, x) * tensor_of(prediction).to(x.dtype)
        return self._law(mean, expand_as(torch.zeros_like(angle), x), x)
