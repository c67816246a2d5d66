"""Schedules of the learning rate that wait for a plateau."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.learning_rate import after_round
from tests.support import trainer_of


@pytest.mark.parametrize("name", ["loss", "reward", "clip_fraction"])
def test_rounds_without_its_value_are_passed_over(name: str) -> None:
    """A round without an update has no loss, one without an answer no reward."""
    weight = torch.nn.Parameter(torch.ones(1))
    schedule = ReduceLROnPlateau(torch.optim.SGD([weight], lr=1.0), monitor=f"train/{name}")
    if name in ("loss", "reward"):
        after_round(schedule, {"acceptance_rate": 0.0})
    else:  # it may never be there
        with pytest.raises(UsageError, match="nothing is logged as 'train/clip_fraction'"):
            after_round(schedule, {"acceptance_rate": 0.0})
    assert schedule.last_epoch == 0
    after_round(schedule, {name: 1.0})
    after_round(schedule, {"acceptance_rate": 0.0})
    after_round(schedule, {name: math.nan})  # as where no sample could be scored
    assert schedule.last_epoch == 1 and schedule.num_bad_epochs == 0


def test_a_sanity_check_is_no_validation(tmp_path: Path) -> None:
    seen = []

    class Watched(ReduceLROnPlateau):
        def step(self, metrics: float, epoch: int | None = None) -> None:  # type: ignore[override]
            seen.append(metrics)

    tuner = GRAFT(
        GaussianMixturePipeline(),
        Coordinate(),
        sampler=Sampler(2),
        lr_scheduler=lambda optimizer: Watched(optimizer, monitor="val/kl"),
    )
    settings = {"num_sanity_val_steps": 2, "limit_val_batches": 1.0}
    trainer = trainer_of(default_root_dir=tmp_path, **settings)
    trainer.fit(tuner, MixtureData(num_train=8, num_val=4, batch_size=8, eval_batch_size=2))
    assert len(seen) == 1
