"""How often the device is waited for: never in a walk, once in an update.

Run on the meta device, which a rehearsal takes for an accelerator: what reads a number of it, or
copies from it or, unless told not to wait, to it, is counted.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.callbacks.self_check import SelfCheck
from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.trajectory import Trajectories, walk_with_log_probs
from lit_rlft.cost.rehearsal import backward, rehearsal
from lit_rlft.loop.updates import layout, plan
from tests.operations import Waits
from tests.support import trainer_of

NUM, T = 2, 2
PEERS: dict[str, Any] = {"advantage": GroupAdvantage(), "num_candidates": 2}
ALGORITHMS: dict[str, Callable[..., RewardFineTuner]] = {
    "P-GRAFT": lambda make: PGRAFT(make(), Coordinate(), sampler=Sampler(T, 1.0)),
    "contrast": lambda make: PGRAFT(make(), Coordinate(), sampler=Sampler(T), contrast=1.0),
    "DDPO": lambda make: DDPO(make(), Coordinate(), sampler=Sampler(T, 1.0), **PEERS),
    "DPOK": lambda make: DDPO(make(), Coordinate(), sampler=Sampler(T, 1.0), kl_coef=0.1, **PEERS),
    "NoisePPO": lambda make: NoisePPO(make(), Coordinate(), sampler=Sampler(T), **PEERS),
    "DRaFT": lambda make: RewardGradient(
        make(), Quadratic(), sampler=Sampler(T), method=DRaFT(1), kl_coef=0.1, log_depth=True
    ),
}


class Stepped(LightningOptimizer):
    """Steps without a strategy."""

    def step(self, closure: Any = None, **more: Any) -> None:
        self._optimizer.step()


def to_device(tuner: RewardFineTuner) -> None:
    """Put a tuner on the device, with as much of a trainer as an update asks for."""
    tuner.trainer = trainer_of(callbacks=[SelfCheck()])
    tuner.setup("fit")
    tuner.to("meta")
    parameters = [p for p in tuner.trainable().parameters() if p.requires_grad]
    optimizer = Stepped(torch.optim.SGD(parameters, lr=0.1))
    tuner.optimizers = lambda *_: optimizer  # type: ignore[assignment, method-assign]
    tuner.manual_backward = backward  # type: ignore[method-assign]
    tuner.lr_schedulers = lambda: None  # type: ignore[method-assign]
    tuner.eval()


SLOW = ("contrast", "DPOK", "NoisePPO")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, make in ALGORITHMS.items()
    ],
)
def test_an_update_waits_once(make: Callable[..., RewardFineTuner]) -> None:
    """For its logs, the norm of its gradients and what the self-check has found, together."""
    tuner = make(lambda: GaussianMixturePipeline(residual_width=8))
    tuner.sizes.microbatch.rows, batch = 1, {"index": torch.arange(NUM)}
    with rehearsal():
        to_device(tuner)
        with torch.no_grad():
            experience = tuner.collect(batch, tuner.pipeline.encode(batch))
        tuner.train()
        updates = plan(experience, [layout(experience, NUM)], 0, 1, 2, 0, 0)
        waits = Waits()
        with waits:
            for update in updates:
                tuner._update(update)
    assert max(update.minibatch.num_terms for update in updates) >= 2
    assert waits.found == ["_to_copy"] * len(updates)


def test_a_walk_never_waits() -> None:
    for pipeline in (GaussianMixturePipeline(), LayoutPipeline(None, architecture=Architecture())):
        tuner = PGRAFT(pipeline, Coordinate(), sampler=Sampler(T, 1.0))
        with rehearsal():
            to_device(tuner)
            condition = pipeline.example().repeat(NUM)
            process, waits, times = pipeline.process, Waits(), pipeline.process.times(T)
            with torch.no_grad(), waits:
                list(tuner.route().walk(condition, generators(range(NUM))))
                x_1 = process.prior(pipeline.blank(condition)).sample(generators(range(NUM)))
                table = process.steps(times, None, 1.0, x_1).coefficients
                kept = Trajectories(NUM, times, range(T), table)
                args = (condition, times, 1.0, generators(range(NUM)))
                kept.record(0, walk_with_log_probs(pipeline, process, x_1, *args))
                kept.pairs(torch.tensor([0, 1, 3]), torch.tensor([2, 2, 0]))
        assert not waits.found
