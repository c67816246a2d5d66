"""Who pays: training, an evaluation, a test, or nobody."""

import pytest
import torch
from torch import nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.cost.meter import Meter


def watched(prior: nn.Module | None = None) -> tuple[Meter, GaussianMixturePipeline]:
    meter, pipeline = Meter(), GaussianMixturePipeline()
    meter.watch(pipeline, prior or pipeline.denoiser, nn.Module())
    return meter, pipeline


def call(pipeline: GaussianMixturePipeline, num: int) -> None:
    condition = pipeline.example().repeat(num)
    pipeline(pipeline.blank(condition), torch.full((num,), 0.5), condition)


def test_calls_are_billed_to_whoever_runs() -> None:
    meter, pipeline = watched()
    meter.start_training()
    call(pipeline, 3)
    meter.start_evaluation()
    call(pipeline, 5)
    assert (meter.training.denoiser_calls, meter.current.denoiser_calls) == (3, 5)
    meter.end_evaluation()
    call(pipeline, 1)
    assert meter.current is meter.training and meter.training.denoiser_calls == 4
    meter.start_test()
    call(pipeline, 2)
    report = meter.report([meter.counts()])
    assert report["denoiser_calls"] == 4 and report["test_denoiser_calls"] == 2
    assert report["flops"] == 2 * report["test_flops"] > 0
    assert meter.spent(num_samples=7) == {"samples": 7, "reward_calls": 0, "denoiser_calls": 4}


def test_the_clock_of_training_stands_still_in_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its calls do: runs that validate more or less often compare."""
    now = iter([10.0, 13.0, 113.0, 114.0, 120.0, 170.0, 175.0])
    monkeypatch.setattr("lit_rlft.cost.meter.time.monotonic", lambda: next(now))
    meter = Meter()
    meter.start_training()
    for seconds in (4.0, 15.0):
        meter.start_evaluation()
        meter.end_evaluation()
        meter.end_round([meter.counts()])
        assert meter.training.seconds == seconds


def test_processes_that_spend_unequally_are_summed() -> None:
    meters = [Meter() for _ in range(3)]
    for number, meter in enumerate(meters):
        meter.start_training()
        meter.training.denoiser_calls = 5 * number
    everyone = [meter.counts() for meter in meters]
    for meter in meters:
        meter.end_round(everyone)
        assert meter.total("denoiser_calls") == meter.spent(0)["denoiser_calls"] == 15
    held = meters[1].as_dict()
    for number, meter in enumerate(meters):  # as a test of the checkpoint after the fit
        meter.restore(held, first=number == 0)
        assert meter.total("denoiser_calls") == 15
    # A run that goes on with two processes has spent the same so far.
    resumed = [Meter() for _ in range(2)]
    for number, meter in enumerate(resumed):
        meter.restore(held, first=number == 0)
        meter.start_training()
        meter.training.denoiser_calls += 1
    everyone = [meter.counts() for meter in resumed]
    for meter in resumed:
        meter.end_round(everyone)
        assert meter.total("denoiser_calls") == 17


def test_nobody_pays_for_looking_even_where_it_fails() -> None:
    meter, pipeline = watched()
    meter.start_training()
    with pytest.raises(RuntimeError), meter.unbilled():
        call(pipeline, 3)
        raise RuntimeError
    meter.look_at(pipeline, pipeline.example())
    assert meter.flops_per_call > 0
    assert meter.current is meter.training and meter.training.denoiser_calls == 0


def test_the_network_of_a_prior_is_counted_apart() -> None:
    network = nn.Linear(2, 2)
    meter, pipeline = watched(network)
    network(torch.zeros(4, 2))
    call(pipeline, 1)
    assert (meter.current.prior_calls, meter.current.denoiser_calls) == (4, 1)


def test_trainings_clock_goes_on_after_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 12.5, 100.0, 101.0])
    monkeypatch.setattr("lit_rlft.cost.meter.time.monotonic", lambda: next(seconds))
    meter = Meter()
    meter.start_training()
    meter.end_round([meter.counts()])
    assert meter.training.seconds == 2.5
    meter.start_training()
    meter.end_round([meter.counts()])
    assert meter.training.seconds == 3.5
