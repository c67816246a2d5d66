"""What samples are drawn for: conditions, each held once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError

__all__ = ["Condition"]


@dataclass(frozen=True)
class Condition:
    """What generation is conditioned on, each unique condition held once.

    Attributes:
        entries: U records a person can read, one per unique condition (e.g. `{"prompt": ...}`).
        tables: Encodings with U rows (or U + 1 where there is a null condition).
        rows: [B] int64, which unique condition each sample has.
        null: Row of the null condition in `tables`, or None where the domain has none.
    """

    entries: Sequence[Mapping[str, Any]]
    tables: Mapping[str, Tensor]
    rows: Tensor
    null: int | None = None
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What samplers ask for in every step."""

    def __len__(self) -> int:
        """Return B, the number of samples described."""
        return self.rows.shape[0]

    def index(self, rows: Tensor | slice) -> "Condition":
        """Select samples; the tables are shared, not copied."""
        return replace(self, rows=self.rows[rows])

    def repeat(self, times: int) -> "Condition":
        """Repeat each sample's condition `times` times, copies side by side."""
        return replace(self, rows=self.rows.repeat_interleave(times))

    def dropped(self, mask: Tensor) -> "Condition":
        """Replace the condition by the null condition where `mask` [B] is true.

        Raises:
            UsageError: The domain has no null condition.
        """
        if self.null is None:
            raise UsageError("this condition has no null condition; set condition_dropout to 0")
        return replace(self, rows=self.rows.where(~mask, self.null))

    def table(self, name: str) -> Tensor:
        """Return one encoding for every sample, [B, ...]."""
        table = self.tables[name]
        return table[self.rows_on(table.device)]

    def rows_on(self, device: torch.device) -> Tensor:
        """Return `rows` on a device, moved there once."""
        if device not in self._known:
            self._known[device] = self.rows.to(device, non_blocking=True)
        return self._known[device]

    def beside_null(self) -> "Condition":
        """Return the null condition for every sample, followed by the samples' own: 2 B rows.

        Raises:
            UsageError: The domain has no null condition.
        """
        if "beside null" not in self._known:
            null = self.dropped(torch.ones_like(self.rows, dtype=torch.bool))
            self._known["beside null"] = replace(self, rows=torch.cat([null.rows, self.rows]))
        return self._known["beside null"]

    def each(self) -> list[Mapping[str, Any]]:
        """Return the readable record of every sample."""
        return [self.entries[row] for row in self.rows.tolist()]
