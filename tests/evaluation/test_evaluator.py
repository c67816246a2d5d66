"""Evaluations where rewards fail: what is known counts; where nothing is, they end."""

import math
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.answers import any_finite
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.guard import Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.reward import Metric, Metrics, Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import DiscreteVP, vp_betas
from lit_rlft.core.state import State, tensor_of
from lit_rlft.evaluation.evaluator import Evaluator
from lit_rlft.evaluation.exploitation import guards_of
from lit_rlft.evaluation.kept import Extremes, first_entries, first_of_all
from lit_rlft.evaluation.measurements import Measurements
from lit_rlft.loop.route import Leg, Route
from tests.support import trainer_of
from tests.test_distributed import processes


class Late(Coordinate):
    """Fails for the first samples it is asked about."""

    def __init__(self, num_failed: float) -> None:
        super().__init__()
        self.left = num_failed

    def forward(self, samples: Tensor, condition: Condition) -> Tensor:
        failed = torch.arange(len(samples)) < self.left
        self.left -= len(samples)
        return super().forward(samples, condition).masked_fill(failed, torch.nan)


def started(reward: Reward, world_size: int = 1, pipeline: Pipeline | None = None) -> GRAFT:
    sampler, pipeline = Sampler(2, 1.0), pipeline or GaussianMixturePipeline()
    tuner = GRAFT(pipeline, reward, sampler=sampler, num_eval_samples=1)
    tuner.trainer = trainer_of()
    tuner.setup("test")
    tuner.evaluator.start(world_size)
    return tuner


def measure(tuner: GRAFT, num_batches: int, batch_size: int) -> None:
    for number in range(num_batches):
        rows = torch.arange(batch_size * number, batch_size * (number + 1))
        tuner.evaluator.run({"index": rows}, number, tuner.route(), tuner.reference_route())


def evaluated(num_failed: float, num_batches: int = 8, batch_size: int = 8) -> Evaluator:
    tuner = started(Late(num_failed))
    measure(tuner, num_batches, batch_size)
    return tuner.evaluator


def test_a_first_batch_that_fails_is_left_out() -> None:
    summary = evaluated(num_failed=20).summary()
    assert set(summary["tuned"]) >= {"Late", "kl"}
    assert summary["tuned"]["Late"]["sem"] > 0 and summary["reference"]["Late"]["sem"] > 0


def test_an_evaluation_goes_on_where_later_batches_fail() -> None:
    class Early(Late):
        """Scores the first samples it is asked about alone."""

        def forward(self, samples: Tensor, condition: Condition) -> Tensor:
            late = super().forward(samples, condition)
            return Coordinate.forward(self, samples, condition).where(late.isnan(), torch.nan)

    tuner = started(Early(4))
    measure(tuner, num_batches=8, batch_size=8)
    assert math.isfinite(tuner.evaluator.summary()["tuned"]["Early"]["mean"])


def test_infinite_rewards_are_left_out_of_the_means_too() -> None:
    class Unbounded(Coordinate):
        def forward(self, samples: Tensor, condition: Condition) -> Tensor:
            return super().forward(samples, condition).where(samples[:, 0] > 0, -torch.inf)

    tuner = started(WeightedSum({"a": Unbounded()}))
    with pytest.warns(UserWarning, match="left out of its means"):
        measure(tuner, num_batches=4, batch_size=16)
    summary = tuner.evaluator.summary()
    for arm, name in product(("tuned", "reference"), ("WeightedSum", "a")):
        assert math.isfinite(summary[arm][name]["mean"]) and summary[arm][name]["mean"] > 0
        assert summary[arm][name]["sem"] > 0


def test_an_evaluation_of_a_normalised_reward_may_measure_nothing() -> None:
    """Before the first batch the reference has no sum that could be brought to another unit."""
    reward = WeightedSum({"a": Coordinate()}, normalize=True)
    tuner = GRAFT(GaussianMixturePipeline(), reward, sampler=Sampler(2, 1.0))
    tuner.trainer = trainer_of()
    tuner.setup("test")
    tuner.evaluator.start()
    assert tuner.evaluator.summary() == {"tuned": {}, "reference": {}, "gain": {}}


def test_a_reward_that_knows_nothing_ends_an_evaluation() -> None:
    with pytest.raises(UsageError, match="Late failed for all 64 samples"):
        evaluated(num_failed=float("inf"))  # half way, with the reference's
    few = evaluated(num_failed=float("inf"), num_batches=2)
    with pytest.raises(UsageError, match="Late failed for all 16 samples"):
        few.summary()


