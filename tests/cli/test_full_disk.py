"""A disk that takes no more: one sentence for every file that a command writes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.test_runs import GAUSSIAN, TINY, gaussian
from tests.support import ROOT, arguments, weights, working_directory

FULL = Path("/dev/full")
RUN = Path("runs/run")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("validate", "panels/000000.png"),
        ("test", "metrics.json"),
        pytest.param("test", "comparison.png", marks=slow),
        pytest.param("validate", "config_validate.yaml", marks=slow),
        pytest.param("predict", "samples_0.jsonl", marks=slow),
        pytest.param("predict", "samples.jsonl", marks=slow),
    ],
)
def test_a_file_that_finds_no_room_is_named(command: str, file: str) -> None:
    # samples_0.jsonl grows in its place; all others are written beside it.
    path = RUN / (file if file == "samples_0.jsonl" else f"{file}.partial")
    path.parent.mkdir(parents=True)
    path.symlink_to(FULL)
    with pytest.raises(SystemExit) as raised:
        gaussian(command, "run")
    text = str(raised.value)
    assert text.startswith(f"lit-rlft: error: {RUN / file}: the disk is full (")
    assert "free); make room there, then" in text and len(text) < 300


def test_samples_that_find_no_room_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("domains.gaussian_mixture.samples.Path.write_text", full)
    with pytest.raises(SystemExit, match=r"error: runs/run/samples: the disk is full \("):
        gaussian("predict", "run")


def test_an_export_that_finds_no_room_leaves_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: object, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    where = "domains.gaussian_mixture.pipeline.GaussianMixturePipeline.save"
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(SystemExit) as raised:
            gaussian("fit", "run")
    last = RUN / "checkpoints/last.ckpt"
    assert f"{RUN / 'tuned'}: the disk is full" in str(raised.value)
    assert f"--ckpt_path {last}, which is intact" in str(raised.value)
    assert sorted(path.name for path in RUN.glob("tuned*")) == []
    assert all(value.isfinite().all() for value in weights("run").values())
    gaussian("fit", "run", {"ckpt_path": str(last)})
    assert (RUN / "tuned/mixture.json").is_file()


@slow
def test_torchrun_chooses_one_folder() -> None:
    words = arguments("fit", GAUSSIAN, TINY, {"trainer.accelerator": "cpu", "trainer.devices": 2})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for number in (1, 2):
        result = subprocess.run(
            [sys.executable, *launch, "-m", "lit_rlft.cli", *words],
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        names = ["graft", "graft-2"][:number]
        assert sorted(path.name for path in Path("runs").iterdir()) == names
    folder = Path("runs/graft-2")
    assert len(list(folder.glob("events.*"))) == 1 and not (folder / "run.lock").exists()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["lit_rlft"]
