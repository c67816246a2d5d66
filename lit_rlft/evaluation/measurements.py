"""Measurements of the tuned model beside the reference, and their standard errors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_rlft.core.reward import SetMetric
from lit_rlft.distributed import gather
from lit_rlft.evaluation.jackknife import Features, Moments, compared

Arm = str
"""The "tuned" model, the "reference", or the name of a baseline."""

__all__ = ["Arm", "Measured", "Measurements", "moments"]

_Batches = dict[int, Tensor]


@dataclass
class Measured:
    """The measurements of one model.

    Attributes:
        values: Per metric and batch, values [B].
        features: Per metric of whole sets, name and batch, features [B, ...].
        pictures: Per batch, its first rendered samples [b, 3, H, W], where any are to be shown.
        labels: Per batch, what each sample was conditioned on.
    """

    values: dict[str, _Batches] = field(default_factory=lambda: defaultdict(dict))
    features: dict[int, dict[str, _Batches]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    pictures: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, list[str]] = field(default_factory=dict)

    def has(self, batch: int) -> bool:
        """Return whether a batch was measured already."""
        return batch in self.labels

    @property
    def num_pictures(self) -> int:
        """Number of samples that were rendered."""
        return sum(map(len, self.pictures.values()))

    def columns(self) -> dict[str, Tensor]:
        """Return all values of each metric, [n], in the order of the batches."""
        return _joined(self.values)

    def sets(self) -> dict[int, Features]:
        """Return all features of each metric of whole sets, in the order of the batches."""
        return {i: _joined(features) for i, features in self.features.items()}


class Measurements:
    """The values of the tuned model, the reference and baselines on the same conditions."""

    def __init__(self, reference: Measured | None = None) -> None:
        self.arms = {"tuned": Measured(), "reference": reference or Measured()}

    @property
    def tuned(self) -> Measured:
        """What was measured of the tuned model."""
        return self.arms["tuned"]

    @property
    def reference(self) -> Measured:
        """What was measured of the reference."""
        return self.arms["reference"]

    def add(
        self,
        arm: Arm,
        batch: int,
        values: Mapping[str, Tensor],
        pictures: Tensor | None,
        labels: list[str],
        features: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Add the measurements of one batch, its pictures as bytes.

        Args:
            arm: The model measured.
            batch: Number of the batch.
            values: Per metric, [B].
            pictures: [b, 3, H, W] in [0, 1], or None.
            labels: What each sample was conditioned on.
            features: Features of each metric of whole sets.
        """
        measured = self.arms.setdefault(arm, Measured())
        for name, value in values.items():
            measured.values[name][batch] = value.detach().double().cpu()
        for i, own in enumerate(features):
            for name, value in own.items():
                measured.features[i][name][batch] = value.detach().cpu()
        if pictures is not None:
            measured.pictures[batch] = (pictures.detach().clamp(0, 1) * 255).round().byte().cpu()
        measured.labels[batch] = labels

    def summary(
        self, world_size: int, sets: Sequence[SetMetric] = (), *, errors: bool = False
    ) -> dict[Arm, dict[str, Moments]]:
        """Return mean and standard error per arm and metric, over all processes.

        "gain" holds the paired differences tuned - reference where both were measured.

        Args:
            world_size: Number of processes; all of them must call this.
            sets: The metrics of whole sets, in the order in which `add` was given their features.
            errors: Whether these have standard errors, which takes a while; NaN otherwise.
        """
        arms = {arm: measured.columns() for arm, measured in self.arms.items()}
        tuned, reference = arms["tuned"], arms["reference"]
        arms["gain"] = {
            name: tuned[name] - reference[name]
            for name in tuned
            if name in reference and tuned[name].shape == reference[name].shape
        }
        gathered = gather(arms, world_size)
        summary = {
            arm: {
                name: moments(
                    torch.cat([part[arm][name] for part in gathered if name in part[arm]])
                )
                for name in gathered[0][arm]
            }
            for arm in arms
        }
        features = gather({arm: m.sets() for arm, m in self.arms.items()}, world_size)
        for i, metric in enumerate(sets):
            own = {
                arm: _concatenated([part[arm][i] for part in features if i in part[arm]])
                for arm in self.arms
            }
            present = {arm: values for arm, values in own.items() if values}
            num_draws = metric.num_draws if errors else 0
            for arm, values in compared(metric, present, num_draws).items():
                summary[arm] |= values
        return summary


def _joined(columns: Mapping[str, _Batches]) -> Features:
    return {name: torch.cat([v[i] for i in sorted(v)]) for name, v in columns.items()}


def _concatenated(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts or [{}])[0]}


def moments(values: Tensor) -> Moments:
    """Return the mean and its standard error over the entries that are not NaN."""
    known = values[~values.isnan()]
    if not len(known):
        return {"mean": float("nan"), "sem": float("nan")}
    sem = known.std() / len(known) ** 0.5 if len(known) > 1 else torch.tensor(float("nan"))
    return {"mean": float(known.mean()), "sem": float(sem)}
