"""What a round shows never ends the run."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.loop.round_log import RoundLog
from tests.test_distributed import processes


def trainer(*monitors: str, world_size: int = 1) -> Any:
    stopping = [EarlyStopping(monitor) for monitor in monitors]
    return SimpleNamespace(early_stopping_callbacks=stopping, world_size=world_size)


def unheard(name: str, value: float, **settings: bool) -> None:
    """Log nothing."""


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
        spent = {"samples": 1, "reward_calls": 1}
        RoundLog(unheard, trainer()).write(writer, {"reward": 0.0}, spent, {"r": values}, 0)


def test_histograms_are_of_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = [torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0]), torch.tensor([])]
    shown: list[Tensor] = []
    monkeypatch.setattr(
        SummaryWriter, "add_histogram", lambda self, name, values, step: shown.append(values)
    )

    def work(rank: int) -> None:
        writer = SummaryWriter(tmp_path) if rank == 0 else None
        RoundLog(unheard, trainer(world_size=3)).write(writer, {}, {}, {"r": parts[rank]}, 0)
        if writer is not None:
            writer.close()

    assert processes(monkeypatch, 3, work) == [None] * 3
    (values,) = shown
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_a_number_that_a_round_lacks_is_not_told_again() -> None:
    logged: list[dict[str, float]] = []

    def log(name: str, value: float, **settings: bool) -> None:
        logged[-1][name] = value

    rounds = RoundLog(log, trainer("train/grad_norm"))
    for means in ({"acceptance_rate": 0.0}, {"loss": 1.0, "grad_norm": 2.0}, {"reward": 3.0}):
        logged.append({})
        rounds.write(None, means, {}, {}, 0)
    first, second, third = logged
    assert first == {"train/acceptance_rate": 0.0}
    assert second.keys() == {"train/loss", "train/grad_norm", "train/acceptance_rate"}
    assert math.isnan(second["train/acceptance_rate"])
    # NaN would end the fit where early stopping monitors it.
    assert third.keys() == {"train/reward", "train/loss", "train/acceptance_rate"}
    assert math.isnan(third["train/loss"]) and third["train/reward"] == 3.0
