"""What several test files share: a silent trainer, the command line, edited folders."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import disable_possible_user_warnings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("lit-rlft")
TWO_PROCESSES = {"trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.strategy": "ddp"}
TWO_FORKS = {**TWO_PROCESSES, "trainer.strategy": "ddp_fork"}
"""Two processes that need no second import of everything, started by `main` in this one."""

TINY_RUN = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.init_args.sampler.num_steps=2",
    "--model.init_args.num_eval_samples=1",
    "--data.init_args.batch_size=2",
    "--data.init_args.eval_batch_size=2",
]
"""What makes a command quick, in every domain."""
TINY_MIXTURE = {
    "name": "run",
    "data.init_args.num_train": 16,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 2,
    "data.init_args.batch_size": 8,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.num_eval_samples": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
}
"""A run of two rounds on the Gaussian mixture: what `arguments` takes."""
TINY_SPLITS = {
    "MixtureData": ("num_train=4", "num_val=2", "num_test=2"),
    "ShapesPrompts": ("num_train_prompts=4", "num_val_prompts=2", "num_test_prompts=2"),
    "ShapesPictures": ("num_pictures=4", "num_val_prompts=2", "num_test_prompts=2"),
    "LayoutData": ("num_train=4", "num_val=2", "num_test=2"),
    "MoleculeData": ("num_train=4", "num_val=2", "num_test=2"),
    "AtomCounts": ("num_train=4", "num_val=2", "num_test=2"),
    "ImageData": ("num_train=4", "num_val=2", "num_test=2"),
}
"""What makes each DataModule's splits small, beside that."""


_SCRATCH = tempfile.TemporaryDirectory(prefix="lit-rlft-tests-")
"""Where tuned models go of runs whose test has no folder for them."""


def trainer_of(**settings: Any) -> Trainer:
    """Return a trainer that trains on the CPU, and says and shows nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    disable_possible_user_warnings()
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "default_root_dir": _SCRATCH.name,
    }
    return Trainer(**{**quiet, **settings})


def slow(*values: Any) -> Any:
    """Return parameters of a test that does not run by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


def arguments(stage: str, configs: Sequence[Any], *settings: dict[str, Any]) -> list[str]:
    """Return the words of a command; later settings win."""
    merged = {key: value for part in settings for key, value in part.items()}
    words = {key: v if isinstance(v, str) else json.dumps(v) for key, v in merged.items()}
    flags = [f"--{key}={word}" for key, word in words.items()]
    return [stage, *(f"--config={config}" for config in configs), *flags]


def script(*command: str) -> str:
    """Run the console script in a process of its own and return what it printed."""
    path = os.pathsep.join((str(Path.cwd()), str(ROOT)))
    result = subprocess.run(
        [str(SCRIPT), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Work in another folder for the length of a block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def checkpoint(name: str = "run", file: str = "last.ckpt") -> dict[str, Any]:
    """Load a checkpoint of a run."""
    return torch.load(f"runs/{name}/checkpoints/{file}", weights_only=True)


def weights(name: str = "run") -> dict[str, torch.Tensor]:
    """Load the weights that a run trained."""
    return checkpoint(name)["state_dict"]


def report(folder: Path | str = "runs/run") -> dict[str, Any]:
    """Load a run's metrics.json."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def scalars(name: str = "run") -> dict[str, list[float]]:
    """Return the values of every TensorBoard tag of a run."""
    events = EventAccumulator(f"runs/{name}").Reload()
    tags = events.Tags()["scalars"]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def assert_equal(first: Any, second: Any) -> None:
    """Compare trees of tensors and numbers bit by bit.

    For the same computation repeated alone: a resumed run, the same seeds, a file read again.
    """
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_close_in_rounding(first: Any, second: Any) -> None:
    """Compare tensors, or dicts of them, that differ in nothing but how a processor rounds.

    Such are two rows of one batch, batches of two sizes, a copy of a model, two processes, two
    libraries. Vector units sum in another order and take the rest of a row another way, so that
    equal numbers differ in their last bits on some processors. A hundred units in the last place,
    1e-5 in float32 and 2e-14 in float64, leave room for that of some ten layers or steps;
    integers must be equal.
    """
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_close_in_rounding(first[name], second[name])
        return
    tolerance = 100 * torch.finfo(first.dtype).eps if first.is_floating_point() else 0
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def write_picture_domain(
    path: Path, model: Path, source: Path | str, reward: str = "Symmetry", **settings: Any
) -> Path:
    """Write the domain config of a diffusion model, with prompts from a file.

    Args:
        path: Where to.
        model: Folder of the model.
        source: File of the prompts.
        reward: Name of a text-to-image reward.
        **settings: Of the data, and `guidance_scale`.
    """
    text_to_image = "domains.text_to_image"
    guidance = settings.pop("guidance_scale", 2.0)
    config = {
        "pipeline": {
            "class_path": f"{text_to_image}.pipeline.TextToImagePipeline",
            "init_args": {"pretrained": str(model), "guidance_scale": guidance},
        },
        "reward": {"class_path": f"{text_to_image}.rewards.{reward}"},
        "data": {
            "class_path": f"{text_to_image}.data.PromptData",
            "init_args": {"source": str(source), **settings},
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def altered(folder: Path, out: Path, name: str, change: Callable[[dict], None] | None) -> Path:
    """Copy a folder with one JSON file changed, or any file removed."""
    shutil.copytree(folder, out)
    if change is None:
        (out / name).unlink()
        return out
    content = json.loads((out / name).read_text())
    change(content)
    (out / name).write_text(json.dumps(content))
    return out
