"""The average of the trained weights, against its recursion by hand."""

from typing import Any

import pytest
import torch

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.ema import EMA
from tests.support import trainer_of


@pytest.mark.parametrize(
    ("decay", "wanted"),
    # After n batches the decay is (1 + n) / (10 + n) at most: 3 / 12, then 4 / 13.
    [(0.999, [1.0, 1.75, 4 / 13 * 1.75 + 9 / 13 * 4]), (0.2, [1.0, 1.8, 0.2 * 1.8 + 0.8 * 4])],
)
def test_the_average_by_hand(decay: float, wanted: list[float]) -> None:
    """Also by a callback that goes on from a checkpoint; evaluations see it, training does not."""
    tuner: Any = GRAFT(GaussianMixturePipeline(), Coordinate())
    tuner.setup("fit")
    ema, (weight, *_) = EMA(decay), tuner._trained().values()
    start, trainer = weight.detach().clone(), trainer_of()
    for i, moved in enumerate((1.0, 2.0, 4.0)):
        weight.data.copy_(start + moved)
        ema.on_train_batch_end(trainer, tuner, None, {}, i)
        ema.on_validation_start(trainer, tuner)
        torch.testing.assert_close(weight.detach(), start + wanted[i])
        ema.on_validation_end(trainer, tuner)
        assert torch.equal(weight.detach(), start + moved)
        state, ema = ema.state_dict(), EMA(decay)
        ema.load_state_dict(state)
    ema.on_fit_end(trainer, tuner)
    torch.testing.assert_close(weight.detach(), start + wanted[-1])
