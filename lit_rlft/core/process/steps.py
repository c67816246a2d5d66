"""The steps of a sampler: levels, and what the process's arithmetic takes from them, in one table.

They depend on the process and the grid alone. They are computed once for each grid, in double
precision, cast once to the type of the states, and kept on their device, until a process or a
schedule is changed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlft.core.process.noise import Noise
from lit_rlft.core.state import State, leaves, tree_map
from lit_rlft.core.watched import Watched

__all__ = ["StepTables", "Steps"]

_MOST_TABLES = 32
"""Grids remembered; more than 32 places of a random window are computed again. A table takes some
hundred bytes a step."""

Rule = Callable[[Tensor, Tensor, Noise], State]
"""`Process.noisy_coefficients`."""


@dataclass(frozen=True)
class Steps:
    """T steps from levels t to levels s.

    Attributes:
        t: [T] float64.
        s: [T] float64.
        coefficients: [T, C] of each field of the state.
    """

    t: Tensor
    s: Tensor
    coefficients: State

    def __len__(self) -> int:
        """Return T."""
        return self.t.shape[0]

    def levels(self, i: int, size: int) -> Tensor:
        """Return the level that step i starts from, for `size` samples, [size]."""
        return self.t[i].expand(size)

    def row(self, i: int) -> State:
        """Return the coefficients of step i, [C] of each field."""
        return tree_map(lambda table: table[i], self.coefficients)


class StepTables:
    """The steps of all grids that a process has met."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Steps] = {}

    def __reduce__(self) -> tuple[type["StepTables"], tuple[()]]:
        """Copies begin anew: in another program changes are counted anew."""
        return StepTables, ()

    def of(self, rule: Rule, t: Tensor, s: Tensor, eta: Noise, like: State) -> Steps:
        """Return the steps from levels t [T] to levels s [T], computed unless they are known.

        Args:
            rule: The process's own.
            t: Levels that steps start from.
            s: Levels that they lead to.
            eta: Noise of the transitions.
            like: A state, for its device and the type of its numbers.
        """
        kinds = tuple((leaf.device, leaf.dtype) for leaf in leaves(like))
        levels = (t.tolist(), s.tolist())
        key = (*map(tuple, levels), eta, kinds, Watched.num_changes)
        if key not in self._known:
            if len(self._known) >= _MOST_TABLES:
                self._known.pop(next(iter(self._known)))
            # Also for training, where tensors made under inference mode are refused.
            with torch.inference_mode(False), torch.no_grad():
                self._known[key] = _computed(rule, *levels, eta, like)
        return self._known[key]


def _computed(rule: Rule, t: list[float], s: list[float], eta: Noise, like: State) -> Steps:
    device = leaves(like)[0].device
    start, end = (torch.tensor(level, dtype=torch.float64, device=device) for level in (t, s))
    return Steps(start, end, tree_map(_cast, rule(start, end, eta), like))


def _cast(table: Tensor, like: Tensor) -> Tensor:
    """Return coefficients in the type of a field's numbers; those of integers have their own."""
    return table.to(like.dtype) if like.is_floating_point() else table
