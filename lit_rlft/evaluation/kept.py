"""Samples that an evaluation keeps to be looked at: the first ones, and the extremes of a test."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.figure import Figure
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.evaluation.measurements import Arm, Measured, Measurements
from lit_rlft.runs.shown import shown

__all__ = ["KINDS", "Extremes", "first_entries"]

Entry = dict[str, Any]
"""A pair of samples, as a record of `runs.shown` has it."""

KINDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "best": lambda tuned, reference: tuned,
    "worst": lambda tuned, reference: -tuned,
    "changed": lambda tuned, reference: (tuned - reference).abs(),
}
"""Kinds of extremes; each ranks samples by a number of both models' rewards, largest first."""


def first_entries(measurements: Measurements, number: int, per_condition: int) -> list[Entry]:
    """Return the first samples that an evaluation has rendered, tuned beside reference.

    Args:
        measurements: Of one evaluation.
        number: Samples at most.
        per_condition: Samples of each row of the data.
    """
    arms = {"reference": measurements.reference, "tuned": measurements.tuned}
    entries = []
    for batch in sorted(measurements.tuned.pictures):
        count = min(len(arm.pictures[batch]) for arm in arms.values())
        rows, labels = measurements.tuned.rows[batch], measurements.tuned.labels[batch]
        drawn = {name: _drawn(arm, batch, count) for name, arm in arms.items()}
        entries += [
            _entry(int(rows[i]), i % per_condition, labels[i], *(own[i] for own in drawn.values()))
            for i in range(count)
        ]
    return entries[:number]


class Extremes:
    """The samples of highest and of lowest reward, and those whose reward changed most.

    Args:
        pipeline: Draws them.
        reward: The name of the reward among the values.
        number: Samples of each kind.
        per_condition: Samples of each row of the data.
    """

    def __init__(self, pipeline: Pipeline, reward: str, number: int, per_condition: int) -> None:
        self.pipeline, self.reward = pipeline, reward
        self.number, self.per_condition = number, per_condition
        self.found: dict[str, list[tuple[float, Entry]]] = {kind: [] for kind in KINDS}
        self._waiting: dict[int, tuple[Any, Mapping[str, Tensor]]] = {}

    def see(
        self,
        arm: Arm,
        batch: int,
        rows: Tensor,
        samples: Any,
        condition: Condition,
        values: Mapping[str, Tensor],
    ) -> None:
        """Look at the samples of one model; they are compared when the other's have come."""
        if arm not in ("tuned", "reference"):
            return
        if batch not in self._waiting:
            self._waiting[batch] = (samples, values)
            return
        other, theirs = self._waiting.pop(batch)
        pair = {arm: (samples, values)}
        pair["tuned" if arm == "reference" else "reference"] = (other, theirs)
        self._compare(pair, rows, condition)

    def _compare(
        self, pair: dict[str, tuple[Any, Mapping[str, Tensor]]], rows: Tensor, condition: Condition
    ) -> None:
        rewards = [pair[arm][1][self.reward].double().cpu() for arm in ("tuned", "reference")]
        for kind, rank in KINDS.items():
            own = self.found[kind]
            scores = rank(*rewards).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
            least = own[-1][0] if len(own) == self.number else -torch.inf
            top = scores.topk(min(self.number, len(scores)))
            kept = [i for i, x in zip(top.indices.tolist(), top.values, strict=True) if x > least]
            if kept:
                entries = self._entries(pair, torch.tensor(kept), rows, condition)
                own += list(zip(scores[kept].tolist(), entries, strict=True))
                self.found[kind] = merged([own], self.number)

    def _entries(
        self,
        pair: dict[str, tuple[Any, Mapping[str, Tensor]]],
        kept: Tensor,
        rows: Tensor,
        condition: Condition,
    ) -> list[Entry]:
        few = condition.index(kept.to(condition.rows.device))
        labels = [self.pipeline.describe(entry) for entry in few.each()]
        drawn = []
        for arm in ("reference", "tuned"):
            samples, values = pair[arm]
            chosen = self.pipeline.index_samples(samples, kept)
            pictures = (self.pipeline.render(chosen, few).detach().clamp(0, 1) * 255).round().byte()
            figures: Sequence[Figure | None] = self.pipeline.figures(chosen, few) or _no(len(kept))
            own = [{name: float(x[i]) for name, x in values.items()} for i in kept.tolist()]
            drawn.append([shown(*one) for one in zip(pictures.cpu(), figures, own, strict=True)])
        return [
            _entry(int(rows[i]), i % self.per_condition, *rest)
            for i, *rest in zip(kept.tolist(), labels, *drawn, strict=True)
        ]


def merged(
    parts: Sequence[Sequence[tuple[float, Entry]]], number: int
) -> list[tuple[float, Entry]]:
    """Return the entries of the highest scores, the data's order between equal ones."""
    every = [one for part in parts for one in part]
    return sorted(every, key=lambda one: (-one[0], one[1]["row"], one[1]["sample"]))[:number]


def _entry(row: int, sample: int, label: str, reference: Any, tuned: Any) -> Entry:
    return {"row": row, "sample": sample, "label": label, "reference": reference, "tuned": tuned}


def _no(count: int) -> list[Figure | None]:
    """Return the figures of samples that have none."""
    return [None] * count


def _drawn(arm: Measured, batch: int, count: int) -> list[dict[str, Any]]:
    figures: Sequence[Figure | None] = arm.figures.get(batch) or _no(count)
    values = {name: own[batch] for name, own in arm.values.items() if batch in own}
    return [
        shown(arm.pictures[batch][i], figures[i], {n: float(x[i]) for n, x in values.items()})
        for i in range(count)
    ]
