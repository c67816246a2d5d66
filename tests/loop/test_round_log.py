"""What a round shows never ends the run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.loop.round_log import write_round
from tests.test_distributed import processes


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


def test_histograms_are_of_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = [torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0]), torch.tensor([])]
    shown: list[Tensor] = []
    monkeypatch.setattr(
        SummaryWriter, "add_histogram", lambda self, name, values, step: shown.append(values)
    )

    def work(rank: int) -> None:
        writer = SummaryWriter(tmp_path) if rank == 0 else None
        write_round(writer, {}, {}, {"r": parts[rank]}, 0, 3)
        if writer is not None:
            writer.close()

    assert processes(monkeypatch, 3, work) == [None] * 3
    (values,) = shown
    assert values.tolist() == [1.0, 2.0, 3.0]
