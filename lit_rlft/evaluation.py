"""Measurements of the tuned model beside the reference, and their standard errors."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_rlft.processes import gather

Arm = str
"""The "tuned" model, the "reference", or the name of a baseline."""

__all__ = ["Arm", "Evaluation", "Measured", "moments"]


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        values: Per metric and batch, values [B].
        pictures: Per batch, its first rendered samples [b, 3, H, W], where any are to be shown.
        labels: Per batch, what each sample was conditioned on.
    """

    values: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
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
        return {n: torch.cat([v[i] for i in sorted(v)]) for n, v in self.values.items()}


class Evaluation:
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
    ) -> None:
        """Add the measurements of one batch; pictures, of as many as are shown, become bytes."""
        measured = self.arms.setdefault(arm, Measured())
        for name, value in values.items():
            measured.values[name][batch] = value.detach().double().cpu()
        if pictures is not None:
            measured.pictures[batch] = (pictures.detach().clamp(0, 1) * 255).round().byte().cpu()
        measured.labels[batch] = labels

    def summary(self, world_size: int) -> dict[str, dict[str, dict[str, float]]]:
        """Return mean and standard error per arm and metric, over all processes.

        "gain" holds the paired differences tuned - reference where both were measured.
        """
        arms = {arm: measured.columns() for arm, measured in self.arms.items()}
        tuned, reference = arms["tuned"], arms["reference"]
        arms["gain"] = {
            name: tuned[name] - reference[name]
            for name in tuned
            if name in reference and tuned[name].shape == reference[name].shape
        }
        gathered = gather(arms, world_size)
        return {
            arm: {
                name: moments(
                    torch.cat([part[arm][name] for part in gathered if name in part[arm]])
                )
                for name in gathered[0][arm]
            }
            for arm in arms
        }


def moments(values: Tensor) -> dict[str, float]:
    """Return the mean and its standard error over the entries that are not NaN."""
    known = values[~values.isnan()]
    if not len(known):
        return {"mean": float("nan"), "sem": float("nan")}
    sem = known.std() / len(known) ** 0.5 if len(known) > 1 else torch.tensor(float("nan"))
    return {"mean": float(known.mean()), "sem": float(sem)}
