"""Benchmarks whose result is a mean per group of prompts, such as GenEval's six tasks."""

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import SetMetric
from lit_rlft.kit.ratios import Ratio, error_of_ratio, ratio

__all__ = ["WIDTH", "GroupMeans", "decoded", "encoded", "places_by_group", "slug"]

WIDTH = 64
"""Bytes of a group's name that are kept."""


class GroupMeans(SetMetric):
    """Mean score per group of prompts, and the mean of these means.

    Values are named `<name>/<group>` and `<name>`. A group is its samples' mean; the whole is the
    mean of the groups' means, so that each group counts as much as another, whatever its size.
    Samples without a group, or with a score that is NaN, do not count. The errors are of drawing
    other prompts of each group, each with as many samples: the groups' are independent.
    """

    @property
    def name(self) -> str:
        """The key under which the benchmark is reported."""
        return type(self).__name__

    @abstractmethod
    def scores(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each sample, [B], NaN where it has none."""

    @abstractmethod
    def groups(self, condition: Condition) -> list[str]:
        """Return the group of each sample, "" for a sample that is of none."""

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the scores, float64 [B], and the groups, uint8 [B, 64]."""
        scores = self.scores(samples, condition).detach().double().cpu()
        return {"score": scores, "group": encoded(self.groups(condition))}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean of each group, and the mean of these."""
        means = {group: ratio(*pair) for group, pair in self._pairs(features).items()}
        return self._named(means, sum(means.values()) / len(means) if means else math.nan)

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        """Return the standard error of each number, or of its difference from another model's."""
        own = self._pairs(features)
        others = {} if other is None else self._pairs(other)
        places = places_by_group(features["group"])
        errors = {}
        for group, pair in own.items():
            within = None if rows is None else rows[places[group]]
            errors[group] = error_of_ratio(pair, others.get(group), groups=within)
        squares = sum(error**2 for error in errors.values())
        return self._named(errors, math.sqrt(squares) / len(errors) if errors else math.nan)

    def guards(self) -> dict[str, Guard]:
        """Return the mean of the groups' means: a fall is a sign."""
        return {self.name: Guard()}

    def _pairs(self, features: Mapping[str, Tensor]) -> dict[str, Ratio]:
        """Return scores and ones of each group's samples, in the order of the groups' names."""
        found = {}
        for group, places in places_by_group(features["group"]).items():
            own = features["score"][places]
            if not own.isnan().all():
                found[group] = (own, torch.ones_like(own))
        return found

    def _named(self, values: Mapping[str, float], whole: float) -> dict[str, float]:
        return {self.name: whole} | {f"{self.name}/{g}": value for g, value in values.items()}


def places_by_group(groups: Tensor) -> dict[str, Tensor]:
    """Return which samples are of each group, bool [n], in the order of the groups' names."""
    names = decoded(groups)
    return {
        group: torch.tensor([name == group for name in names]) for group in sorted({*names} - {""})
    }


def slug(name: str) -> str:
    """Return a group's name as a part of a metric's: "Food & Beverage" is "food_beverage"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def encoded(names: Iterable[str]) -> Tensor:
    """Return names as bytes, uint8 [B, 64], which processes can gather."""
    rows = [name.encode()[:WIDTH].ljust(WIDTH, b"\0") for name in names]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8).reshape(-1, WIDTH)


def decoded(rows: Tensor) -> Sequence[str]:
    """Return the names of `encoded`."""
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.tolist()]
