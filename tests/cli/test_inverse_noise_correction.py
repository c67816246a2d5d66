"""Inverse noise correction through the command line: all commands, resuming, two processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_rlft.cli import main
from tests.support import (
    TWO_FORKS,
    TWO_PROCESSES,
    arguments,
    assert_close_in_rounding,
    assert_equal,
    checkpoint,
    report,
    scalars,
    script,
)

ALGORITHM = "configs/algorithms/inverse_noise_correction.yaml"
GAUSSIAN = "configs/domains/gaussian_mixture.yaml"
LAST = "runs/run/checkpoints/last.ckpt"
# Two rounds of 8 rows, each 2 updates in each of 2 passes; four shards.
TINY = {
    "pipeline.init_args.schedule": "rectified_flow",
    "pipeline.init_args.prediction_type": "velocity",
    "data.init_args.num_train": 16,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 4,
    "data.init_args.batch_size": 8,
    "model.init_args.num_eval_samples": 2,
    "model.init_args.num_epochs": 2,
    "model.init_args.minibatch_size": 4,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.corrector_steps": 2,
    "model.init_args.width": 8,
    "model.init_args.shard_size": 4,
    "model.init_args.optimizer.init_args.lr": 0.01,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(stage: str, *settings: dict[str, Any]) -> list[str]:
    return arguments(stage, (GAUSSIAN, ALGORITHM), *settings)


def command(stage: str, name: str = "run", settings: dict[str, Any] | None = None) -> None:
    main(words(stage, TINY, {"name": name}, settings or {}))


def noise(name: str) -> dict[str, torch.Tensor]:
    """Return the inverted noise of every shard of a run."""
    paths = Path(f"runs/{name}/inverted_noise").glob("*.npy")
    return {path.name: torch.from_numpy(np.load(path)) for path in paths}


def noise_files(name: str) -> dict[str, bytes]:
    folder = Path(f"runs/{name}/inverted_noise")
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_all_commands() -> None:
    command("fit")
    for stage in ("validate", "test", "predict"):
        command(stage, settings={"ckpt_path": LAST})
    metrics = report()
    assert metrics["algorithm"] == "InverseNoiseCorrection" and metrics["num_samples"] == 8
    assert metrics["gain"]["Coordinate"]["mean"] != 0
    assert metrics["tuned"]["kl"] == {"mean": None, "sem": None}
    cost = metrics["cost"]
    assert cost["test_denoiser_calls"] == 2 * 8 * 3
    invert = cost["phases"]["train"]["invert"]
    assert invert["denoiser_calls"] >= 16 * 3 * 2
    assert cost["denoiser_calls"] == invert["denoiser_calls"] and cost["reward_calls"] == 0
    assert cost["flops_per_sample"]["tuned"] > cost["flops_per_sample"]["reference"] > 0
    assert cost["seconds"] > invert["seconds"] > 0 and cost["peak_memory_bytes"] > 1e6
    lines = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
    mean = sum(line["rewards"]["Coordinate"] for line in lines) / len(lines)
    assert mean == pytest.approx(metrics["tuned"]["Coordinate"]["mean"], abs=1e-6)
    assert len(noise_files("run")) == 4
    values = scalars()
    assert len(values["train/loss"]) == 2 and len(values["train/noise_power"]) == 2
    assert values["inversion/residual"][0] <= 1e-5 and values["inversion/iterations"][0] > 1
    assert values["inversion/unconverged"] == [0]
    assert {"time/collect", "time/update", "cost/flops"} <= set(values)


def test_a_run_resumes_bit_by_bit_and_inverts_once() -> None:
    command("fit", "whole", {"trainer.max_epochs": 3})
    command("fit", settings={"trainer.max_epochs": 1})
    spent = checkpoint()["lit_rlft"]["cost"]["denoiser_calls"]
    command("fit", settings={"trainer.max_epochs": 3, "ckpt_path": LAST})
    whole, resumed = checkpoint("whole"), checkpoint()
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key])
    assert noise_files("run") == noise_files("whole")
    assert resumed["lit_rlft"]["cost"]["denoiser_calls"] == spent


def test_two_processes_learn_what_one_learns() -> None:
    settings = {"trainer.limit_val_batches": 0}
    command("fit", "one", settings)
    command("fit", "two", {**settings, **TWO_FORKS})
    one, two = checkpoint("one"), checkpoint("two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    # Each process inverts shards of its own, of the same rows.
    assert_close_in_rounding(noise("two"), noise("one"))
    assert two["lit_rlft"]["num_samples"] == one["lit_rlft"]["num_samples"] == 16


@pytest.mark.slow  # test_inverted_noise.py fills the disk of one process
def test_two_processes_stop_together_when_the_disk_is_full_and_go_on() -> None:
    folder = Path("runs/two/inverted_noise")
    folder.mkdir(parents=True)
    (folder / "00003.x_1.npy.partial").symlink_to("/dev/full")  # the second process's shard
    with pytest.raises(AssertionError, match=r"disk is full after 1 of 4 shards"):
        script(*words("fit", TINY, {"name": "two"}, TWO_PROCESSES))
    kept = {name for name in noise_files("two")}
    assert kept == {f"0000{i}.x_1.npy" for i in range(3)}
    script(*words("fit", TINY, {"name": "two"}, TWO_PROCESSES))
    assert len(noise_files("two")) == 4
    test = {"name": "two", "ckpt_path": "runs/two/checkpoints/last.ckpt"}
    script(*words("test", TINY, test, TWO_PROCESSES))
    assert report("runs/two")["num_samples"] == 8


def test_another_number_of_base_steps_is_refused_and_can_be_forced() -> None:
    command("fit")
    other = {"ckpt_path": LAST, "model.init_args.sampler.num_steps": 4}
    with pytest.raises(
        SystemExit, match=r"corrector for 3 base steps, not 4; set model\.init_args"
    ):
        command("test", settings=other)
    command("test", settings={**other, "model.init_args.force_num_steps": True})
    assert report()["cost"]["test_denoiser_calls"] == 2 * 8 * 4


def test_a_corrector_of_the_domains_own_kind_is_given_by_its_class() -> None:
    pipeline = "domains.gaussian_mixture.pipeline.GaussianMixturePipeline"
    corrector = {
        "model.init_args.corrector": {
            "class_path": pipeline,
            "init_args": {
                "weights": [1.0],
                "means": [[0.0, 0.0]],
                "stds": [1.0],
                "schedule": "rectified_flow",
                "prediction_type": "velocity",
                "residual_width": 8,
            },
        }
    }
    command("fit", settings=corrector)
    command("test", settings={**corrector, "ckpt_path": LAST})
    assert all(key.startswith("corrector.denoiser.") for key in checkpoint()["state_dict"])
    assert Path("runs/run/tuned/mixture.json").is_file()
