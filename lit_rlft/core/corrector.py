"""A flow as the prior of another flow: it turns normal noise into the other's initial noise."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lit_rlft.core.block_checkpointing import BlockCheckpointing
from lit_rlft.core.checks import at_least
from lit_rlft.core.distribution import Distribution, Reduction
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.prior import bounded
from lit_rlft.core.process import AngularFlow, GaussianProcess, Process, ProductProcess
from lit_rlft.core.randomness import Generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, batch_size, flatten, leaves, unflatten

__all__ = ["Flow", "FlowMLP", "FlowPrior"]

_NUM_FREQUENCIES = 8


class Flow(Protocol):
    """A generator of states from noise; every `Pipeline` is one.

    Attributes:
        denoiser: The network.
        process: The noising process that it is trained for.
    """

    denoiser: nn.Module
    process: Process

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the prediction that the denoising loss is about."""


class FlowMLP(nn.Module):
    """A flow along arcs on continuous states of one size: an MLP over all of a sample's numbers.

    Its velocity is zero at the start, so that it hands noise on unchanged, and small for noise that
    is nearly normal, so that its hidden layers need not carry all numbers. The subspaces of the
    base's processes decide which entries of a state exist. The others have neither noise nor loss,
    and the network's output for them is dropped.

    Args:
        base: The process of the flow that starts from this one's samples.
        blank: A state of any number of samples, for their shape, dtype and device.
        features: From conditions to a fixed-size encoding [B, F].
        num_features: F.
        width: Units of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(
        self,
        base: Process,
        blank: State,
        features: Callable[[Condition], Tensor],
        num_features: int,
        *,
        width: int = 256,
        depth: int = 3,
    ) -> None:
        super().__init__()
        at_least(1, self, num_features=num_features, width=width, depth=depth)
        self.process = _along_arcs(base)
        self.denoiser: nn.Module = _MLP(flatten(blank).shape[1], num_features, width, depth)
        self.denoiser.to(leaves(blank)[0])
        self.features = features

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the velocity, of the structure of x_t."""
        return unflatten(self.denoiser(flatten(x_t), t, self.features(condition)), x_t)


class FlowPrior(Distribution):
    """The distribution of a flow's samples, without a density in closed form.

    Args:
        flow: The flow.
        start: The distribution of the noise it starts from.
        condition: One row per sample.
        sampler: How the flow is discretised.
    """

    def __init__(
        self, flow: Flow, start: Distribution, condition: Condition, sampler: Sampler
    ) -> None:
        self.flow, self.start, self.condition, self.sampler = flow, start, condition, sampler

    @property
    def mean(self) -> State:
        """The flow's sample from the mean of the noise."""
        return self._walk(self.start.mean, None)

    def rsample(self, noise: Generators = None) -> State:
        return self._walk(self.start.rsample(noise), noise)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        """Raise TypeError: it would need the divergence of the flow along the whole path."""
        raise TypeError("the density of a FlowPrior has no closed form")

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        """Return NaN [B], which metrics take for a value that does not apply."""
        return torch.full((len(self.condition),), torch.nan)

    def _walk(self, x_1: State, noise: Generators) -> State:
        if batch_size(x_1) != len(self.condition):
            raise ValueError(f"{batch_size(x_1)} samples for {len(self.condition)} conditions")
        args = (self.flow.predict, self.flow.process, x_1, self.condition, noise)
        return self.sampler.sample(*args)


def _along_arcs(base: Process) -> Process:
    """Return flows along arcs on the states of another process, in the same subspaces."""
    if isinstance(base, ProductProcess):
        return ProductProcess({name: _along_arcs(base.field(name)) for name in base.names})
    return AngularFlow(base.subspace if isinstance(base, GaussianProcess) else None)


class _MLP(nn.Module, BlockCheckpointing):
    """Residual layers on (x_t, t, features); the output layer is zero at the start."""

    def __init__(self, dims: int, num_features: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(dims + num_features + 2 * _NUM_FREQUENCIES, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, dims)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """Return the velocity [B, d] at x_t [B, d], t [B], with features [B, F]."""
        orders = torch.arange(1, _NUM_FREQUENCIES + 1, device=t.device)
        angles = torch.pi * orders * t.unsqueeze(1)
        clock = torch.cat([angles.cos(), angles.sin()], dim=1)
        known = bounded(features.to(x_t))
        hidden = nn.functional.silu(self.first(torch.cat([x_t, clock.to(x_t), known], dim=1)))
        for layer in self.hidden:
            hidden = self.run(_residual, layer, hidden)
        return self.last(hidden)


def _residual(layer: nn.Module, hidden: Tensor) -> Tensor:
    return hidden + nn.functional.silu(layer(hidden))
