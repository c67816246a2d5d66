"""A measurement apart for every value of a column of the data."""

from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Metric, values_of

__all__ = ["ByColumn"]


class ByColumn(Metric):
    """A metric, and its values apart for every value of a column: "<name>/<value>".

    Such as HPSv2 by style, or a reward by PartiPrompts' "Category". The mean of all is reported
    under the metric's own name.

    Args:
        metric: What to measure.
        column: Key or column of the data.

    Raises:
        UsageError: The data have no such column.
    """

    def __init__(self, metric: Metric, column: str = "category") -> None:
        super().__init__()
        self.metric, self.column = metric, column

    def check(self, pipeline: Pipeline) -> None:
        self.metric.check(pipeline)

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the metric's values, and again by the column's values, NaN for other samples."""
        records = condition.each()
        missing = next((record for record in records if self.column not in record), None)
        if missing is not None:
            raise UsageError(
                f"ByColumn: the data have no column {self.column!r}, only {sorted(missing)}; set "
                "init_args.column of the metric to one of them"
            )
        found = [str(record[self.column]) for record in records]
        values = values_of(self.metric, samples, condition)
        apart = {}
        for name, value in values.items():
            for group in dict.fromkeys(found):
                own = torch.tensor([one == group for one in found], device=value.device)
                apart[f"{name}/{group}"] = value.where(own, torch.nan)
        return values | apart

    def guards(self) -> dict[str, Guard]:
        """Return those of the metric."""
        return self.metric.guards()
