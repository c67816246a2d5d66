"""A round stays in its rooms: how often a tiny run comes back to the base of all algorithms."""

from pathlib import Path

import pytest

from benchmarks.files_entered import STEPS, trace

MOST = 30
BASE = "lit_rlft/algorithms/base.py"


def test_a_step_seldom_comes_back_to_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entered = trace()
    assert set(entered) == set(STEPS)
    for step in STEPS:
        assert 0 < entered[step][BASE] <= MOST, entered[step].most_common(5)
        assert entered[step]["lit_rlft/core/process/gaussian.py"] > 0  # the profile sees the rest
