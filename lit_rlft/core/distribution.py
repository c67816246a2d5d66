"""Distributions over states: what a process says about the next state, or the prior about x_1.

Log-probabilities and divergences are per sample, [B]: the **sum** over dimensions by default, the
**mean** on request (DDPO's published clip range belongs to the mean).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lit_rlft.core.randomness import Generators, rand_like, randn_like
from lit_rlft.core.state import State, fields_of, tensor_of

__all__ = [
    "Categorical",
    "Distribution",
    "Gaussian",
    "Product",
    "Reduction",
    "Unmasked",
    "certain",
    "density_of",
    "squared_distances",
]

Reduction = Literal["sum", "mean"]


class Distribution(ABC):
    """A distribution over states with batch dimension B."""

    @property
    @abstractmethod
    def mean(self) -> State:
        """The expected state; for categorical fields the most likely one."""

    @abstractmethod
    def rsample(self, noise: Generators = None) -> State:
        """Draw a state; differentiable with respect to the parameters where that is possible."""

    @abstractmethod
    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        """Return the log-probability (density) of `state`, [B]."""

    @abstractmethod
    def kl(self, other: "Distribution", reduction: Reduction = "sum") -> Tensor:
        """Return KL(self || other) in closed form, [B]."""

    def sample(self, noise: Generators = None) -> State:
        """Draw a state without building a graph."""
        with torch.no_grad():
            return self.rsample(noise)


class Gaussian(Distribution):
    """Independent normals N(loc, std^2).

    Args:
        loc: [B, ...].
        std: Broadcastable against `loc`. A sample whose std is 0 is a point mass: it can be drawn,
            and it counts 0 in log-probabilities and divergences.
        density: `density_of(std)`, where it is known.
    """

    def __init__(
        self, loc: Tensor, std: Tensor, density: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.loc, self.std, self._density = loc, std, density

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def num_dimensions(self) -> Tensor:
        """How many numbers of each sample are free, float64 [B]."""
        size, *shape = self.loc.shape
        return torch.full((size,), math.prod(shape), dtype=torch.float64, device=self.loc.device)

    def like(self, loc: Tensor, std: Tensor) -> "Gaussian":
        """Return the distribution over the same space with another mean and other stds."""
        return Gaussian(loc, std)

    def entropy(self, reduction: Reduction = "sum") -> Tensor:
        """Return the entropy in nats, [B]; 1.419 per dimension of unit variance."""
        values = self._positive_std.log() + 0.5 * (1 + math.log(2 * math.pi))
        return _reduce(values.where(self.std > 0, 0).expand_as(self.loc), reduction)

    def rsample(self, noise: Generators = None) -> Tensor:
        return self.loc + self.std * randn_like(self.loc, noise)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        factor, peak = self._density or density_of(self.std)
        squares = squared_distances(tensor_of(state), self.loc)
        alike = peak.dim() in (0, squares.dim()) and peak.shape[1:].numel() == 1
        if not alike:
            return _reduce(peak + factor * squares, reduction)
        # One std a sample, as transitions have: few numbers after one pass over states.
        total = peak * squares.shape[1:].numel() if reduction == "sum" else peak
        return torch.addcmul(total.flatten(), factor.flatten(), _reduce(squares, reduction))

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        if not isinstance(other, Gaussian):
            raise TypeError(f"no closed-form KL between Gaussian and {type(other).__name__}")
        std, other_std = self._positive_std, other._positive_std
        ratio = (std / other_std) ** 2
        values = 0.5 * (((self.loc - other.loc) / other_std) ** 2 + ratio - 1 - ratio.log())
        return _reduce(values.where(self.std > 0, 0), reduction)

    @property
    def _positive_std(self) -> Tensor:
        return self.std.where(self.std > 0, 1)


def density_of(std: Tensor) -> tuple[Tensor, Tensor]:
    """Return -1/2 / std^2 and the largest log-density of N(0, std^2), both 0 where std is 0.

    The log-density is the first times the squared distance from the mean, plus the second.
    """
    certain = std <= 0
    positive = std.masked_fill(certain, 1)
    factor, peak = -0.5 * positive.pow(-2), -positive.log() - 0.5 * math.log(2 * math.pi)
    return factor.masked_fill(certain, 0), peak.masked_fill(certain, 0)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return (a - b)^2, number by number, in one pass."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return (a - b).square()
    return functional.mse_loss(a, b, reduction="none")


class Categorical(Distribution):
    """Independent categorical variables over integer states.

    Args:
        logits: [B, ..., V] unnormalised log-probabilities; -inf marks the impossible.
        num_dimensions: [B], over how many variables a mean is taken; all of them if None.
    """

    def __init__(self, logits: Tensor, num_dimensions: Tensor | None = None) -> None:
        self.log_probs, self.num_dimensions = logits.log_softmax(dim=-1), num_dimensions

    @property
    def mean(self) -> Tensor:
        return self.log_probs.argmax(dim=-1)

    def rsample(self, noise: Generators = None) -> Tensor:
        return _most(self.log_probs, noise)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        picked = self.log_probs.gather(-1, tensor_of(state).long().unsqueeze(-1)).squeeze(-1)
        return self._reduced(picked, reduction)

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        if not isinstance(other, Categorical):
            raise TypeError(f"no closed-form KL between Categorical and {type(other).__name__}")
        # Masked before they meet: where both are -inf, the gradient of the difference is NaN.
        impossible = self.log_probs.isneginf()
        log_ratio = (self.log_probs - other.log_probs).masked_fill(impossible, 0)
        return self._reduced((self.log_probs.exp() * log_ratio).sum(dim=-1), reduction)

    def _reduced(self, values: Tensor, reduction: Reduction) -> Tensor:
        if reduction == "sum" or self.num_dimensions is None:
            return _reduce(values, reduction)
        return _reduce(values, "sum") / self.num_dimensions.clamp(min=1)


class Unmasked(Categorical):
    """What hidden variables become; those that are shown stay.

    Args:
        log_probs: [B, ..., V] of the hidden; those of the shown count nothing.
        x: [B, ...] int64 in [0, V), the values of the shown.
        hidden: bool [B, ...].
        num_dimensions: [B], over how many variables a mean is taken; all of them if None.
    """

    def __init__(
        self, log_probs: Tensor, x: Tensor, hidden: Tensor, num_dimensions: Tensor | None = None
    ) -> None:
        self._own, self._x, self._hidden = log_probs, x, hidden
        self.num_dimensions = num_dimensions

    @cached_property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        """Of all variables, normalised."""
        shown = certain(self._own.shape[-1], self._own.device)[self._x]
        return torch.where(self._hidden.unsqueeze(-1), self._own, shown).log_softmax(dim=-1)

    def rsample(self, noise: Generators = None) -> Tensor:
        return torch.where(self._hidden, _most(self._own, noise), self._x)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        value = tensor_of(state).long()
        own = self._own.gather(-1, value.unsqueeze(-1)).squeeze(-1)
        shown = certain(self._own.shape[-1], self._own.device)[self._x, value]
        return self._reduced(torch.where(self._hidden, own, shown), reduction)


@lru_cache(maxsize=32)
def certain(num_classes: int, device: torch.device) -> Tensor:
    """Return the log-probabilities of variables that are certain, by their values, [V, V]."""
    # Also for training, where tensors made under inference mode are refused.
    with torch.inference_mode(False):
        impossible = torch.full((num_classes, num_classes), -torch.inf, device=device)
        return impossible.fill_diagonal_(0)


class Product(Distribution):
    """Independent fields of a dict state; log-probabilities and divergences add.

    With `reduction="mean"` each field is averaged over its own dimensions before adding.
    """

    def __init__(self, fields: Mapping[str, Distribution]) -> None:
        self.fields = {name: fields[name] for name in sorted(fields)}

    @property
    def mean(self) -> dict[str, Tensor]:
        return {name: tensor_of(field.mean) for name, field in self.fields.items()}

    def rsample(self, noise: Generators = None) -> dict[str, Tensor]:
        return {name: tensor_of(field.rsample(noise)) for name, field in self.fields.items()}

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        parts = fields_of(state)
        return _add([f.log_prob(parts[name], reduction) for name, f in self.fields.items()])

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        if not isinstance(other, Product):
            raise TypeError(f"no closed-form KL between Product and {type(other).__name__}")
        return _add([f.kl(other.fields[name], reduction) for name, f in self.fields.items()])


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    flat = values.flatten(start_dim=1) if values.dim() > 1 else values.unsqueeze(-1)
    return flat.sum(dim=1) if reduction == "sum" else flat.mean(dim=1)


def _add(terms: list[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])


def _most(log_probs: Tensor, noise: Generators) -> Tensor:
    """Draw classes by Gumbel-max: the class with the largest log-probability under noise."""
    return (log_probs - rand_like(log_probs, noise, _minus_gumbel)).argmax(dim=-1)


def _minus_gumbel(uniform: Tensor) -> Tensor:
    """Return log(-log(u)), kept off u = 0, where it would be infinite for all classes."""
    return (-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()
