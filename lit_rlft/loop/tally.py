"""What an update logs, summed over its microbatches on the device in few operations."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Tally", "is_maximum"]


def is_maximum(name: str) -> bool:
    """Return whether values of this name, which are not negative, are reduced by their maximum."""
    return name.endswith("_max")


class Tally:
    """Sums, or maxima, of values by name; values of one microbatch are reduced together."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._maxima: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of some terms, each [n]; nothing waits for the device."""
        if names := tuple(name for name in values if not is_maximum(name)):
            sums = _stacked(values, names).sum(dim=1, dtype=torch.float64)
            self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        if names := tuple(name for name in values if is_maximum(name)):
            own = _stacked(values, names).amax(dim=1)
            self._maxima[names] = own.maximum(self._maxima.get(names, own))

    def totals(self) -> dict[str, Tensor]:
        """Return the sums, float64, and maxima of all terms, numbers by name."""
        totals: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            for name, own in zip(names, sums.unbind(), strict=True):
                totals[name] = totals.get(name, 0.0) + own
        for names, maxima in self._maxima.items():
            for name, own in zip(names, maxima.unbind(), strict=True):
                totals[name] = own.maximum(totals.get(name, own))
        return totals


def _stacked(values: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the values of some names, [names, n], on the device of the first."""
    device = values[names[0]].device
    return torch.stack([values[name].to(device, non_blocking=True) for name in names])