def test_one_of_several_processes_does_not_give_up_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may have found scores; of all together it is known at the end."""

    def work(rank: int) -> object:
        tuner = started(Late(float("inf") if rank else 0), world_size=2)
        measure(tuner, num_batches=8, batch_size=8)
        return tuner.evaluator.summary()["tuned"]["Late"]["mean"]

    first, second = processes(monkeypatch, 2, work)
    assert first == second and math.isfinite(first)


def test_a_reward_that_knows_nothing_on_any_process_ends_an_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(rank: int) -> None:
        tuner = started(Late(float("inf")), world_size=2)
        measure(tuner, num_batches=2 + rank, batch_size=4)
        tuner.evaluator.summary()

    for error in processes(monkeypatch, 2, work):
        assert isinstance(error, UsageError)
        assert str(error).startswith("Late failed for all 20 samples")


class Broken(GaussianMixturePipeline):
    """Draws what is no number."""

    def decode(self, x_0: State, condition: Condition) -> Tensor:
        return super().decode(x_0, condition) / 0 * 0


@pytest.mark.parametrize("named", ["DDPO", "GRAFT", "evaluation", "short evaluation", "gradient"])
def test_a_reward_is_not_blamed_for_samples_that_are_not_finite(named: str) -> None:
    data = MixtureData(num_train=8, num_val=2, num_test=2, batch_size=8)
    sampler = Sampler(3, 1.0)
    sentence = r"all \d+ samples hold numbers that are not finite, so Coordinate has nothing to"
    with pytest.raises(UsageError, match=sentence):
        if named in ("DDPO", "GRAFT"):
            kind = DDPO if named == "DDPO" else GRAFT
            trainer_of().fit(kind(Broken(), Coordinate(), sampler=sampler), data)
        elif named == "gradient":
            pipeline = Broken(residual_width=8)
            tuner = RewardGradient(pipeline, Coordinate(), sampler=sampler, method=DRaFT(k=1))
            trainer_of().fit(tuner, data)
        else:
            tuner = started(Coordinate(), pipeline=Broken())
            measure(tuner, 2 if named.startswith("short") else 20, 8)
            tuner.evaluator.summary()


@pytest.mark.parametrize("finite", [0, 1])
def test_one_finite_sample_tells_of_a_reward_that_fails(finite: int) -> None:
    samples = torch.full((4, 2), torch.nan)
    samples[:finite] = 1.0
    assert any_finite(samples) == any_finite({"a": samples, "b": torch.zeros(4)}) == bool(finite)
    assert any_finite(["some", "text"]) and any_finite(torch.zeros(4).long())


@pytest.mark.parametrize("number", [1, 5, 6])
def test_processes_render_their_shares_of_the_first_samples(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they show what one shows alone, in the order of the data."""
    sampler = Sampler(2, 1.0)

    def work(rank: int, world_size: int = 3) -> tuple[Measurements, int]:
        tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=sampler, num_eval_samples=2)
        tuner.trainer = trainer_of()
        tuner.setup("test")
        evaluator = tuner.evaluator
        evaluator.start(world_size)
        evaluator.show(number)
        for batch, row in enumerate(range(rank, 7, world_size)):
            routes = tuner.route(), tuner.reference_route()
            evaluator.run({"index": torch.tensor([row])}, batch, *routes)
        own = evaluator.measurements
        return first_of_all(own, number, world_size), own.tuned.num_pictures

    alone, _ = work(0, world_size=1)
    for shown, rendered in processes(monkeypatch, 3, work):
        assert rendered <= 2
        for arm in ("tuned", "reference"):
            one, own = alone.arms[arm], shown.arms[arm]
            pictures = torch.cat([one.pictures[i] for i in sorted(one.pictures)])
            apart = own.pictures[0].int() - pictures.int()
            assert len(own.pictures[0]) == number and apart.abs().max() <= 1  # rounding
            assert own.rows[0].tolist() == one.all_rows().tolist()[:number]
        entries, expected = (first_entries(part, number, 2) for part in (shown, alone))
        places = [[(one["row"], one["sample"]) for one in found] for found in (entries, expected)]
        assert places[0] == places[1] and len(places[0]) == number
        values = [[one["tuned"]["values"]["Coordinate"] for one in p] for p in (entries, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("number", [2, 10])
def test_extremes_are_of_known_rewards_and_of_equal_ones_the_first(number: int) -> None:
    """Samples that failed are none; models are told apart in either order."""
    pipeline, nan = GaussianMixturePipeline(), math.nan
    tuned = [[nan, 5.0, nan, 5.0, 5.0, 4.0], [nan, 5.0, -3.0, 6.0, 5.0, 5.0]]
    reference = [[0.0, 4.0, 0.0, 4.5, 5.0, 4.0], [0.0, 4.0, 0.0, 6.0, 5.0, 5.0]]
    extremes = Extremes(pipeline, "r", number, per_condition=2)
    for batch in range(2):
        rows = torch.tensor([0, 0, 1, 1, 2, 2]) + 3 * batch
        condition = pipeline.encode({"index": rows})
        arms = {"tuned": tuned[batch], "reference": reference[batch], "best_of_2": [9.0] * 6}
        for arm in (list(arms), reversed(arms))[batch]:
            values = {"r": torch.tensor(arms[arm])}
            extremes.see(arm, batch, rows, torch.zeros(6, 2), condition, values)
    places = {
        kind: [(entry["row"], entry["sample"]) for _, entry in own]
        for kind, own in extremes.found.items()
    }
    high, fives, low = [(4, 1)], [(0, 1), (1, 1), (2, 0), (3, 1), (5, 0), (5, 1)], [(2, 1), (4, 0)]
    changed = [(4, 0), (0, 1), (3, 1), (1, 1), (2, 0), (2, 1), (4, 1), (5, 0), (5, 1)]
    every = {"best": high + fives + low, "worst": low[::-1] + fives + high, "changed": changed}
    assert places == {kind: own[:number] for kind, own in every.items()}
    for _, entry in extremes.found["changed"]:
        batch, place = divmod(2 * entry["row"] + entry["sample"], 6)
        assert entry["tuned"]["values"]["r"] == tuned[batch][place]
        assert entry["reference"]["values"]["r"] == reference[batch][place]


def test_of_rewards_that_are_all_equal_the_first_samples_are_kept() -> None:
    """As of a reward that is 0 or 1, for batches of any size."""
    pipeline, rows = GaussianMixturePipeline(), torch.arange(3).repeat_interleave(2)
    extremes, condition = Extremes(pipeline, "r", 2, 2), pipeline.encode({"index": rows})
    for arm in ("tuned", "reference"):
        extremes.see(arm, 0, rows, torch.zeros(6, 2), condition, {"r": torch.ones(6)})
    for own in extremes.found.values():
        assert [(entry["row"], entry["sample"]) for _, entry in own] == [(0, 0), (0, 1)]


def test_samples_belong_to_the_rows_that_their_noise_is_of() -> None:
    tuner, drawn = started(Coordinate()), {}
    tuner.evaluator.num_samples = 2
    tuner.evaluator.seen = lambda arm, batch, rows, samples, *_: drawn.update(
        {(arm, batch): (rows.tolist(), samples)}
    )
    for batch, rows in enumerate(([3, 1], [1, 3])):
        routes = tuner.route(), tuner.reference_route()
        tuner.evaluator.run({"index": torch.tensor(rows)}, batch, *routes)
    (rows, one), (others, other) = (drawn["tuned", batch] for batch in range(2))
    assert rows == [3, 3, 1, 1] and others == [1, 1, 3, 3]
    torch.testing.assert_close(one, other[[2, 3, 0, 1]])
    assert len(one.unique(dim=0)) == 4


def test_divergences_are_of_the_steps_as_they_lead() -> None:
    """Past the grid under schedulers of fixed strides; each sample has that of one of them."""
    schedule = DiscreteVP(vp_betas(), spacing="linspace", strides=True)
    process, tuner, size = GaussianProcess(schedule, "v"), started(Coordinate()), 64

    def route(shift: float) -> Route:
        leg = Leg(lambda x, t, condition: 0.3 * tensor_of(x) + shift, 4, tuned=shift > 0)
        return Route(process, lambda own: process.prior(torch.zeros(len(own), 2)), [leg], 1.0)

    def law(shift: float, i: int) -> Any:
        t, s = process.times(4)[i].expand(1), process.ends(4)[i].expand(1)
        return process.transition(torch.full((1, 2), shift).double(), torch.zeros(1, 2), t, s, 1.0)

    steps = torch.stack([4 * law(0.2, i).kl(law(0.0, i))[0] for i in range(4)])
    condition = tuner.pipeline.encode({"index": torch.arange(size)})
    x_0 = torch.zeros(size, 2)
    found = tuner.evaluator._divergence(x_0, condition, range(size), route(0.2), route(0.0))
    nearest = (found.unsqueeze(1) - steps).abs().min(dim=1)
    assert float(nearest.values.max()) < 1e-3 * float(steps[steps > 0].min())
    assert set(nearest.indices.tolist()) == {0, 1, 2, 3}


def test_predictions_are_on_nobodys_bill() -> None:
    tuner = started(Coordinate())
    with torch.no_grad():
        draw = tuner.evaluator.predict({"index": torch.arange(3)}, tuner.route())
    torch.testing.assert_close(draw.rewards, draw.samples[:, 0])
    spent = tuner.meter.current
    assert spent.reward_calls == spent.denoiser_calls == 0


def test_the_reference_is_measured_again_for_other_rows() -> None:
    """As a loader that shuffles brings them; a batch that is the same is measured once."""
    tuner, drawn = started(Coordinate()), []
    tuner.evaluator.phase = lambda name, num: (drawn.append(name), nullcontext())[1]
    orders = [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[3, 1], [2, 0]], [[3, 1], [2]]]
    for order in orders:
        tuner.evaluator.start(keep_reference=True)
        tuner.evaluator.show(3)
        for number, rows in enumerate(order):
            routes = tuner.route(), tuner.reference_route()
            tuner.evaluator.run({"index": torch.tensor(rows)}, number, *routes)
        found = tuner.evaluator.measurements
        assert found.reference.all_rows().tolist() == [row for rows in order for row in rows]
        assert found.reference.num_pictures == found.tuned.num_pictures == 3
        # Neither was trained: under the same conditions and noise they are the same.
        gain = tuner.evaluator.summary()["gain"]["Coordinate"]
        assert gain["mean"] == pytest.approx(0, abs=1e-6) and gain["sem"] < 1e-6
        for batch, pictures in found.tuned.pictures.items():
            assert torch.equal(found.reference.pictures[batch], pictures)
    assert drawn.count("sample_reference") == 2 + 0 + 2 + 1
    assert drawn.count("sample_tuned") == 8


class Other(Reward):
    """Measures something else under the name of a reward."""

    name = "Coordinate"

    def forward(self, samples: Tensor, condition: Condition) -> Tensor:
        return 100 + samples[:, 0]


def test_a_metric_of_a_rewards_name_has_another() -> None:
    """It took the reward's place, and under `normalize` the combination's."""
    alone, beside = started(Coordinate()), started(Coordinate())
    beside.evaluator.metrics = Metrics([Other(), Other()])
    for tuner in (alone, beside):
        measure(tuner, 2, 8)
    expected, found = (tuner.evaluator.summary() for tuner in (alone, beside))
    for arm in ("tuned", "reference"):
        assert found[arm]["Coordinate"] == expected[arm]["Coordinate"]
        for name in ("Coordinate_2", "Coordinate_3"):
            first = expected[arm]["Coordinate"]["mean"]
            assert found[arm][name]["mean"] == pytest.approx(100 + first, abs=1e-4)


def test_a_test_returns_its_numbers() -> None:
    """Also where nothing writes files."""
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2, 1.0))
    (found,) = trainer_of().test(tuner, MixtureData(num_test=4), verbose=False)
    summary = tuner.evaluator.summary()
    for prefix, arm in (("test", "tuned"), ("test_reference", "reference"), ("test_gain", "gain")):
        for name, values in summary[arm].items():
            assert found[f"{prefix}/{name}"] == pytest.approx(values["mean"], abs=1e-6)


