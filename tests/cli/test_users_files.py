"""Classes and configs of the user's own, as the installed script meets them."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from lit_rlft.cli.names import with_class_paths
from tests.support import ROOT, SCRIPT

DARKNESS = """
from lit_rlft import Reward


class Left(Reward):
    differentiable = True

    def forward(self, samples, condition):
        return -samples[:, 0]
"""
TINY = [
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=0",
    "--data.num_train=16",
    "--data.batch_size=8",
    "--model.sampler.num_steps=2",
]


def test_a_reward_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(DARKNESS)
    words = ["fit", "--config", "gaussian_mixture", "--config", "p_graft", "--name", "left"]
    command = [str(SCRIPT), *words, "--reward", "my_rewards.Left", *TINY]
    # The checkout's own modules are on the path of its script; the working directory is not.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs/left/checkpoints/last.ckpt").is_file()


def written(path: Path, text: str) -> dict[str, object]:
    """Return the config that the parser gets in place of a file's."""
    path.write_text(text)
    (_, flag) = with_class_paths(["fit", f"--config={path}"])
    text = flag.removeprefix("--config=")
    return yaml.safe_load(Path(text).read_text() if "\n" not in text else text)


def test_aliases_keep_their_anchors(tmp_path: Path) -> None:
    config = written(
        tmp_path / "a.yaml",
        "reward: &r {class_path: CLIPScore}\nmetrics: {parts: [*r, {class_path: CLIPScore}]}\n",
    )
    first, second = config["metrics"]["parts"]  # type: ignore[index]
    assert first == config["reward"] == second
    assert str(first["class_path"]).endswith(".CLIPScore")
    assert written(tmp_path / "b.yaml", "a: &a [*a]\nb: 1\n")["b"] == 1


def test_configs_beside_a_config_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs_of_mine"
    folder.mkdir()
    (folder / "reward.yaml").write_text("class_path: CLIPScore\n")
    monkeypatch.chdir(tmp_path)
    text = "reward: reward.yaml\nmodel: {class_path: PGRAFT}\n"
    config = written(folder / "all.yaml", text)
    assert config["reward"] == str(folder / "reward.yaml")
