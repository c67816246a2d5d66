"""Algorithms that regress predictions, by the command line: resume, precision, dial."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from lit_rlft.kit.preferences import preference_line
from tests.cli.test_runs import GAUSSIAN, TINY
from tests.support import arguments, assert_equal, checkpoint, report, scalars, working_directory

LAST = "runs/run/checkpoints/last.ckpt"
SHORT = {"model.init_args.num_candidates": 4, "model.init_args.num_epochs": 1}
# The policy that samples lags behind from the second round on.
OWN: dict[str, dict[str, Any]] = {
    "nft": {"model.init_args.decay_rate": 0.4},
    "dpo": {"model.init_args.beta": 5.0},
    "dpo_offline": {
        "model.init_args.beta": 5.0,
        "data": "PreferencePairs",
        "data.init_args.file": "votes.jsonl",
    },
    "rwr": {},
    "raft": {},
    "adjoint_matching": {"model.init_args.loss_quantile": 0.9},
}
NAMES = {"nft": "DiffusionNFT", "rwr": "RWR", "raft": "RAFT", "adjoint_matching": "AdjointMatching"}
SLOW = {"rwr", "raft", "adjoint_matching"}  # their checkpoints hold nothing of their own
each = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else []) for m in OWN]
)
DIAL = {"model.init_args.dial.lora_scale": [0.0, 0.5], "model.init_args.dial.cut": [0.3]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        write_votes(Path("votes.jsonl"), 20)
        yield


def write_votes(path: Path, num: int) -> None:
    """Write pairs of points, the one further to the right preferred."""
    points = torch.randn(num, 2, 2, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [sorted(own, reverse=True) for own in points]
    path.write_text("".join(preference_line({}, *pair) for pair in pairs))


def command(stage: str, method: str, name: str, settings: dict[str, Any]) -> None:
    configs = (GAUSSIAN[0], f"configs/algorithms/{method}.yaml")
    given = "data" in OWN[method]
    sizes = {
        key: value
        for key, value in TINY.items()
        if not (given and ".num_" in key and "data" in key)
    }
    main(arguments(stage, configs, sizes, SHORT, OWN[method], {"name": name}, settings))


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
    command("test", method, "run", {"ckpt_path": LAST, **DIAL})
    metrics = report()
    assert metrics["algorithm"] == NAMES.get(method, "DiffusionDPO")
    assert metrics["gain"]["Coordinate"]["mean"] != 0
    check_dial(metrics)
    if method == "dpo_offline":
        logged = scalars("whole")
        assert len(logged["val/implicit_accuracy"]) == 3
        assert metrics["cost"]["reward_calls"] == 0 and logged["cost/samples"][-1] == 2 * 48


def check_dial(metrics: dict[str, Any]) -> None:
    """At 0 the LoRA is the reference; each setting has a line in dial.csv and its tags."""
    reward = {row["setting"] + f" {row['value']:g}": row["metrics"] for row in metrics["dial"]}
    assert list(reward) == ["lora_scale 0", "lora_scale 0.5", "cut 0.3"]
    mean = {name: row["Coordinate"]["mean"] for name, row in reward.items()}
    assert mean["lora_scale 0"] == metrics["reference"]["Coordinate"]["mean"]
    assert len(set(mean.values()) | {metrics["tuned"]["Coordinate"]["mean"]}) == 4
    assert reward["lora_scale 0.5"]["kl"]["mean"] < metrics["tuned"]["kl"]["mean"]
    lines = Path("runs/run/dial.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["reference", "tuned"] and len(lines) == 6
    assert scalars()["dial/cut/Coordinate"] == [pytest.approx(mean["cut 0.3"])]
    assert set(metrics) >= {"reference", "tuned", "gain"} and "cut=0.3" not in metrics


@pytest.mark.slow
@each
def test_bfloat16(method: str) -> None:
    command("fit", method, "run", {"trainer.precision": "bf16-mixed"})
    assert checkpoint("run")["lit_rlft"]["num_updates"] > 0
