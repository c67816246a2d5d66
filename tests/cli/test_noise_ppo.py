"""Noise PPO through the command line: four commands, resuming, two processes, bf16, mistakes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from lit_rlft.inference import NoiseGenerator
from tests.support import (
    TWO_FORKS,
    TWO_PROCESSES,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    write_picture_domain,
)

ALGORITHM = "configs/algorithms/noise_ppo.yaml"
GAUSSIAN = "configs/domains/gaussian_mixture.yaml"
LAST = "runs/run/checkpoints/last.ckpt"
# Two rounds of 4 conditions and 16 samples: each 2 updates in each of 2 passes.
TINY = {
    "data.init_args.num_train": 8,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 4,
    "data.init_args.batch_size": 4,
    "model.init_args.num_candidates": 4,
    "model.init_args.num_eval_samples": 2,
    "model.init_args.num_epochs": 2,
    "model.init_args.minibatch_size": 8,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.optimizer.init_args.lr": 0.01,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}
NO_SPLITS = {key: value for key, value in TINY.items() if not key.startswith("data.")}
RUNNING = {"model.init_args.advantage": "lit_rlft.core.advantage.RunningAdvantage"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(stage: str, *settings: dict[str, Any], domain: Any = GAUSSIAN) -> list[str]:
    return arguments(stage, (domain, ALGORITHM), *settings)


def command(stage: str, name: str = "run", settings: dict[str, Any] | None = None) -> None:
    main(words(stage, TINY, {"name": name}, settings or {}))


@pytest.fixture
def pictures(tiny_stable_diffusion: Callable[..., Path]) -> Path:
    """Return the domain config of a tiny diffusion model."""
    Path("prompts.txt").write_text("\n".join(f"a {c} ring" for c in ("red", "blue", "green")))
    splits = {"batch_size": 1, "num_test_prompts": 1, "num_val_prompts": 1}
    return write_picture_domain(
        Path("pictures.yaml"), tiny_stable_diffusion(), "prompts.txt", **splits
    )


def test_all_commands(tmp_path: Path) -> None:
    command("fit")
    for stage in ("validate", "test", "predict"):
        command(stage, settings={"ckpt_path": LAST})
    metrics = report()
    assert metrics["algorithm"] == "NoisePPO" and metrics["num_samples"] == 8
    assert metrics["gain"]["Coordinate"]["mean"] != 0
    assert metrics["tuned"]["kl"]["mean"] > 0 and metrics["tuned"]["kl"]["sem"] == 0
    # Two rounds of 16 samples, 3 steps each; training and the KL call no denoiser.
    assert metrics["cost"]["denoiser_calls"] == 2 * 16 * 3
    assert metrics["cost"]["test_denoiser_calls"] == 2 * 8 * 3
    lines = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
    mean = sum(line["rewards"]["Coordinate"] for line in lines) / len(lines)
    assert mean == pytest.approx(metrics["tuned"]["Coordinate"]["mean"], abs=1e-6)
    assert all(key.startswith("noise_policy.") for key in checkpoint()["state_dict"])
    assert sorted(path.name for path in Path("runs/run/tuned").iterdir()) == [
        "README.md",
        "lit_rlft.json",
        "noise_generator.safetensors",
    ]
    generator = NoiseGenerator.load("runs/run/tuned/noise_generator.safetensors")
    assert generator.notes == {"pipeline": "gaussian_mixture", "num_steps": 3}
    trained = {f"noise_policy.{key}": v for key, v in generator.policy.state_dict().items()}
    assert_equal(trained, checkpoint()["state_dict"])


def test_monitors_reach_tensorboard() -> None:
    command("fit")
    values = scalars()
    for tag in ("noise_power", "entropy", "kl", "ratio", "clip_fraction", "approx_kl"):
        assert len(values[f"train/{tag}"]) == 2, tag
        assert all(map(math.isfinite, values[f"train/{tag}"])), tag
    assert values["train/first_ratio_deviation_max"][0] == 0
    assert values["train/ratio_deviation_max"][0] > 0
    assert 0.5 < values["train/noise_power"][0] < 2
    assert values["train/entropy"][0] == pytest.approx(1.4189, abs=0.3)
    assert values["val/kl"][-1] > 0
    assert {"train/reward", "train/failed_rewards", "train/zero_variance_groups"} <= set(values)


@pytest.mark.parametrize("advantage", [{}, RUNNING], ids=["group", "running"])
def test_a_run_resumes_bit_by_bit(advantage: dict[str, Any]) -> None:
    command("fit", "whole", {"trainer.max_epochs": 3, **advantage})
    command("fit", settings={"trainer.max_epochs": 1, **advantage})
    command("fit", settings={"trainer.max_epochs": 3, "ckpt_path": LAST, **advantage})
    whole, resumed = checkpoint("whole"), checkpoint()
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key])
    for held in (whole, resumed):
        del held["lit_rlft"]["cost"]["seconds"]
    assert_equal(resumed["lit_rlft"].pop("advantage"), remembered := whole["lit_rlft"]["advantage"])
    del whole["lit_rlft"]["advantage"]
    assert resumed["lit_rlft"] == whole["lit_rlft"]
    assert bool(remembered) is bool(advantage)
    assert len(scalars()["train/reward"]) == 6


@pytest.mark.parametrize(
    "advantage",
    [
        pytest.param({}, id="group"),
        pytest.param(RUNNING, id="running", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(advantage: dict[str, Any]) -> None:
    # In double precision, for single sums differ by more than the bounds on some processors.
    settings = {"trainer.limit_val_batches": 0, "trainer.precision": "64-true", **advantage}
    command("fit", "one", settings)
    command("fit", "two", {**settings, **TWO_FORKS})
    one, two = checkpoint("one"), checkpoint("two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-5, atol=1e-7)
    assert two["lit_rlft"]["num_samples"] == one["lit_rlft"]["num_samples"] == 32
    remembered = [held["lit_rlft"]["advantage"] for held in (one, two)]
    torch.testing.assert_close(remembered[1], remembered[0], rtol=1e-5, atol=1e-6)
    for tag in ("reward", "kl", "loss"):
        assert scalars("two")[f"train/{tag}"] == pytest.approx(
            scalars("one")[f"train/{tag}"], abs=1e-5
        )


def test_a_diffusion_model_in_bf16(pictures: Path) -> None:
    half = {"trainer.precision": "bf16-mixed", "name": "run"}
    main(words("fit", NO_SPLITS, half, domain=pictures))
    assert all(value.isfinite().all() for value in checkpoint()["state_dict"].values())
    assert scalars()["train/first_ratio_deviation_max"][0] < 1e-4
    main(words("test", NO_SPLITS, half, {"ckpt_path": LAST}, domain=pictures))
    assert report()["gain"]["Symmetry"]["mean"] != 0


def test_the_control_ignores_the_prompts(pictures: Path) -> None:
    settings = {"name": "run", "model.init_args.condition_free": True}
    main(words("fit", NO_SPLITS, settings, domain=pictures))
    generator = NoiseGenerator.load("runs/run/tuned/noise_generator.safetensors")
    first, second = generator.policy(torch.randn(2, generator.policy.num_features)).loc
    assert torch.allclose(first, second, atol=1e-5) and bool(first.any())


@pytest.mark.slow
def test_a_policy_that_reads_tokens_resumes_bit_by_bit(pictures: Path) -> None:
    def fit(name: str, epochs: int, **settings: Any) -> None:
        own = {"name": name, "model.init_args.attention_heads": 2, "trainer.max_epochs": epochs}
        main(words("fit", NO_SPLITS, own, settings, domain=pictures))

    fit("whole", 2)
    fit("run", 1)
    fit("run", 2, ckpt_path=LAST)
    for key in ("state_dict", "optimizer_states"):
        assert_equal(checkpoint()[key], checkpoint("whole")[key])
    weight = checkpoint()["state_dict"]["noise_policy.attention.scores.weight"]
    assert weight.shape[0] == 2
    with pytest.raises(SystemExit, match="holds other trained weights"):
        main(words("test", NO_SPLITS, {"name": "run", "ckpt_path": LAST}, domain=pictures))


def test_untrained_it_is_the_reference() -> None:
    command("test")
    metrics = report()
    assert metrics["tuned"] == metrics["reference"]


MASKED = """
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.core.process import MaskedProcess

