"""A setting that is changed after construction has its effect, as checkpoints record it."""

from typing import Any

import pytest

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft import PGRAFT, DiffusionDPO, DiffusionNFT, RewardGradient, Sampler
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import BadArgument
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.settings import settings


def tuner(kind: type[RewardFineTuner] = PGRAFT, **own: Any) -> Any:
    if kind is RewardGradient:
        own["method"] = DRaFT()
    return kind(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(num_steps=8), **own)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("kind", [PGRAFT, DiffusionDPO, DiffusionNFT, RewardGradient])
def test_the_relay_follows(kind: type[RewardFineTuner], ready: bool) -> None:
    module = tuner(kind)
    if ready:
        module.setup("fit")
    module.start = 0.25
    if kind is not RewardGradient:
        module.cut = 0.5
    module.setup("fit")
    last = [] if kind is RewardGradient else [(False, 4)]
    legs = [(leg.tuned, leg.num_steps) for leg in module.route().legs]
    assert legs == [(False, 2), (True, 6 - sum(num for _, num in last)), *last]
    assert settings(module, "model")["model.start"] == 0.25


@pytest.mark.parametrize("name", ["start", "cut"])
@pytest.mark.parametrize("ready", [False, True])
def test_a_relay_without_a_tuned_step_is_refused(name: str, ready: bool) -> None:
    module = tuner(cut=0.0)
    if ready:
        module.setup("fit")
    setattr(module, name, 0.99)
    with pytest.raises(BadArgument, match=f"{name} must be smaller, to leave"):
        module.setup("fit")
        module.route()


@pytest.mark.parametrize("ready", [False, True])
def test_batch_sizes_follow(ready: bool) -> None:
    module = tuner(microbatch_size=2, sampling_batch_size=64)
    if ready:
        module.setup("fit")
    module.microbatch_size, module.sampling_batch_size = 4, 16
    module.setup("fit")
    assert (module.sizes.microbatch.rows, module.sizes.sampling.rows) == (4, 16)
    assert module.rollouts.chunk_size.rows == 16
    recorded = settings(module, "model")
    assert recorded["model.microbatch_size"] == 4
    assert recorded["model.sampling_batch_size"] == 16
    module.sampling_batch_size = "auto"
    assert module.sizes.sampling.automatic and module.rollouts.chunk_size.rows == 64
    module.microbatch_size = None
    assert module.sizes.microbatch.rows is None and not module.sizes.microbatch.automatic


@pytest.mark.parametrize("name", ["microbatch_size", "sampling_batch_size"])
@pytest.mark.parametrize("value", ["atuo", 0, 2.5, -1])
def test_an_impossible_size_is_refused_at_once(name: str, value: object) -> None:
    module = tuner()
    module.setup("fit")
    before = getattr(module, name)
    with pytest.raises(BadArgument, match=f"PGRAFT: {name} "):
        setattr(module, name, value)
    assert getattr(module, name) == before


def test_a_size_is_not_there_before_it_is_set() -> None:
    class Forgetful(PGRAFT):
        def __init__(self) -> None:
            pass

    with pytest.raises(AttributeError, match="microbatch_size"):
        Forgetful().microbatch_size  # noqa: B018
