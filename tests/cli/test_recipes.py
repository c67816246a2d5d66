"""The recipes for models of the hub, each for one tiny round on tiny random models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lit_rlft
from lit_rlft.cli import main
from tests.conftest import TOKENIZER
from tests.domains.text_to_image.families.tiny import tiny
from tests.domains.text_to_image.rewards.published import (
    all_weights,
)

EXPERIMENTS = Path(lit_rlft.__file__).parents[1] / "configs/experiments"
RECIPES = {
    "sdxl_drtune_hpsv2": "sdxl",
    "flux_drtune_hpsv2": "flux_dev",
    "sd2_p_graft_vqascore": "sd",
    "sd2_graft_vqascore": "sd",
    "sd15_ddpo_aesthetic": "sd",
    "sd15_ddpo_compressibility": "sd",
    "sd35m_grpo_pickscore": "sd3",
    "sd35m_flow_grpo_fast_pickscore": "sd3",
    "sd35m_graft_pickscore": "sd3",
    "sd35m_grpo_ocr": "sd3",
    "sd35m_nft_pickscore": "sd3",
    "sd35m_nft_ocr": "sd3",
    "sd35m_nft_multi_reward": "sd3",
    "sd15_noise_ppo_pickscore": "sd",
}
"""The tiny models that stand in for those of the recipes."""
DEFAULT = {"sd15_noise_ppo_pickscore"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds all tiny models."""
    return all_weights(tmp_path_factory.mktemp("models"))


def weights(models: Path) -> dict[str, dict[str, Any]]:
    """Return where the tiny weights of each reward are."""
    clip = str(models / "clip")
    return {
        "CLIPScore": {"pretrained": clip},
        "PickScore": {"pretrained": clip, "processor": clip, "dtype": "float32"},
        "HPSv2": {
            "pretrained": str(models / "HPS_v2.1_compressed.pt"),
            "tokenizer": str(TOKENIZER),
            "dtype": "float32",
        },
        "ImageReward": {
            "pretrained": str(models / "ImageReward.pt"),
            "tokenizer": str(TOKENIZER),
            "dtype": "float32",
        },
        "LAIONAesthetic": {"head": str(models / "head.pth"), "clip": clip},
        "VQAScore": {"pretrained": str(models / "llava"), "dtype": "float32"},
        "JPEGCompressibility": {},
        "OCRAccuracy": {"engine": f"{__name__}.read"},
        "Diversity": {},
    }


def read(pixels: np.ndarray) -> list[str]:
    """Read more or less of a word, as the picture's brightness has it."""
    return ["ring"[: int(pixels.mean()) % 5]]


def class_name(part: Mapping[str, Any]) -> str:
    return part["class_path"].rpartition(".")[2]


def judges(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rewards of a recipe, each part of a combined one, and its metrics."""
    parts = recipe["reward"].get("init_args", {}).get("rewards", {"reward": recipe["reward"]})
    return [*parts.values(), *recipe["metrics"]["parts"]]


def small(recipe: dict[str, Any], family: str, models: Path) -> dict[str, Any]:
    """Return a recipe for tiny models, two prompts and few steps; all else is the recipe's."""
    if not (models / family).exists():
        tiny(family).save_pretrained(models / family)
    size = {"height": 32, "width": 32, "frozen_dtype": "float32"}
    recipe["pipeline"]["init_args"] |= {"pretrained": str(models / family), **size}
    for part in judges(recipe):
        part["init_args"] = part.get("init_args", {}) | weights(models)[class_name(part)]
    sources = [key for key in recipe["data"]["init_args"] if key.endswith("source")]
    recipe["data"]["init_args"] |= dict.fromkeys(sources, "prompts.txt")
    recipe["data"]["init_args"] |= {"batch_size": 2, "eval_batch_size": 2, "num_val_prompts": 2}
    steps = 12 if class_name(recipe["model"]) == "RewardGradient" else 3
    recipe["model"]["init_args"]["sampler"]["num_steps"] = steps
    recipe["model"]["init_args"]["num_eval_samples"] = 1
    if "sliding" in recipe["model"]["init_args"]:
        recipe["model"]["init_args"]["sliding"]["size"] = 1
    limits = {f"limit_{stage}_batches": 1 for stage in ("train", "val", "test")}
    recipe["trainer"] |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **limits}
    recipe["trainer"].pop("val_check_interval", None)
    return recipe


def test_all_recipes_of_the_hub_are_here() -> None:
    hub = {"sd15", "sd2", "sd35m", "sdxl", "flux"}
    assert {path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem.split("_")[0] in hub} == (
        set(RECIPES)
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in RECIPES],
)
def test_recipes_train_and_test(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network is there, so what was loaded is what the tiny config names."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f'a red "ring", number {i}\n' for i in range(20)))
    recipe = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    Path("tiny.yaml").write_text(yaml.safe_dump(small(recipe, RECIPES[name], models)))
    words = ["--config=tiny.yaml", "--run_files.num_conditions=2", "--name=run"]
    main(["fit", *words])
    last = "runs/run/checkpoints/last.ckpt"
    trained = torch.load(last, weights_only=True)
    assert trained["lit_rlft"]["num_updates"] > 0
    assert trained["state_dict"] and all(v.isfinite().all() for v in trained["state_dict"].values())
    main(["test", *words, f"--ckpt_path={last}"])
    tuned = json.loads(Path("runs/run/metrics.json").read_text())["tuned"]
    names = {measured.lower().replace("_", "") for measured in tuned}
    for part in judges(recipe):
        assert any(class_name(part).lower() in name for name in names)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in RECIPES],
)
def test_every_key_of_a_recipe_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXPERIMENTS / f"{name}.yaml"
    with pytest.raises(SystemExit) as raised:
        main(["fit", f"--config={path}", "--print_config"])
    assert raised.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert_within(yaml.safe_load(path.read_text()), parsed, name)


def assert_within(given: Any, parsed: Any, key: str) -> None:
    """Assert that all of a config is in what was made of it, with the same values."""
    if isinstance(given, dict):
        for name, value in given.items():
            assert name in parsed, f"{key}.{name} is not used"
            if name == "class_path":
                assert parsed[name].endswith(value.rpartition(".")[2])
            else:
                assert_within(value, parsed[name], f"{key}.{name}")
    elif isinstance(given, list):
        assert len(given) == len(parsed)
        for i, (value, other) in enumerate(zip(given, parsed, strict=True)):
            assert_within(value, other, f"{key}.{i}")
    else:
        assert given == parsed, key
