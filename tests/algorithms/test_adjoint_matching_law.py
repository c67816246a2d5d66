"""Adjoint matching reaches the tilted law of a mixture; a plain reward gradient does not.

A mixture under the reward x_0 stays a mixture: e^{lambda x} moves the mean of a component by lambda
times its variance and multiplies its weight by e^{lambda m + lambda^2 s^2 / 2}.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import MEANS, WEIGHTS, Mixture
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.metrics import MMD
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of

SCALE, STD, STDS = 1.5, 0.6, [0.6] * len(WEIGHTS)  # modes that overlap
ROUNDS, SIZE, MATCHED, POINTS = 200, 512, 8, 4096


def model() -> GaussianMixturePipeline:
    flow: Any = {"schedule": "rectified_flow", "prediction_type": "velocity"}
    return GaussianMixturePipeline(WEIGHTS, MEANS, STDS, residual_width=0, **flow)


def tilted() -> Mixture:
    base = Mixture.of(WEIGHTS, MEANS, STDS)
    x = base.means[:, 0]
    logits = base.weights.log() + SCALE * x + SCALE**2 * STD**2 / 2
    moved = torch.stack([x + SCALE * STD**2, base.means[:, 1]], dim=1)
    return Mixture.of(logits.softmax(dim=0).tolist(), moved.tolist(), STDS)


def fitted(kind: type[RewardFineTuner], **settings: Any) -> RewardFineTuner:
    """Train for 200 updates of 512 samples, with a learning rate that falls from 0.1."""
    torch.manual_seed(0)
    tuner = kind(
        model(),
        Coordinate(),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.LinearLR,
            start_factor=1.0,
            end_factor=0.02,
            total_iters=ROUNDS,
        ),
        minibatch_size=SIZE,
        sampling_batch_size=SIZE,
        **settings,
    )
    pages: Any = {"num_train": SIZE, "num_val": 8, "num_test": 8, "batch_size": SIZE}
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=ROUNDS, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(tuner, MixtureData(WEIGHTS, MEANS, STDS, **pages))
    return tuner


def drawn(tuner: RewardFineTuner) -> Tensor:
    """Draw without noise in the sampler, whose law in 100 steps is that of the model."""
    pipeline, own = tuner.pipeline, generators(range(10**6, 10**6 + POINTS))
    condition = pipeline.encode({"index": torch.arange(POINTS)})
    with torch.no_grad():
        x_1 = tuner.prior(condition).sample(own)
        walked = Sampler(100, 0.0).sample(pipeline, pipeline.process, x_1, condition, own)
    return tensor_of(walked)


@pytest.mark.slow
def test_it_reaches_the_tilted_law_of_a_mixture_where_draft_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    law = tilted()
    distance = MMD(law.weights.tolist(), law.means.tolist(), STDS, num_points=POINTS)
    exact = [law.sample(POINTS, torch.Generator().manual_seed(seed)) for seed in range(1, 21)]
    bound = max(distance.compare({"points": own.float()})["mmd"] for own in exact)
    wanted = torch.cat(exact)
    adjoint = fitted(
        AdjointMatching,
        reward_scale=SCALE,
        num_candidates=1,
        num_matched=MATCHED,
        microbatch_size=SIZE * MATCHED,
        sampler=Sampler(40, 1.0),
    )
    x = drawn(adjoint)
    assert distance.compare({"points": x})["mmd"] < bound
    error = wanted[:, 0].std() / POINTS**0.5
    assert float(x[:, 0].mean()) == pytest.approx(float(wanted[:, 0].mean()), abs=3 * float(error))
    # Of a normal law; that of the mixture is of the same size.
    spread = 3 * float(error) / 2**0.5
    assert float(x[:, 0].std()) == pytest.approx(float(wanted[:, 0].std()), abs=spread)
    x = drawn(fitted(RewardGradient, method=DRaFT(1), sampler=Sampler(40, 1.0)))
    assert distance.compare({"points": x})["mmd"] > 100 * bound
