"""Schedules of the learning rate under Lightning's own callbacks."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.learning_rate import after_update
from tests.support import trainer_of


def test_a_monitor_sees_the_rate_of_every_round(tmp_path: Path) -> None:
    tuner = GRAFT(
        GaussianMixturePipeline(),
        Coordinate(),
        sampler=Sampler(2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    settings = {"logger": logger, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    trainer = trainer_of(callbacks=[monitor], **settings)
    trainer.fit(tuner, MixtureData(num_train=12, batch_size=4))
    assert monitor.lrs == {"lr-SGD": [1.0, 0.5, 0.25]}


def test_a_schedule_that_ends_before_the_fit_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=2)
    optimizer.step()
    after_update(schedule)
    with pytest.raises(UsageError, match=r"lr_scheduler.*more updates .*\(Tried to step 3 times"):
        for _ in range(2):
            after_update(schedule)


def test_an_error_of_a_function_of_ones_own_is_told_as_it_is() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.sqrt(0.5 - step))
    with pytest.raises(ValueError, match=r"^math domain error$"):
        after_update(schedule)
