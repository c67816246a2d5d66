"""What an update logs, summed over its microbatches on the device in few operations."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Tally", "is_maximum"]


def is_maximum(name: str) -> bool:
    """Return whether values of this name, which are not negative, are reduced by their maximum."""
    return name.endswith("_max")


class Tally:
    """Sums, or maxima, of values by name; those of one microbatch are reduced together."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Tensor] = {}
        """By names that were reduced together, [names] float64; all sums or all maxima."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of some terms, each [n]; nothing waits for the device."""
        alike: dict[object, list[str]] = defaultdict(list)
        for name, value in values.items():
            alike[is_maximum(name), value.shape, value.device].append(name)
        for names in map(tuple, alike.values()):
            table = torch.stack([values[name].detach().flatten() for name in names])
            if is_maximum(names[0]):
                own = table.amax(dim=1).double()
                self._known[names] = own.maximum(self._known.get(names, own))
            else:
                own = table.sum(dim=1, dtype=torch.float64)
                self._known[names] = self._known[names] + own if names in self._known else own

    def totals(self) -> dict[str, Tensor]:
        """Return the sums and maxima of all terms, float64 numbers by name."""
        totals: dict[str, Tensor] = {}
        for names, known in self._known.items():
            for name, own in zip(names, known.unbind(), strict=True):
                before = totals.get(name)
                if before is None:
                    totals[name] = own
                else:
                    totals[name] = own.maximum(before) if is_maximum(name) else own + before
        return totals
