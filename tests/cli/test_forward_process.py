"""Algorithms that regress predictions, through the command line: resume, precision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_rlft.cli import main
from tests.cli.test_runs import GAUSSIAN, TINY
from tests.support import arguments, assert_equal, checkpoint, report, working_directory

LAST = "runs/run/checkpoints/last.ckpt"
SHORT = {"model.init_args.num_candidates": 4, "model.init_args.num_epochs": 1}
# The policy that samples lags behind from the second round on.
OWN = {"nft": {"model.init_args.decay_rate": 0.4}, "dpo": {"model.init_args.beta": 5.0}}
OWN["adjoint_matching"] = {"model.init_args.loss_quantile": 0.9}
NAMES = {"nft": "DiffusionNFT", "dpo": "DiffusionDPO", "adjoint_matching": "AdjointMatching"}
SLOW = {"adjoint_matching"}  # its checkpoint holds nothing of its own
each = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else []) for m in OWN]
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


def command(stage: str, method: str, name: str, settings: dict[str, Any]) -> None:
    configs = (GAUSSIAN[0], f"configs/algorithms/{method}.yaml")
    main(arguments(stage, configs, TINY, SHORT, OWN[method], {"name": name}, settings))


@each
def test_a_run_resumes_bit_by_bit(method: str) -> None:
    """DiffusionNFT's with the policy that samples."""
    command("fit", method, "whole", {"trainer.max_epochs": 3})
    command("fit", method, "run", {"trainer.max_epochs": 2})
    command("fit", method, "run", {"trainer.max_epochs": 3, "ckpt_path": LAST})
    whole, resumed = checkpoint("whole"), checkpoint("run")
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key])
    if method == "nft":
        lagging = resumed["lit_rlft"]["old_policy"]
        assert_equal(lagging, whole["lit_rlft"]["old_policy"])
        trained = list(resumed["state_dict"].values())
        assert any((a != b).any() for a, b in zip(lagging.values(), trained, strict=True))
    command("test", method, "run", {"ckpt_path": LAST})
    metrics = report()
    assert metrics["algorithm"] == NAMES[method]
    assert metrics["gain"]["Coordinate"]["mean"] != 0


@pytest.mark.slow
@each
def test_bfloat16(method: str) -> None:
    command("fit", method, "run", {"trainer.precision": "bf16-mixed"})
    assert checkpoint("run")["lit_rlft"]["num_updates"] > 0
