"""Masked (absorbing-state) diffusion over integer states.

Each position is masked independently: at time t it still shows its value with probability
alpha_t = (1 - t)^power. The reverse step unmasks a position with probability
(alpha_s - alpha_t) / (1 - alpha_t) and draws its class from the denoiser; what is shown stays.

References:
    Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024),
    https://arxiv.org/abs/2406.07524
"""

from functools import partial

import torch
from torch import Tensor

from lit_rlft.core.checks import at_least, positive
from lit_rlft.core.distribution import Categorical, Unmasked, certain
from lit_rlft.core.process.base import Process, Step
from lit_rlft.core.process.problems import class_problem, shape_problem
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.state import State, expand_as, tensor_of

__all__ = ["MaskedProcess"]


class MaskedProcess(Process):
    """Masked diffusion on int64 states [B, ...] with values in [0, num_classes].

    The value `num_classes` is the mask. Predictions are logits [B, ..., num_classes].

    Args:
        num_classes: Number of real classes, V.
        padded: Whether states may have empty positions, with the value `num_classes + 1`: they
            stay as they are and count in no loss and no mean.
        power: Above 1, classes are decided late: beside another field, only once that field is
            known well.
    """

    differentiable = False
    invertible = False

    def __init__(self, num_classes: int, padded: bool = False, power: float = 1.0) -> None:
        super().__init__()
        at_least(1, self, num_classes=num_classes)
        positive(self, power=power)
        self.num_classes, self.padded, self.power = num_classes, padded, power

    @property
    def mask(self) -> int:
        """The integer that stands for a hidden position."""
        return self.num_classes

    @property
    def empty(self) -> int:
        """The integer of a position that holds nothing, where states are padded."""
        return self.num_classes + 1

    def state_problem(self, x: State) -> str | None:
        return class_problem(x, type(self).__name__)

    def prediction_problem(self, prediction: State, x_t: State) -> str | None:
        return shape_problem(prediction, (*tensor_of(x_t).shape, self.num_classes))

    def prior(self, blank: State) -> Categorical:
        """Return the point mass on the all-masked state; if padded, `blank` has the empty slots."""
        x = tensor_of(blank)
        start = torch.full_like(x, self.mask)
        if self.padded:
            start = start.where(x != self.empty, self.empty)
        values = self.num_classes + 1 + self.padded
        return Categorical(certain(values, x.device)[start], self._num_positions(x))

    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> Tensor:
        """Return the logarithms of the shares of masks that a step lifts and leaves, [B, 2].

        A third column, of states with empty positions, is the -inf of masks that become empty. In
        single precision, as logits are. There is one sampler, `eta` is unused.
        """
        before, after = self._hidden(t), self._hidden(s)
        lifted = ((before - after) / before.clamp(min=torch.finfo(t.dtype).tiny)).float()
        columns = [lifted.log(), (1 - lifted).log()]
        if self.padded:
            columns.append(torch.full_like(lifted, -torch.inf))
        return torch.stack(columns, dim=-1)

    def step(
        self, prediction: State, x_t: State, coefficients: State, num: Tensor | None = None
    ) -> Unmasked:
        """Return the distribution of x_s, as of any process.

        Args:
            prediction: Logits.
            x_t: [B, ...].
            coefficients: [B, C] or [C].
            num: How many positions are not empty, [B], where it is known.
        """
        x, logits = tensor_of(x_t), tensor_of(prediction).float()
        lifted, *others = (expand_as(one, logits) for one in tensor_of(coefficients).unbind(dim=-1))
        ends = [one.expand(*x.shape, 1) for one in others]
        hidden = torch.cat([logits.log_softmax(dim=-1) + lifted, *ends], dim=-1)
        num = self._num_positions(x) if num is None else num
        return Unmasked(hidden, x, x == self.mask, num)

    def stepper(self, x_1: State) -> Step:
        num = self._num_positions(tensor_of(x_1))
        return self.step if num is None else partial(self.step, num=num)

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> Tensor:
        """Return x_t with each hidden position set to its most likely class."""
        x = tensor_of(x_t)
        return torch.where(x == self.mask, tensor_of(prediction).argmax(dim=-1), x)

    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> Tensor:
        x = tensor_of(x_s)
        keep = (1 - self._hidden(t)) / (1 - self._hidden(s))
        uniform = rand_like(torch.empty(x.shape, device=x.device), noise)
        hidden = torch.where(uniform < expand_as(keep, uniform), x, self.mask)
        return torch.where(x == self.empty, x, hidden) if self.padded else hidden

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        """Return cross-entropy on positions hidden at t and shown at s, times -alpha'/(1 - alpha).

        At s = 0 this is the negative evidence bound of masked diffusion per position. For s > 0
        only some of the hidden positions are known, next to none as t -> s, which bounds the
        weight. [B].
        """
        source, x = tensor_of(x_s), tensor_of(x_t)
        known = (x == self.mask) & (source != self.mask)
        labels = source.where(known, 0)
        log_probs = tensor_of(prediction).float().log_softmax(dim=-1)
        nll = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).where(known, 0)
        nll = nll.unsqueeze(-1).flatten(start_dim=1)
        num = self._num_positions(source)
        mean = nll.mean(dim=1) if num is None else nll.sum(dim=1) / num.clamp(min=1)
        slope = self.power * (1 - t) ** (self.power - 1)
        return mean * slope.to(nll.dtype) / self._hidden(t).to(nll.dtype)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        return 1 - (1 - low) * uniform.double()

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def _hidden(self, t: Tensor) -> Tensor:
        """Return the probability of a mask at t, 1 - alpha_t."""
        return t if self.power == 1 else 1 - (1 - t) ** self.power

    def _num_positions(self, x: Tensor) -> Tensor | None:
        """Return how many positions are not empty, [B], or None where none can be."""
        if not self.padded:
            return None
        return (x != self.empty).unsqueeze(-1).flatten(start_dim=1).sum(dim=1)
