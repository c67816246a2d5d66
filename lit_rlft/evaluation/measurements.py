"""Measurements of the tuned model beside the reference, and their standard errors."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_rlft.core.answers import apart
from lit_rlft.core.figure import Figure
from lit_rlft.core.reward import SetMetric
from lit_rlft.distributed import gather
from lit_rlft.evaluation.jackknife import Features, Moments, compared
from lit_rlft.kit.ratios import error_of_mean, ratio, ratio_parts

Arm = str
"""The "tuned" model, the "reference", or the name of a baseline."""

__all__ = ["Arm", "Measured", "Measurements", "kept_share", "moments", "paired_moments"]

_CERTAIN = 2.0
"""Standard errors that best of n must gain: a share of less is a share of nothing known."""

_Batches = dict[int, Tensor]


@dataclass
class Measured:
    """The measurements of one model.

    Attributes:
        values: Per metric and batch, values [B].
        features: Per metric of whole sets, name and batch, features [B, ...].
        pictures: Per batch, its first rendered samples [b, 3, H, W], where any are to be shown.
        figures: Per batch, drawings of these, where the domain has any and they are asked for.
        labels: Per batch, what each sample was conditioned on.
        rows: Per batch, the row of the data that each sample belongs to, int64 [B].
    """

    values: dict[str, _Batches] = field(default_factory=lambda: defaultdict(dict))
    features: dict[int, dict[str, _Batches]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    pictures: dict[int, Tensor] = field(default_factory=dict)
    figures: dict[int, list[Figure]] = field(default_factory=dict)
    labels: dict[int, list[str]] = field(default_factory=dict)
    rows: _Batches = field(default_factory=dict)

    def has(self, batch: int, rows: Tensor | None = None) -> bool:
        """Return whether a batch was measured already, and of these rows of the data if given."""
        known = self.rows.get(batch)
        return known is not None and (rows is None or torch.equal(known, rows.cpu()))

    def forget(self, batch: int) -> None:
        """Forget what was measured of a batch."""
        for named in (self.values, *self.features.values()):
            for name, values in list(named.items()):
                values.pop(batch, None)
                if not values:
                    del named[name]
        for of_batches in (self.pictures, self.figures, self.labels, self.rows):
            of_batches.pop(batch, None)

    @property
    def num_samples(self) -> int:
        """Number of samples that were measured."""
        return sum(map(len, self.labels.values()))

    @property
    def num_pictures(self) -> int:
        """Number of samples that were rendered."""
        return sum(map(len, self.pictures.values()))

    def columns(self) -> dict[str, Tensor]:
        """Return all values of each metric, [n], in the order of the batches."""
        return _joined(self.values)

    def all_rows(self) -> Tensor:
        """Return the row of the data of each sample, [n], in the order of the batches."""
        return torch.cat([self.rows[i] for i in sorted(self.rows)] or [torch.zeros(0).long()])

    def all_pictures(self) -> Tensor:
        """Return the rendered samples, [n, 3, H, W], in the order of the batches."""
        return torch.cat([self.pictures[i] for i in sorted(self.pictures)])

    def all_labels(self) -> list[str]:
        """Return what each sample was conditioned on, in the order of the batches."""
        return [label for i in sorted(self.labels) for label in self.labels[i]]

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
        rows: Tensor | None = None,
        figures: list[Figure] | None = None,
    ) -> None:
        """Add the measurements of one batch, its pictures as bytes.

        Args:
            arm: The model measured.
            batch: Number of the batch.
            values: Per metric, [B].
            pictures: [b, 3, H, W] in [0, 1], or None.
            labels: What each sample was conditioned on, [B].
            features: Features of each metric of whole sets, [B, ...].
            rows: The row of the data that each sample belongs to, [B]; None where all are in order.
            figures: Drawings of the pictures' samples, or None.

        Raises:
            ValueError: There are not as many labels as features.
        """
        if any(len(value) != len(labels) for own in features for value in own.values()):
            raise ValueError(f"{len(labels)} labels are not those of all samples measured")
        measured = self.arms.setdefault(arm, Measured())
        for name, value in values.items():
            measured.values[name][batch] = value.detach().double().cpu()
        for i, own in enumerate(features):
            for name, value in own.items():
                measured.features[i][name][batch] = value.detach().cpu()
        if pictures is not None:
            measured.pictures[batch] = (pictures.detach().clamp(0, 1) * 255).round().byte().cpu()
        if figures is not None:
            measured.figures[batch] = figures
        measured.labels[batch] = labels
        measured.rows[batch] = torch.zeros(len(labels)).long() if rows is None else rows.cpu()

    def summary(
        self,
        world_size: int,
        sets: Sequence[SetMetric] = (),
        *,
        errors: bool = False,
        best: Arm | None = None,
    ) -> dict[Arm, dict[str, Moments]]:
        """Return mean and standard error per arm and metric, over all processes.

        Errors are those of drawing other rows of the data, each with as many samples; of one row
        alone, those of drawing other samples.

        "gain" is tuned - reference of what was measured of both, with the error of paired samples;
        "kept" is the share of a baseline's gain that one sample of the tuned model has
        (`kept_share`).

        Args:
            world_size: Number of processes; all of them must call this.
            sets: The metrics of whole sets, in the order in which `add` was given their features.
            errors: Whether these have standard errors, which takes a while; NaN otherwise.
            best: The baseline that "kept" is a share of; None leaves it out.
        """
        gathered = gather({arm: m.columns() for arm, m in self.arms.items()}, world_size)
        whole = {arm: _concatenated([part[arm] for part in gathered]) for arm in self.arms}
        rows = gather({arm: m.all_rows() for arm, m in self.arms.items()}, world_size)
        every = torch.cat([part["tuned"] for part in rows])
        summary: dict[Arm, dict[str, Moments]] = {
            arm: {
                name: moments(values, _fitting(every, values)) for name, values in columns.items()
            }
            for arm, columns in whole.items()
        }
        summary["gain"] = {
            name: paired_moments(values, whole["reference"][name], _fitting(every, values))
            for name, values in whole["tuned"].items()
            if all(_are_pairs(part["tuned"], part["reference"], name) for part in gathered)
        }
        if best is not None and best in whole:
            tuned, reference, highest = (whole[arm] for arm in ("tuned", "reference", best))
            summary["kept"] = {
                name: kept_share(values, reference[name], highest[name], _fitting(every, values))
                for name, values in tuned.items()
                if name in summary["gain"] and len(highest.get(name, ())) == len(reference[name])
            }
        for arm, values in self._compared(world_size, rows, sets, errors):
            summary[arm] |= apart(summary[arm], values)
        return summary

    def _compared(
        self,
        world_size: int,
        rows: Sequence[Mapping[Arm, Tensor]],
        sets: Sequence[SetMetric],
        errors: bool,
    ) -> Iterator[tuple[Arm, dict[str, Moments]]]:
        """Iterate over the numbers of metrics of whole sets, by arm."""
        features = gather({arm: m.sets() for arm, m in self.arms.items()}, world_size)
        ordered = {
            arm: torch.cat([part[arm] for part in rows]).sort(stable=True).values
            for arm in self.arms
        }
        for i, metric in enumerate(sets):
            own = {
                arm: _in_order(
                    [part[arm][i] for part in features if i in part[arm]],
                    [part[arm] for part in rows],
                )
                for arm in self.arms
            }
            present = {arm: values for arm, values in own.items() if values}
            num_draws = metric.num_draws if errors else 0
            yield from compared(metric, present, num_draws, rows=ordered).items()


def _joined(columns: Mapping[str, _Batches]) -> Features:
    return {name: torch.cat([v[i] for i in sorted(v)]) for name, v in columns.items()}


def _in_order(parts: Sequence[Features], rows: Sequence[Tensor]) -> Features:
    """Join the features of all processes in the order of the data."""
    order = torch.cat(list(rows)).argsort(stable=True)
    return {name: torch.cat([part[name] for part in parts])[order] for name in (parts or [{}])[0]}


def _concatenated(parts: Sequence[Features]) -> Features:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def _fitting(rows: Tensor, values: Tensor) -> Tensor | None:
    """Return the rows of all samples for values of all; None for those of some batches alone."""
    return rows if len(rows) == len(values) else None


def _are_pairs(tuned: Features, reference: Features, name: str) -> bool:
    """Return whether a process measured the same samples of both models, or neither."""
    if name not in tuned or name not in reference:
        return name not in tuned and name not in reference
    return tuned[name].shape == reference[name].shape


def paired_moments(tuned: Tensor, reference: Tensor, rows: Tensor | None = None) -> Moments:
    """Return the difference of two means over what is not NaN, and its error for paired samples.

    Where each arm counts other samples its mean is a ratio of two sums, and the error is that of
    the ratios' linear parts: sample i moves the mean m of an arm by k_i (x_i - m) / mean(k), with
    k_i = 1 where it counts and 0 elsewhere.

    Args:
        tuned: [n] values.
        reference: [n] values of the same conditions and noise.
        rows: As in `moments`.
    """
    if torch.equal(tuned.isnan(), reference.isnan()):
        return moments(tuned - reference, rows)
    mean = _mean(tuned) - _mean(reference)
    return {"mean": mean, "sem": error_of_mean(_moves(tuned), _moves(reference), groups=rows)}


def kept_share(
    tuned: Tensor, reference: Tensor, best: Tensor, rows: Tensor | None = None
) -> Moments:
    r"""Return the share of a best-of-n gain that one sample of the tuned model has.

    With means t, r and b it is :math:`S = (t - r) / (b - r)`, and its error to first order that of
    the mean of :math:`(t_i - r_i - S (b_i - r_i)) / (b - r)` over samples (the delta method). It is
    1 where a sample of the tuned model is as good as the best of n, which costs n times as much.

    Args:
        tuned: [n] values.
        reference: [n] values of the same conditions and noise.
        best: [n] values of the best of n samples of the reference, its own among them.
        rows: As in `moments`.

    Returns:
        NaN where best of n is not above or below the reference by two standard errors.
    """
    headroom = paired_moments(best, reference, rows)
    if not abs(headroom["mean"]) > _CERTAIN * headroom["sem"]:  # NaN is no gain either
        return {"mean": float("nan"), "sem": float("nan")}
    share = (_mean(tuned) - _mean(reference)) / headroom["mean"]
    apart = _moves(tuned) - _moves(reference) - share * (_moves(best) - _moves(reference))
    return {"mean": share, "sem": error_of_mean(apart / headroom["mean"], groups=rows)}


def _mean(values: Tensor) -> float:
    return ratio(values, torch.ones_like(values))


def _moves(values: Tensor) -> Tensor:
    """Return how far each sample moves the mean of those that are not NaN, [n]."""
    return ratio_parts(values, torch.ones_like(values))


def moments(values: Tensor, rows: Tensor | None = None) -> Moments:
    """Return the mean and its standard error over the entries that are not NaN.

    Args:
        values: [n].
        rows: int64 [n], the row of the data that each belongs to, whose samples depend on each
            other through their condition. None takes all as independent.
    """
    known = ~values.isnan()
    if not known.any():
        return {"mean": float("nan"), "sem": float("nan")}
    groups = None if rows is None else rows[known]
    return {
        "mean": float(values[known].mean()),
        "sem": error_of_mean(values[known], groups=groups),
    }
