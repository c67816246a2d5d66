"""Every published reward with three algorithms on tiny models of all families, by its name."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from lit_rlft.cli import main
from tests.conftest import TOKENIZER
from tests.domains.text_to_image.families.tiny import tiny
from tests.domains.text_to_image.rewards.published import all_weights
from tests.support import scalars

FAMILIES = {"sd15": "sd", "sd2": "sd2", "sdxl": "sdxl", "sd35": "sd3"}
FAMILIES |= {"flux": "flux_dev", "flux2_klein": "klein", "zimage": "zimage", "sana": "sana"}
ALGORITHMS: Mapping[str, list[str]] = {
    "drtune": ["--model.method.k=1", "--model.method.m=1"],
    "p_graft": ["--model.num_candidates=2"],
    "grpo": ["--model.num_candidates=2"],
}
REWARDS: Mapping[str, Callable[[Path], dict[str, object]]] = {
    "CLIPScore": lambda models: {"pretrained": models / "clip"},
    "PickScore": lambda models: {"pretrained": models / "clip", "processor": "null"},
    "HPSv2": lambda models: {"pretrained": models, "tokenizer": TOKENIZER},
    "ImageReward": lambda m: {"pretrained": m / "ImageReward.pt", "tokenizer": TOKENIZER},
    "LAIONAesthetic": lambda m: {"head": m / "head.pth", "clip": m / "clip"},
    "VQAScore": lambda models: {"pretrained": models / "llava", "dtype": "float32"},
    "VQAScore of Qwen2-VL": lambda models: {"pretrained": models / "qwen", "dtype": "float32"},
    "FunctionReward": lambda models: {"function": "tests.cli.test_published_rewards.redness"},
}
DIFFERENTIABLE = set(REWARDS) - {"FunctionReward"}
RUNS = [("sd15", reward, algorithm) for reward in REWARDS for algorithm in ALGORITHMS]
RUNS += [(f, "PickScore", algorithm) for f in FAMILIES if f != "sd15" for algorithm in ALGORITHMS]


def redness(pictures: list, prompts: list[str]) -> list[float]:
    return [picture.resize((1, 1)).getpixel((0, 0))[0] / 255 for picture in pictures]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny weights of all rewards."""
    return all_weights(tmp_path_factory.mktemp("models"))


def words(family: str, reward: str, algorithm: str, models: Path) -> list[str]:
    folder = models / FAMILIES[family]
    if not folder.exists():
        tiny(FAMILIES[family]).save_pretrained(folder)
    given = REWARDS[reward](models)
    return [
        *(f"--config={family}", f"--config={algorithm}", f"--reward={reward.split()[0]}"),
        *(f"--reward.{key}={value}" for key, value in given.items()),
        *(f"--pipeline.pretrained={folder}", "--pipeline.height=32", "--pipeline.width=32"),
        *("--pipeline.frozen_dtype=float32", "--data.source=prompts.txt", "--data.batch_size=2"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_train_batches=1"),
        *("--trainer.limit_val_batches=0", "--model.sampler.num_steps=3", "--name=run"),
        *ALGORITHMS[algorithm],
    ]


@pytest.mark.slow  # test_recipes.py has a quick one
@pytest.mark.parametrize(("family", "reward", "algorithm"), RUNS)
def test_a_run_takes_one_word(
    family: str,
    reward: str,
    algorithm: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"a red ring, number {i}\n" for i in range(20)))
    given = words(family, reward, algorithm, models)
    if algorithm == "drtune" and reward not in DIFFERENTIABLE:
        refused = r"redness has no gradient; give --reward one of .*, or take --config p_graft$"
        with pytest.raises(SystemExit, match=refused):
            main(["fit", *given])
        return
    main(["fit", *given])
    trained = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)
    assert trained["lit_rlft"]["num_updates"] > 0
    assert all(value.isfinite().all() for value in trained["state_dict"].values())
    (norm,) = scalars("run")["train/grad_norm"]
    assert norm > 0