class Masked(GaussianMixturePipeline):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.process = MaskedProcess(3)
"""
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "eta": ({"model.init_args.sampler.eta": 1.0}, "model.init_args.sampler.eta must be 0"),
    "lora": ({"model.init_args.lora.rank": 4}, "model.init_args.lora must be null"),
    "group": ({"model.init_args.num_candidates": 1}, "a group of one has no peers"),
    "clip range": (
        {"model.init_args.clip_range": 0},
        "model.init_args.clip_range must be positive",
    ),
    "size": ({"model.init_args.maps.init_args.size": 0}, "maps.init_args.size must be at least 1"),
    "beta": ({"model.init_args.beta": -0.1}, "model.init_args.beta must be at least 0"),
    "masked": (
        {"pipeline": "masked_pipeline.Masked"},
        "NoisePPO learns a Gaussian prior, but Masked starts from that of a MaskedProcess",
    ),
    "reward": ({"reward": "failing_reward.Failing"}, "Failing failed for all 16 samples"),
    "processes": (
        {**TWO_PROCESSES, "data.init_args.batch_size": 3},
        "data.init_args.batch_size (3) is not divisible by the 2 processes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("masked_pipeline.py").write_text(MASKED)
    Path("failing_reward.py").write_text(
        "import torch\nfrom lit_rlft.core.reward import Reward\n\nclass Failing(Reward):\n"
        "    def forward(self, samples, condition):\n"
        "        return torch.full((len(samples),), float('nan'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings, sentence = MISTAKES[mistake]
    with pytest.raises(SystemExit) as raised:
        command("fit", settings=settings)
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("lit-rlft: error: ")
    assert sentence in message and "\n" not in message
    assert not list(Path().rglob("*.ckpt"))


def test_a_checkpoint_of_another_policy_is_refused() -> None:
    command("fit")
    with pytest.raises(SystemExit, match="holds other trained weights"):
        command("test", settings={"ckpt_path": LAST, "model.init_args.width": 8})
