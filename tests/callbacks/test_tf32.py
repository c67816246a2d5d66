"""TF32 on GPUs: set before networks are, copied by side processes, set back at the end."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rlft.callbacks.tf32 import TF32
from lit_rlft.cli import main
from lit_rlft.loop.side.worker import _Settings
from tests.support import TINY_MIXTURE, arguments


def switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    matmul, convolutions = switches()
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def trainer_on(device: str) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


@pytest.mark.parametrize(
    ("device", "enabled", "expected"),
    [
        ("cuda", True, ("high", True)),
        ("cuda", False, ("highest", False)),
        ("cpu", True, ("highest", True)),
        ("cpu", False, ("highest", True)),
        ("mps", True, ("highest", True)),
    ],
)
def test_torchs_switches(device: str, enabled: bool, expected: tuple[str, bool]) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    callback, trainer, module = TF32(enabled), trainer_on(device), SimpleNamespace()
    callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")
    assert switches() == expected
    callback.teardown(trainer, module, "fit")
    callback.teardown(trainer, module, "fit")
    assert switches() == ("highest", True)


def test_a_side_process_takes_both_switches() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    sent = pickle.dumps(_Settings.here())
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    pickle.loads(sent).apply()
    assert switches() == ("high", False)


@pytest.mark.slow
def test_the_command_has_the_switch_and_leaves_a_cpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = switches()
    main(arguments("fit", ("gaussian_mixture", "p_graft"), TINY_MIXTURE, {"tf32.enabled": False}))
    assert "tf32:\n  enabled: false\n" in Path("runs/run/config.yaml").read_text()
    assert switches() == before
