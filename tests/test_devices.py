"""Tests on a device other than the CPU, each file in a process of its own.

Autograd starts its threads at the first backward pass of a process, one for each device that is
known by then. Threads forbid processes to fork, as other tests do.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/test_second_device.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_on_another_device(file: Path, request: pytest.FixtureRequest) -> None:
    chosen = ["-m", request.config.option.markexpr]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_there_are_some() -> None:
    assert len(FILES) == 3
