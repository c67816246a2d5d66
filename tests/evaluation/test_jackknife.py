"""Jackknife errors: of a mean against the textbook, of a variance, of a gain, by resampling."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metrics, SetMetric
from lit_rlft.evaluation.jackknife import compared
from lit_rlft.evaluation.measurements import Measured, Measurements


class Mean(SetMetric):
    """Of all points together."""

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        return {"points": samples}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        return {"average": float(features["points"].mean())}


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 3 * torch.randn(400, generator=generator, dtype=torch.float64)
    shift = 0.1 * torch.randn(400, generator=generator, dtype=torch.float64) + 1
    arms = {"tuned": {"points": points + shift}, "reference": {"points": points}}
    for num_draws, tolerance in ((400, 1e-9), (40, 0.3)):
        found = compared(Mean(), arms, num_draws)
        for arm, values in (("reference", points), ("gain", shift)):
            assert found[arm]["average"]["mean"] == pytest.approx(float(values.mean()))
            error = float(values.std()) / 400**0.5
            assert found[arm]["average"]["sem"] == pytest.approx(error, rel=tolerance)
        assert compared(Mean(), arms, num_draws) == found
    silent = compared(Mean(), {"other": arms["tuned"]}, num_draws=0)
    assert math.isnan(silent["other"]["average"]["sem"]) and "gain" not in silent
    few = compared(Mean(), {"other": {"points": points[:3]}}, num_draws=20)
    assert math.isnan(few["other"]["average"]["sem"])
    sizes = {"tuned": {"points": points[:300]}, "reference": {"points": points}}
    found = compared(Mean(), sizes, 400)
    apart = math.hypot(*(found[arm]["average"]["sem"] for arm in sizes))
    assert found["gain"]["average"]["sem"] == pytest.approx(apart)


class Known(Mean):
    """The same, whose error needs no draws."""

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        return {"average": 1.0 if other is None else 2.0}


def test_errors_that_a_metric_knows_take_the_place_of_draws() -> None:
    arms = {"tuned": {"points": torch.ones(3)}, "reference": {"points": torch.zeros(3)}}
    found = compared(Known(), arms, num_draws=20)
    assert found["gain"]["average"] == {"mean": 1.0, "sem": 2.0}
    assert found["tuned"]["average"] == {"mean": 1.0, "sem": 1.0}
    assert math.isnan(compared(Known(), arms, num_draws=0)["tuned"]["average"]["sem"])
    unpaired = compared(Known(), {**arms, "reference": {"points": torch.zeros(4)}}, num_draws=20)
    assert math.isnan(unpaired["gain"]["average"]["sem"])


@pytest.mark.parametrize("rows_in_order", [True, False])
def test_samples_of_one_row_are_left_out_together(rows_in_order: bool) -> None:
    """Where rows differ much, samples on their own would give half the error or less."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(100).repeat_interleave(8)
    rows = rows if rows_in_order else rows[torch.randperm(800, generator=generator)]
    of_row = torch.randn(100, generator=generator, dtype=torch.float64)
    points = of_row[rows] + torch.randn(800, generator=generator, dtype=torch.float64)
    arms = {"tuned": {"points": points + 0.1 * of_row[rows]}, "reference": {"points": points}}
    found = compared(Mean(), arms, 100, rows=dict.fromkeys(arms, rows))
    means = torch.zeros(100, dtype=torch.float64).index_add_(0, rows, points) / 8
    exact = {"reference": float(means.std()) / 10, "gain": 0.1 * float(of_row.std()) / 10}
    for arm, error in exact.items():
        assert found[arm]["average"]["sem"] == pytest.approx(error, rel=1e-6)
    apart = compared(Mean(), arms, 100)["reference"]["average"]["sem"]
    assert apart < 0.6 * exact["reference"]


def test_rows_of_one_sample_and_one_row_alone_change_nothing() -> None:
    points = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = compared(Mean(), {"tuned": {"points": points}}, 20)
    for rows in (torch.arange(40).flip(0), torch.zeros(40).long()):
        assert compared(Mean(), {"tuned": {"points": points}}, 20, rows={"tuned": rows}) == plain


def test_an_evaluation_joins_the_batches_and_keeps_pairs() -> None:
    evaluation, metric = Measurements(), Mean()
    assert isinstance(metric, SetMetric) and metric.evaluate(torch.ones(2), None) == {}  # type: ignore[arg-type]
    points = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    for batch in (1, 0):
        for arm, shift in (("tuned", 2.0), ("reference", 0.0)):
            features = metric.features(points[batch] + shift, None)  # type: ignore[arg-type]
            evaluation.add(arm, batch, {"r": torch.ones(2)}, None, ["", ""], [features])
    summary = evaluation.summary(1, [metric], errors=True)
    assert summary["tuned"]["average"]["mean"] == 17 and summary["reference"]["r"]["mean"] == 1
    # Every pair differs by the same: no error at all.
    assert summary["gain"]["average"] == pytest.approx({"mean": 2.0, "sem": 0.0}, abs=1e-6)
    assert summary["tuned"]["average"]["sem"] > 1
    quick = evaluation.summary(1, [metric])
    assert quick["tuned"]["average"]["mean"] == 17
    assert math.isnan(quick["tuned"]["average"]["sem"])


def test_errors_of_sets_do_not_depend_on_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two samples of each row, of which a process has every other one; groups are of three rows."""
    points = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric, whole, first, second = Mean(), Measurements(), Measurements(), Measurements()
    for evaluation, rows in (
        (whole, range(60)),
        (first, range(0, 60, 2)),
        (second, range(1, 60, 2)),
    ):
        own = torch.tensor(rows)
        for arm, shift in (("tuned", 2.0), ("reference", 0.0)):
            parts = [{"points": points[own].flatten() + shift}]
            given = ({"r": torch.ones(2 * len(own))}, None, [""] * 2 * len(own), parts)
            evaluation.add(arm, 0, *given, rows=own.repeat_interleave(2))
    alone = whole.summary(1, [metric], errors=True)

    def gathered(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
        kinds = (Measured.columns, Measured.all_rows, Measured.sets)
        (kind,) = (kind for kind in kinds if same(mine["tuned"], kind(first.tuned)))
        return [mine, {arm: kind(measured) for arm, measured in second.arms.items()}]

    def same(one: Any, other: Any) -> bool:
        return type(one) is type(other) and list(one) == list(other)

    monkeypatch.setattr("lit_rlft.evaluation.measurements.gather", gathered)
    for arm, numbers in first.summary(2, [metric], errors=True).items():
        assert numbers["average"] == pytest.approx(alone[arm]["average"], rel=1e-9)
    assert alone["tuned"]["average"]["sem"] > 0


def test_metrics_of_sets_stand_beside_others() -> None:
    assert Metrics([Mean()]).evaluate(torch.ones(3), None) == {}  # type: ignore[arg-type]


class Distinct(Mean):
    """How many points differ: it depends on their number."""

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        return {"average": float(len(features["points"].unique()))}


def test_groups_are_of_one_size() -> None:
    """381 points in groups of 20 would leave one of a single point, 1.35 times too large errors."""
    generator = torch.Generator().manual_seed(0)
    numbers, errors = [], []
    for _ in range(200):
        points = torch.randint(0, 500, (381,), generator=generator)
        found = compared(Distinct(), {"tuned": {"points": points}}, 20)["tuned"]["average"]
        numbers.append(found["mean"])
        errors.append(found["sem"])
    true = torch.tensor(numbers).std().item()
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(true, rel=0.25)
