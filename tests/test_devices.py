"""Tests on a device other than the CPU, in a process of their own.

Autograd starts its threads at the first backward pass of a process, one for each device that is
known by then. Threads forbid processes to fork, as other tests do.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_second_device.py"))


def test_on_another_device(request: pytest.FixtureRequest) -> None:
    assert len(FILES) == 3
    chosen = ["-m", request.config.option.markexpr]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *FILES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
