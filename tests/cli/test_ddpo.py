"""DDPO and its family through the command line: resume, processes, precision, mistakes."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.cli import main
from lit_rlft.core.pipeline import Condition
from tests.cli.test_runs import GAUSSIAN, TINY
from tests.support import (
    TWO_FORKS,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    weights,
    working_directory,
)

METHODS = ("ddpo", "ddpo_sf", "dpok", "grpo", "flow_grpo", "mix_grpo", "grpo_guard")
METHODS += ("flow_grpo_fast",)
# Between them they have both estimators, the divergence and both kinds of advantages.
TERMS = ("ddpo_sf", "grpo")
NAMES = {"flow_grpo": "Flow-GRPO", "mix_grpo": "MixGRPO", "grpo_guard": "GRPO-Guard"}
NAMES |= {"flow_grpo_fast": "Flow-GRPO-Fast"}
BY_GROUP = ("grpo", *NAMES)
each_term = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in TERMS else pytest.mark.slow) for m in METHODS]
)
SHORT = {
    "model.init_args.num_candidates": 4,
    "model.init_args.minibatch_size": 16,
    "model.init_args.microbatch_size": 7,
}
ROUNDS = {"trainer.max_epochs": 2}
EPOCHS: dict[str, dict[str, Any]] = {
    method: {} if method == "ddpo_sf" else {"model.init_args.num_epochs": 2} for method in METHODS
}
# The window moves in the first run's second round, and once more in the resumed run.
EPOCHS["mix_grpo"] |= {
    "model.init_args.sliding.size": 2,
    "model.init_args.sliding.interval": 1,
    "model.init_args.sampler.num_steps": 6,
}
EPOCHS["flow_grpo_fast"] |= {"model.init_args.sampler.num_steps": 6}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    with working_directory(tmp_path):
        yield


def command(stage: str, method: str, name: str, settings: dict[str, Any]) -> list[str]:
    configs = (GAUSSIAN[0], f"configs/algorithms/{method}.yaml")
    once = {"model.init_args.num_epochs": 1}
    return arguments(stage, configs, TINY, once, SHORT, EPOCHS[method], {"name": name}, settings)


def fit(method: str, name: str, settings: dict[str, Any] | None = None) -> None:
    main(command("fit", method, name, settings or {}))


@each_term
def test_a_run_logs_and_resumes_bit_by_bit(method: str) -> None:
    """With its statistics, optimiser and weights; and it goes on training them."""
    fit(method, "whole", ROUNDS)
    assert_logged(method, scalars("whole"))
    fit(method, "run", {"trainer.max_epochs": 1})
    before, last = weights("run"), "runs/run/checkpoints/last.ckpt"
    fit(method, "run", {**ROUNDS, "ckpt_path": last})
    whole, resumed = checkpoint("whole"), checkpoint("run")
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key])
    assert_equal(resumed["lit_rlft"]["advantage"], whole["lit_rlft"]["advantage"])
    assert bool(resumed["lit_rlft"]["advantage"]) == (method not in BY_GROUP)
    assert all((resumed["state_dict"][key] != before[key]).any() for key in before)
    main(command("test", method, "run", {"ckpt_path": last}))
    metrics = report()
    assert metrics["gain"]["Coordinate"]["mean"] != 0
    assert metrics["algorithm"] == NAMES.get(method, method.upper().replace("_", "-"))


def test_statistics_matter_to_a_resumed_run() -> None:
    """A large buffer remembers the first rounds: without them the next ones would differ."""
    large = {"model.init_args.advantage.init_args.buffer_size": 1000}
    fit("ddpo", "run", large)
    assert checkpoint("run")["lit_rlft"]["advantage"]["counts"].tolist() == [2 * 8 * 4]
    fit("ddpo", "whole", {**large, **ROUNDS})
    shutil.copy("runs/run/checkpoints/last.ckpt", "runs/whole/checkpoints/first.ckpt")
    last = "runs/run/checkpoints/last.ckpt"
    fit("ddpo", "run", {**large, **ROUNDS, "ckpt_path": last})
    assert_equal(weights("run"), weights("whole"))
    assert checkpoint("run")["lit_rlft"]["advantage"]["counts"].tolist() == [4 * 8 * 4]
    without = checkpoint("whole", "first.ckpt")
    del without["lit_rlft"]["advantage"]
    torch.save(without, "without.ckpt")
    fit("ddpo", "other", {**large, **ROUNDS, "ckpt_path": "without.ckpt"})
    other, whole = weights("other"), weights("whole")
    assert any((other[key] != whole[key]).any() for key in whole)


@pytest.mark.parametrize(
    "method",
    ["ddpo", *(pytest.param(name, marks=pytest.mark.slow) for name in BY_GROUP)],
)
def test_two_processes_train_like_one(method: str) -> None:
    settings = {"trainer.limit_val_batches": 0, **ROUNDS}  # two minibatches a pass
    fit(method, "one", settings)
    fit(method, "two", {**settings, **TWO_FORKS})
    one, two = checkpoint("one"), checkpoint("two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert_close(two["state_dict"], one["state_dict"], rtol=1e-5, atol=1e-7)
    statistics = [found["lit_rlft"]["advantage"] for found in (one, two)]
    assert_close(statistics[1], statistics[0], rtol=0, atol=1e-6)
    logged = [scalars(name) for name in ("one", "two")]
    tags = ("reward", "loss", "ratio", "ratio_deviation_max", "advantage_std", "grad_norm")
    for tag in (f"train/{tag}" for tag in tags):
        assert logged[1][tag] == pytest.approx(logged[0][tag], abs=1e-5)


def assert_logged(method: str, logged: dict[str, list[float]]) -> None:
    """Check the values of a run of two rounds of two updates."""
    names = ["reward", "ratio", "ratio_deviation", "ratio_deviation_max", "clip_fraction"]
    names += ["approx_kl", "advantage_std", "zero_variance_groups", "failed_rewards", "loss"]
    names += [
        "first_ratio_deviation_max",
        *(["reference_kl"] if method in ("dpok", "grpo", "flow_grpo") else []),
    ]
    for name in names:
        values = logged[f"train/{name}"]
        assert len(values) == 4 and all(map(math.isfinite, values)), name
    assert max(logged["train/first_ratio_deviation_max"]) < 1e-6
    assert min(logged["train/ratio_deviation_max"]) > 1e-5
    for most, mean in zip(
        logged["train/ratio_deviation_max"], logged["train/ratio_deviation"], strict=True
    ):
        assert most > mean > 0


@each_term
def test_mixed_precision(method: str) -> None:
    half = {"trainer.precision": "bf16-mixed", "model.init_args.state_dtype": "bfloat16"}
    fit(method, "run", half)
    trained = weights("run")
    assert all(value.isfinite().all() for value in trained.values())
    assert any(value.any() for key, value in trained.items() if "lora_B" in key)
    assert max(scalars("run")["train/first_ratio_deviation_max"]) < 1e-4


def test_a_diffusion_model(tiny_stable_diffusion: Callable[..., Path]) -> None:
    """On a window of a guided model, resumed; its LoRA moves on and is written for diffusers."""
    Path("prompts.txt").write_text("\n".join(f"a {word} ring" for word in ("red", "blue", "green")))
    domain = {
        "pipeline": {
            "class_path": "domains.text_to_image.pipeline.TextToImagePipeline",
            "init_args": {"pretrained": str(tiny_stable_diffusion()), "guidance_scale": 3.0},
        },
        "reward": {"class_path": "domains.text_to_image.rewards.Symmetry"},
        "data": {
            "class_path": "domains.text_to_image.data.PromptData",
            "init_args": {"source": "prompts.txt", "batch_size": 1},
        },
    }
    Path("domain.yaml").write_text(yaml.safe_dump(domain))
    settings = {key: value for key, value in TINY.items() if not key.startswith("data.")}
    settings |= {**SHORT, "model.init_args.window": [0, 2], "trainer.limit_val_batches": 0}
    # Chunks of one step with all four samples: the sampler's batch shape.
    settings |= {"model.init_args.microbatch_size": 4, "name": "run"}
    configs = ("domain.yaml", "configs/algorithms/grpo.yaml")
    main(arguments("fit", configs, settings))
    before, last = weights("run"), "runs/run/checkpoints/last.ckpt"
    main(arguments("fit", configs, settings, {**ROUNDS, "ckpt_path": last}))
    after = weights("run")
    assert any((after[key] != before[key]).any() for key in before)
    assert list(Path("runs/run/tuned").glob("*.safetensors"))
    assert max(scalars("run")["train/first_ratio_deviation_max"]) == 0


REWARDS = """
import torch
from lit_rlft.core.reward import Reward

