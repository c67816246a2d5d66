"""Masked (absorbing-state) diffusion over integer states.

Each position is masked independently: at time t it still shows its value with probability
alpha_t = 1 - t. The reverse step unmasks a position with probability
(alpha_s - alpha_t) / (1 - alpha_t) and draws its class from the denoiser; what is shown stays.

References:
    Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024),
    https://arxiv.org/abs/2406.07524
"""

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Categorical
from lit_rlft.core.process.base import Process
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.state import State, expand_as, tensor_of

__all__ = ["MaskedProcess"]


class MaskedProcess(Process):
    """Masked diffusion on int64 states [B, ...] with values in [0, num_classes].

    The value `num_classes` is the mask. Predictions are logits [B, ..., num_classes].

    Args:
        num_classes: Number of real classes, V.
    """

    differentiable = False
    invertible = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes

    @property
    def mask(self) -> int:
        """The integer that stands for a hidden position."""
        return self.num_classes

    def prior(self, blank: State) -> Categorical:
        """Return the point mass on the all-masked state."""
        shape = (*tensor_of(blank).shape, self.num_classes + 1)
        logits = torch.full(shape, -torch.inf, device=tensor_of(blank).device)
        logits[..., self.mask] = 0
        return Categorical(logits)

    def transition(
        self, prediction: State, x_t: State, t: Tensor, s: Tensor, eta: float
    ) -> Categorical:
        """Return the law of x_s given x_t; the masked process has one sampler, `eta` is unused."""
        x, logits = tensor_of(x_t), tensor_of(prediction).float()
        unmask = expand_as((t - s) / t.clamp(min=torch.finfo(t.dtype).tiny), x).float()
        unmask = unmask.expand(x.shape).unsqueeze(-1)
        hidden = torch.cat([unmask.log() + logits.log_softmax(-1), (1 - unmask).log()], dim=-1)
        shown = torch.nn.functional.one_hot(x, self.num_classes + 1).log()
        return Categorical(torch.where((x == self.mask).unsqueeze(-1), hidden, shown))

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> Tensor:
        """Return x_t with each hidden position set to its most likely class."""
        x = tensor_of(x_t)
        return torch.where(x == self.mask, tensor_of(prediction).argmax(dim=-1), x)

    def noised(self, x_s: State, s: Tensor, t: Tensor, rows: Generators = None) -> Tensor:
        x = tensor_of(x_s)
        keep = (1 - t) / (1 - s)
        uniform = rand_like(torch.empty(x.shape, device=x.device), rows)
        return torch.where(uniform < expand_as(keep, uniform), x, self.mask)

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        """Return cross-entropy on the positions hidden at t and shown at s, over 1 - alpha_t, [B].

        At s = 0 this is the negative evidence bound of masked diffusion per position. For s > 0
        only the share (t - s) / t of the hidden positions is known, which bounds the weight.
        """
        source, x = tensor_of(x_s), tensor_of(x_t)
        known = (x == self.mask) & (source != self.mask)
        labels = source.where(known, 0)
        log_probs = tensor_of(prediction).float().log_softmax(dim=-1)
        nll = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).where(known, 0)
        return nll.unsqueeze(-1).flatten(start_dim=1).mean(dim=1) / t.to(nll.dtype)

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        return 1 - (1 - low) * uniform.double()

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
