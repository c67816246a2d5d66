"""Samples that an evaluation keeps to be looked at: the first ones, and the extremes of a test."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.figure import Figure
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.distributed import gather
from lit_rlft.evaluation.measurements import Arm, Measured, Measurements
from lit_rlft.runs.shown import shown

__all__ = ["KINDS", "Extremes", "first_entries", "first_of_all"]

Entry = dict[str, Any]
"""A pair of samples, as a record of `runs.shown` has it."""

_SHOWN: tuple[Arm, ...] = ("tuned", "reference")


class _Drawn(NamedTuple):
    """A model's sample as it is shown: [3, H, W] uint8, its drawing, what was measured of it."""

    picture: Tensor
    figure: Figure | None
    values: dict[str, float]


class _Sample(NamedTuple):
    """A rendered sample of both models, by arm."""

    row: int
    label: str
    drawn: dict[Arm, _Drawn]


KINDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "best": lambda tuned, reference: tuned,
    "worst": lambda tuned, reference: -tuned,
    "changed": lambda tuned, reference: (tuned - reference).abs(),
}
"""Kinds of extremes; each ranks samples by a number of both models' rewards, largest first."""


def first_of_all(measurements: Measurements, number: int, world_size: int) -> Measurements:
    """Return the first samples that processes have rendered, as one batch in the data's order.

    All processes must call this. One alone keeps its batches and their order.

    Args:
        measurements: This process's, of one evaluation.
        number: Samples at most.
        world_size: Number of processes.
    """
    if world_size == 1:
        return measurements
    every = chain(*gather(_rendered(measurements), world_size))
    first = sorted(every, key=lambda sample: sample.row)[:number]
    joined = Measurements()
    for arm in _SHOWN if first else ():
        own, drawn = joined.arms[arm], [sample.drawn[arm] for sample in first]
        own.pictures[0] = torch.stack([one.picture for one in drawn])
        own.labels[0] = [sample.label for sample in first]
        own.rows[0] = torch.tensor([sample.row for sample in first])
        figures = [one.figure for one in drawn if one.figure is not None]
        if len(figures) == len(drawn):
            own.figures[0] = figures
        for name in drawn[0].values:
            if all(name in one.values for one in drawn):
                numbers = [one.values[name] for one in drawn]
                own.values[name][0] = torch.tensor(numbers, dtype=torch.float64)
    return joined


def _rendered(measurements: Measurements) -> list[_Sample]:
    """Return the samples that were rendered of both models."""
    arms = {arm: measurements.arms[arm] for arm in _SHOWN}
    found = []
    for batch in sorted(measurements.tuned.pictures):
        count = min(len(arm.pictures.get(batch, ())) for arm in arms.values())
        rows, labels = measurements.tuned.rows[batch], measurements.tuned.labels[batch]
        drawn = {name: _drawn(arm, batch, count) for name, arm in arms.items()}
        found += [
            _Sample(int(rows[i]), labels[i], {name: own[i] for name, own in drawn.items()})
            for i in range(count)
        ]
    return found


def first_entries(measurements: Measurements, number: int, per_condition: int) -> list[Entry]:
    """Return the first samples that an evaluation has rendered, tuned beside reference.

    Args:
        measurements: Of one evaluation.
        number: Samples at most.
        per_condition: Samples of each row of the data.
    """
    found: list[Entry] = []
    for i, sample in enumerate(_rendered(measurements)[:number]):
        own = (shown(*sample.drawn[arm]) for arm in ("reference", "tuned"))
        found.append(_entry(sample.row, i % per_condition, sample.label, *own))
    return found


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
            scores = rank(*rewards).nan_to_num(nan=-torch.inf)
            least = own[-1][0] if len(own) == self.number else -torch.inf
            # Unlike those of topk, equal ones come in order.
            top = scores.argsort(descending=True, stable=True)[: self.number]
            kept = top[scores[top] > least]
            if len(kept):
                entries = self._entries(pair, kept, rows, condition)
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


def _drawn(arm: Measured, batch: int, count: int) -> list[_Drawn]:
    figures: Sequence[Figure | None] = arm.figures.get(batch) or _no(count)
    values = {name: own[batch] for name, own in arm.values.items() if batch in own}
    return [
        # A view would take all pictures of its batch along to the other processes.
        _Drawn(
            arm.pictures[batch][i].clone(), figures[i], {n: float(x[i]) for n, x in values.items()}
        )
        for i in range(count)
    ]
