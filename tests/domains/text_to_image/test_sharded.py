"""FSDP2 on U-Nets and transformers that make pictures: the weights of DDP, and exact resumes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from tests.domains.text_to_image.families.tiny import tiny
from tests.sharding_support import FORKED
from tests.support import (
    arguments,
    assert_equal,
    checkpoint,
    scalars,
    working_directory,
    write_picture_domain,
)

pytestmark = pytest.mark.slow
FAMILIES = ("sd", "sd3")
RUNS = ("ddp", "fsdp2")
WHOLE: dict[str, Any] = {"model.init_args.lora": None}
TINY: dict[str, Any] = {
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.num_candidates": 2,
    "model.init_args.num_epochs": 1,
    "model.init_args.minibatch_size": 4,
    "model.init_args.microbatch_size": 2,
    "model.init_args.num_eval_samples": 1,
    # Steps of Adam are as large where gradients are nothing but rounding.
    "model.init_args.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "trainer.accelerator": "cpu",
    "trainer.devices": 2,
    "trainer.precision": "32-true",
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "trainer.max_epochs": 1,
    "self_check.reward_probes": False,
}
OWN: dict[str, dict[str, Any]] = {
    "p_graft": {"model.init_args.cut": 0.5},
    "ddpo": {"model.init_args.kl_coef": 0.1},
    "nft": {"model.init_args.decay_rate": 0.4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny(family).save_pretrained(made[family])
    return made


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    words = ("red", "blue", "grey", "green", "white", "black")
    with working_directory(tmp_path):
        Path("prompts.txt").write_text("\n".join(f"a {word} ring" for word in words))
        yield


def fit(folder: Path, algorithm: str, name: str, strategy: str, *settings: dict[str, Any]) -> None:
    sizes = {"batch_size": 2, "num_val_prompts": 1, "num_test_prompts": 1}
    domain = write_picture_domain(Path("domain.yaml"), folder, "prompts.txt", **sizes)
    configs = (domain, f"configs/algorithms/{algorithm}.yaml")
    picture = {"pipeline.init_args.height": 32, "pipeline.init_args.width": 32}
    own = {"trainer.strategy": strategy, "name": name}
    main(arguments("fit", configs, TINY, picture, OWN[algorithm], own, *settings))


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("algorithm", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2_trains_like_ddp(
    folders: dict[str, Path], family: str, algorithm: str, lora: bool
) -> None:
    settings = {} if lora else WHOLE
    fit(folders[family], algorithm, "ddp", "ddp_fork", settings)
    fit(folders[family], algorithm, "fsdp2", FORKED, settings)
    ddp, fsdp2 = checkpoint("ddp"), checkpoint("fsdp2")
    assert ddp["state_dict"].keys() == fsdp2["state_dict"].keys()
    for name, value in ddp["state_dict"].items():
        torch.testing.assert_close(fsdp2["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    counts = [held["lit_rlft"]["cost"]["denoiser_calls"] for held in (fsdp2, ddp)]
    assert counts[0] == counts[1] and fsdp2["lit_rlft"]["num_updates"] > 0
    assert min(scalars("ddp")["train/grad_norm"]) > 0
    written = [sorted(path.name for path in Path(f"runs/{run}/tuned").rglob("*")) for run in RUNS]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("family", "algorithm", "lora"), [("sd", "ddpo", True), ("sd3", "p_graft", False)]
)
def test_a_resumed_run_is_the_one_that_never_stopped(
    folders: dict[str, Path], family: str, algorithm: str, lora: bool
) -> None:
    settings, more = {} if lora else WHOLE, {"trainer.max_epochs": 2}
    fit(folders[family], algorithm, "whole", FORKED, settings, more)
    fit(folders[family], algorithm, "parts", FORKED, settings)
    last = {"ckpt_path": "runs/parts/checkpoints/last.ckpt"}
    fit(folders[family], algorithm, "parts", FORKED, settings, more, last)
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert whole["global_step"] == parts["global_step"]
    for key in ("state_dict", "optimizer_states"):
        assert_equal(parts[key], whole[key])
