"""What a round shows never ends the run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.loop.round_log import write_round


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([torch.nan, 1.0, torch.inf]),
        torch.tensor([torch.nan, -torch.inf]),
        torch.tensor([1e38, -1e38]),
        torch.tensor([1e300, 1e-300, 0.0], dtype=torch.float64),
        torch.tensor([]),
        torch.tensor([1.0, 2.0]).bfloat16(),
        torch.ones(2, requires_grad=True),
    ],
)
def test_any_values_have_a_histogram(values: Tensor, tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        write_round(writer, {"reward": 0.0}, {"samples": 1, "reward_calls": 1}, {"r": values}, 0)