class Failing(Reward):
    def forward(self, samples, condition):
        return torch.full((len(condition),), float("nan"))

class Sometimes(Reward):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, samples, condition):
        self.calls += 1
        return samples[:, 0].masked_fill(torch.arange(len(samples)) % 4 == 0, float("nan"))

class Whole(Reward):
    def forward(self, samples, condition):
        return (4 * samples[:, 0]).round().long()
"""

MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "eta": ("ddpo", {"model.init_args.sampler.eta": 0.0}, "sampler.eta must be above 0"),
    "group": ("grpo", {"model.init_args.num_candidates": 1}, "raise it to 2 or more"),
    "clip range": ("ddpo", {"model.init_args.clip_range": 0}, "clip_range must be positive"),
    "epochs": ("ddpo_sf", {"model.init_args.num_epochs": 2}, "set model.init_args.estimator"),
    "window": ("ddpo", {"model.init_args.window": [2, 9]}, "the sampler's num_steps"),
    "reward": ("ddpo", {"reward": "odd_rewards.Failing"}, "Failing failed for all 32 samples"),
}


@pytest.fixture
def odd_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_one_sentence(mistake: str, odd_rewards: None) -> None:
    method, settings, sentence = MISTAKES[mistake]
    with pytest.raises(SystemExit) as raised:
        fit(method, "run", settings)
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("lit-rlft: error: ")
    assert sentence in message and "\n" not in message
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("method", ["ddpo", "grpo"])
def test_failed_rewards_are_left_out(method: str, odd_rewards: None) -> None:
    # Without the validation, which is strict about rewards.
    fit(method, "run", {"reward": "odd_rewards.Sometimes", "trainer.limit_val_batches": 0})
    assert scalars("run")["train/failed_rewards"] == [0.25, 0.25]
    assert all(value.isfinite().all() for value in weights("run").values())


def test_integer_rewards_train(odd_rewards: None) -> None:
    fit("ddpo", "run", {"reward": "odd_rewards.Whole"})
    assert scalars("run")["train/advantage_std"][0] == pytest.approx(1, abs=0.5)
    assert any(value.any() for key, value in weights("run").items() if "lora_B" in key)


class OnceThenEqual(Coordinate):
    """A reward that tells samples apart in the first round alone."""

    rounds = 0

    def forward(self, samples: Any, condition: Condition) -> torch.Tensor:
        values = super().forward(samples, condition)
        type(self).rounds += 1
        return values if self.rounds == 1 else torch.zeros_like(values)


def test_a_round_without_a_winner_moves_nothing() -> None:
    """Momentum and weight decay would go on from the round before."""
    settings = ROUNDS | {
        "model.init_args.kl_coef": 0.0,
        "model.init_args.optimizer.init_args.weight_decay": 0.5,
        "reward": "tests.cli.test_ddpo.OnceThenEqual",
        "trainer.limit_val_batches": 0,
    }
    updates = []
    for name, length in (("short", 1), ("long", 3)):
        OnceThenEqual.rounds = 0
        main(command("fit", "grpo", name, settings | {"trainer.limit_train_batches": length}))
        updates.append(checkpoint(name)["lit_rlft"]["num_updates"])
    assert updates[0] == updates[1] > 0
    assert_equal(weights("short"), weights("long"))
