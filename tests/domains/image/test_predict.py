"""The command line on images: what `predict` writes can be read again, and learned from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import lit_rlft
from domains.image.sources import ImageFolder
from lit_rlft.cli import main
from tests.domains.image.conftest import TINY

CONFIGS = Path(lit_rlft.__file__).parents[1] / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--name=run"]


def test_predicted_images_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--config={CONFIGS}/domains/digits.yaml"]
    flags += [f"--config={CONFIGS}/algorithms/p_graft.yaml", "--data.num_test=3", *QUIET]
    main(["predict", *flags, "--model.num_eval_samples=2", "--model.sampler.num_steps=3"])
    lines = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert np.isfinite(line["rewards"]["ClassProbability"])
        assert (Path("runs/run/samples") / line["file"]).with_suffix(".png").is_file()
    source = ImageFolder("runs/run/samples", 8, channels=1, cache_dir=str(tmp_path / "cache"))
    assert source.load().pixels.shape == (6, 1, 8, 8)


def test_a_folder_of_pictures_is_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/nested").mkdir(parents=True)
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (10, 14, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/nested/{i}.png")
    folder = {"path": "pictures", "size": 8, "cache_dir": "cache"}
    path = "domains.image"
    architecture: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items()
    }
    config = {
        "pipeline": {
            "class_path": f"{path}.pipeline.ImagePipeline",
            "init_args": {"pretrained": None, "architecture": architecture},
        },
        "reward": {"class_path": f"{path}.rewards.Brightness"},
        "data": {
            "class_path": f"{path}.data.ImageData",
            "init_args": {
                "source": {"class_path": f"{path}.sources.ImageFolder", "init_args": folder},
                "mirror": True,
                "batch_size": 8,
            },
        },
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config=own.yaml", f"--config={CONFIGS}/algorithms/pretrain.yaml", *QUIET]
    main(["fit", *flags, "--trainer.max_epochs=1", "--model.sampler.num_steps=2"])
    # What was trained is loaded by the same words as any other folder of diffusers'.
    tuned = ["--pipeline.architecture=null", "--pipeline.pretrained=runs/run/tuned"]
    main(["test", *flags, *tuned, "--model.sampler.num_steps=2", "--name=again"])
    values = json.loads(Path("runs/again/metrics.json").read_text())
    assert 0 <= values["reference"]["Brightness"]["mean"] <= 1