class Named(Metric):
    """Measures the second coordinate under names that others have."""

    def evaluate(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        return {"kl": samples[:, 1], "second": samples[:, 1]}

    def guards(self) -> dict[str, Guard]:
        return {"kl": Guard()}


class Detailed(Coordinate):
    """Has a detail that is called as the divergence is."""

    def evaluate(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        return super().evaluate(samples, condition) | {"kl": samples[:, 1]}


def test_values_that_are_called_like_the_divergence_have_names_of_their_own() -> None:
    for reward, metrics, renamed in (
        (Coordinate(), Named(), {"kl_2": "second"}),
        (Detailed(), Named(), {"kl_2": "second", "kl_3": "second"}),
    ):
        sampler = Sampler(2, 1.0)
        pipeline = GaussianMixturePipeline()
        tuner = GRAFT(pipeline, reward, metrics=metrics, sampler=sampler, num_eval_samples=1)
        tuner.trainer = trainer_of()
        tuner.setup("test")
        tuner.evaluator.start()
        measure(tuner, 1, 8)
        summary = tuner.evaluator.summary()
        for arm in ("tuned", "reference"):
            assert summary[arm]["kl"]["mean"] == 0  # nothing was trained
            for name, like in renamed.items():
                assert summary[arm][name] == summary[arm][like] != summary[arm]["kl"]
        assert "kl" not in guards_of(reward, metrics)


def test_a_reward_cannot_be_called_like_the_divergence() -> None:
    class Mine(Coordinate):
        name = "kl"

    with pytest.raises(UsageError, match="GRAFT: reward is called 'kl', as reports call the div"):
        started(Mine())


def test_no_samples_are_none_that_are_finite() -> None:
    assert not any_finite(torch.zeros(0, 2)) and any_finite(torch.zeros(2))
    assert any_finite(torch.zeros(2, 0)) and not any_finite(torch.full((2, 1), torch.nan))
