"""States with several fields, each under a process of its own, denoised jointly."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.distribution import Product
from lit_rlft.core.process.base import Process, Step
from lit_rlft.core.process.noise import CPS, FlowSDE
from lit_rlft.core.process.problems import first_problem
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import State, described, fields_of, tensor_of

__all__ = ["ProductProcess"]


class ProductProcess(Process):
    """Independent noising of the fields of a dict state; losses and log-probabilities add.

    Args:
        fields: The process of each field. All fields share one clock t; the grid and the training
            times are those of the first field in sorted order.
        weights: The weight of each field's loss; 1 where absent.
    """

    def __init__(
        self, fields: Mapping[str, Process], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if not fields:
            raise UsageError("fields must name at least one process")
        self.names = sorted(fields)
        # Not a ModuleDict: it refuses names that modules use themselves, such as "type".
        self.processes = nn.ModuleList(fields[name] for name in self.names)
        unknown = set(weights or {}) - set(fields)
        if unknown:
            raise UsageError(f"weights name {sorted(unknown)}, the fields are {self.names}")
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.names}
        at_least(0, self, "weights")
        self.differentiable = all(self.field(name).differentiable for name in self.names)
        self.invertible = all(self.field(name).invertible for name in self.names)
        self.has_flow_steps = any(self.field(name).has_flow_steps for name in self.names)

    def field(self, name: str) -> Process:
        """Return the process of one field."""
        process = self.processes[self.names.index(name)]
        assert isinstance(process, Process)
        return process

    def state_problem(self, x: State) -> str | None:
        if isinstance(x, Tensor) or not set(x).issuperset(self.names):
            return f"{described(x)}; the fields of a {type(self).__name__} are {self.names}"
        problems = {name: self.field(name).state_problem(x[name]) for name in self.names}
        return first_problem(problems)

    def prediction_problem(self, prediction: State, x_t: State) -> str | None:
        x = fields_of(x_t)
        if isinstance(prediction, Tensor) or not set(prediction).issuperset(self.names):
            return (
                f"{described(prediction)}; the fields of a {type(self).__name__} are {self.names}"
            )
        problems = {
            name: self.field(name).prediction_problem(prediction[name], x[name])
            for name in self.names
        }
        return first_problem(problems)

    def prior(self, blank: State) -> Product:
        x = fields_of(blank)
        return Product({name: self.field(name).prior(x[name]) for name in self.names})

    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> dict[str, Tensor]:
        return {name: tensor_of(self.field(name).coefficients(t, s, eta)) for name in self.names}

    def noisy(self, coefficients: State) -> Tensor:
        own = fields_of(coefficients)
        fields = [self.field(name).noisy(own[name]) for name in self.names]
        return torch.stack(fields).any(dim=0)

    def flow_coefficients(self, t: Tensor, s: Tensor, noise: FlowSDE | CPS) -> dict[str, Tensor]:
        """Return each field's coefficients; a field without such steps takes its own."""
        rules = {name: self.field(name) for name in self.names}
        return {
            name: tensor_of(rule.noisy_coefficients(t, s, noise if rule.has_flow_steps else 1.0))
            for name, rule in rules.items()
        }

    def step(self, prediction: State, x_t: State, coefficients: State) -> Product:
        steps = {name: self.field(name).step for name in self.names}
        return _step(steps, prediction, x_t, coefficients)

    def stepper(self, x_1: State) -> Step:
        x = fields_of(x_1)
        return partial(_step, {name: self.field(name).stepper(x[name]) for name in self.names})

    def inverted(self, prediction: State, x_t: State, x_s: State, t: Tensor, s: Tensor) -> State:
        p, x, target = fields_of(prediction), fields_of(x_t), fields_of(x_s)
        return {
            name: tensor_of(self.field(name).inverted(p[name], x[name], target[name], t, s))
            for name in self.names
        }

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> State:
        p, x = fields_of(prediction), fields_of(x_t)
        return {
            name: tensor_of(self.field(name).denoised(p[name], x[name], t)) for name in self.names
        }

    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> State:
        x = fields_of(x_s)
        return {
            name: tensor_of(self.field(name).noised(x[name], s, t, noise)) for name in self.names
        }

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        p, source, x = fields_of(prediction), fields_of(x_s), fields_of(x_t)
        losses = [
            self.weights[name] * self.field(name).loss(p[name], source[name], x[name], s, t)
            for name in self.names
        ]
        return torch.stack(losses).sum(dim=0)

    def num_dimensions(self, x: State) -> Tensor:
        parts = fields_of(x)
        numbers = [self.field(name).num_dimensions(parts[name]) for name in self.names]
        return torch.stack(numbers).sum(dim=0)

    def projected(self, x: State, like: State) -> State:
        own, parts = fields_of(x), fields_of(like)
        return {name: tensor_of(self.field(name).projected(own[name], parts[name])) for name in own}

    def draw_times(self, uniform: Tensor, low: float = 0.0) -> Tensor:
        return self.field(self.names[0]).draw_times(uniform, low)

    def times(self, num_steps: int) -> Tensor:
        return self.field(self.names[0]).times(num_steps)

    def ends(self, num_steps: int) -> Tensor:
        return self.field(self.names[0]).ends(num_steps)


def _step(steps: Mapping[str, Step], prediction: State, x_t: State, coefficients: State) -> Product:
    p, x, own = fields_of(prediction), fields_of(x_t), fields_of(coefficients)
    return Product({name: step(p[name], x[name], own[name]) for name, step in steps.items()})
