"""A run from Python, without the command line: as a script, in a notebook, and under torchrun."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import lit_rlft
from tests.support import ROOT

GAUSSIAN = """
from lightning import Trainer
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft import PGRAFT, LoRA, RunFiles, Sampler, TopK

mixture = {"weights": [0.5, 0.5], "means": [[-1.0, 0.0], [1.0, 0.0]], "stds": [0.3, 0.3]}
model = PGRAFT(
    GaussianMixturePipeline(**mixture), Coordinate(), num_candidates=4, selection=TopK(1),
    sampler=Sampler(num_steps=4), lora=LoRA(rank=4),
)
data = MixtureData(**mixture, num_train=16, num_val=4, num_test=8, batch_size=8)
trainer = Trainer(
    accelerator="cpu", devices=DEVICES, default_root_dir="runs", callbacks=[RunFiles()],
    max_epochs=1,
)
trainer.fit(model, data)
(tested,) = trainer.test(model, data)
assert {"test/Coordinate", "test_reference/Coordinate", "test_gain/Coordinate"} <= tested.keys()
"""
SHAPES = """
from lightning import Trainer
from domains.text_to_image.data import ShapesPrompts
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import ShapesEval
from lit_rlft import PGRAFT, LoRA, RunFiles, Sampler, TopK

model = PGRAFT(
    TextToImagePipeline("shapes"), ShapesEval(), num_candidates=2, selection=TopK(1),
    sampler=Sampler(num_steps=2), lora=LoRA(rank=4), num_eval_samples=1,
)
data = ShapesPrompts(num_train_prompts=2, num_val_prompts=2, num_test_prompts=2, batch_size=2)
trainer = Trainer(
    accelerator="cpu", default_root_dir="runs", callbacks=[RunFiles()], max_epochs=1
)
trainer.fit(model, data)
trainer.test(model, data)
"""


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr


def check(algorithm: str = "PGRAFT", num_samples: int = 32) -> None:
    (folder,) = Path("runs/lightning_logs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["algorithm"] == algorithm and metrics["num_samples"] == num_samples
    assert (folder / "comparison.png").is_file()
    assert list((folder / "tuned").iterdir())
    (path,) = (folder / "checkpoints").iterdir()
    trained = torch.load(path, weights_only=True)["state_dict"]
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow  # torchrun runs the same script
def test_a_script() -> None:
    Path("script.py").write_text(GAUSSIAN.replace("DEVICES", "1"))
    run("script.py")
    check()


@pytest.mark.slow
def test_a_script_with_a_diffusion_model() -> None:
    Path("script.py").write_text(SHAPES)
    run("script.py")
    check(num_samples=2)


@pytest.mark.slow
def test_two_processes_under_torchrun() -> None:
    Path("script.py").write_text(GAUSSIAN.replace("DEVICES", "2"))
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py")
    check()


def test_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.v4.new_notebook()
    code = GAUSSIAN.replace("DEVICES", "1")
    book.cells = [nbformat.v4.new_code_cell(part) for part in code.split("\n\n")]
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    check()


@pytest.mark.parametrize("name", sorted(lit_rlft.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lit_rlft, name).__name__ == name
    assert name in dir(lit_rlft)


def test_type_checkers_are_told_the_same() -> None:
    tree = ast.parse((ROOT / "lit_rlft/__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    told = {alias.name: node.module for node in imports for alias in node.names}
    assert told == {name: f"lit_rlft.{module}" for name, module in lit_rlft._PLACES.items()}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)


@pytest.mark.parametrize("package", ["lit_rlft", "domains"])
def test_type_checkers_of_users_read_the_types(package: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in settings["package-data"]["*"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lit_rlft.Nothing  # noqa: B018
