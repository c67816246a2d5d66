r"""Uniform discrete diffusion over integer states: noise replaces a class by any class.

Each position is replaced independently: at time t it still has its own class with probability
:math:`\alpha_t = (1 - t)^{power}`, and else any of the V classes, its own among them. With
:math:`q_{t|s}(j | i) = \alpha_t/\alpha_s\,[i = j] + (1 - \alpha_t/\alpha_s)/V` and the denoiser's
:math:`p(x_0 | x_t)`, the reverse step is the exact posterior averaged over it,

.. math::
    p(x_s | x_t) = q_{t|s}(x_t | x_s) \sum_{x_0} \frac{q_{s|0}(x_s | x_0)}{q_{t|0}(x_t | x_0)}
                   \, p(x_0 | x_t).

Unlike a mask that was lifted, a class that was drawn can still change in a later step.

References:
    Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021; uniform
    transitions), https://arxiv.org/abs/2107.03006
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lit_rlft.core.checks import at_least, positive
from lit_rlft.core.distribution import Categorical
from lit_rlft.core.process.base import Process
from lit_rlft.core.process.problems import class_problem, shape_problem
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.state import State, expand_as, tensor_of

__all__ = ["UniformProcess"]


class UniformProcess(Process):
    """Uniform diffusion on int64 states [B, ...] with values in [0, num_classes).

    Predictions are logits [B, ..., num_classes] of x_0.

    Args:
        num_classes: Number of classes, V, at least 2.
        power: Above 1, classes are decided late: beside another field, only once that field is
            known well.
    """

    differentiable = False
    invertible = False

    def __init__(self, num_classes: int, power: float = 1.0) -> None:
        super().__init__()
        at_least(2, self, num_classes=num_classes)
        positive(self, power=power)
        self.num_classes, self.power = num_classes, power

    def state_problem(self, x: State) -> str | None:
        return class_problem(x, type(self).__name__)

    def prediction_problem(self, prediction: State, x_t: State) -> str | None:
        return shape_problem(prediction, (*tensor_of(x_t).shape, self.num_classes))

    def prior(self, blank: State) -> Categorical:
        x = tensor_of(blank)
        logits = torch.zeros(self.num_classes, device=x.device)
        return Categorical(logits.expand(*x.shape, -1))

    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> Tensor:
        """Return logarithms of alpha_s, (1 - alpha_s) / V and of q's two parts, [B, 6].

        Each pair holds what a class gets where it is the same and what every class gets: of the
        level s, of the level t, and of the transition between them. There is one sampler, `eta`
        is unused.
        """
        alpha_t, alpha_s = self._alpha(t), self._alpha(s)
        ratio = alpha_t / alpha_s
        parts = [part for share in (alpha_s, alpha_t, ratio) for part in (share, 1 - share)]
        logs = torch.stack(parts, dim=-1).clamp(min=0).log()
        own = torch.tensor([0.0, -math.log(self.num_classes)] * 3, dtype=logs.dtype)
        return (logs + own.to(logs.device)).float()

    def step(self, prediction: State, x_t: State, coefficients: State) -> Categorical:
        x = tensor_of(x_t).unsqueeze(-1)
        log_probs = tensor_of(prediction).float().log_softmax(dim=-1)
        own, any_s, own_t, any_t, kept, moved = (
            expand_as(one, x) for one in tensor_of(coefficients).unbind(dim=-1)
        )
        same = x == torch.arange(self.num_classes, device=x.device)
        # p(x_0 | x_t) / q(x_t | x_0), then x_s given that, then x_t given x_s.
        weights = log_probs - torch.logaddexp(own_t, any_t).where(same, any_t)
        total = weights.logsumexp(dim=-1, keepdim=True)
        same_s, any_s = own + weights, any_s + total
        # Of two -inf, as of a class that cannot be, the sum has no derivative.
        never = (same_s == -math.inf) & (any_s == -math.inf)
        arrived = torch.logaddexp(same_s.masked_fill(never, 0.0), any_s.masked_fill(never, 0.0))
        arrived = arrived.masked_fill(never, -math.inf)
        return Categorical(arrived + torch.logaddexp(kept, moved).where(same, moved))

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> Tensor:
        """Return the most likely class of each position."""
        return tensor_of(prediction).argmax(dim=-1)

    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> Tensor:
        x = tensor_of(x_s)
        keep = (self._alpha(t) / self._alpha(s)).nan_to_num()
        uniform = rand_like(torch.empty(x.shape, dtype=torch.float64, device=x.device), noise)
        # One number decides both: above `keep` it is uniform on what is left.
        keep = expand_as(keep, uniform)
        left = (uniform - keep) / (1 - keep)
        drawn = (left * self.num_classes).long().clamp(0, self.num_classes - 1)
        return torch.where(uniform < keep, x, drawn)

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        """Return -log p(x_s | x_t), mean over positions, [B].

        At s = 0 this is the cross-entropy of x_0, at every level alike.
        """
        transition = self.step(prediction, x_t, self.coefficients(t, s, 0.0))
        nll = functional.nll_loss(
            transition.log_probs.movedim(-1, 1), tensor_of(x_s), reduction="none"
        )
        return nll.unsqueeze(-1).flatten(start_dim=1).mean(dim=1)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        return 1 - (1 - low) * uniform.double()

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) ** self.power
