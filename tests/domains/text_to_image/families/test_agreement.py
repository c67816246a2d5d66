"""Pictures of our sampler are those of each family's own pipeline, whatever its scheduler."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.domains.text_to_image.families.agreement import (
    CASES,
    RUNS,
    Case,
    Run,
    largest_difference,
)

TOLERANCE = 1e-3
DEFAULT = {
    "sd-PNDMScheduler-leading-0",
    "sdxl_turbo-EulerAncestralDiscreteScheduler-trailing-1",
    "sd3_first-FlowMatchEulerDiscreteScheduler-shift_3-0",
    "flux_dev-FlowMatchEulerDiscreteScheduler-dynamic_shift-0",
}
"""Cases of the quick suite, each in one run."""
GUIDED = RUNS[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("case", "run"),
    [
        pytest.param(
            case,
            run,
            marks=[] if str(case) in DEFAULT and run == GUIDED else pytest.mark.slow,
            id=f"{case}-{run.num_steps}-{'guided' if run.guided else 'plain'}",
        )
        for case in CASES
        for run in case.runs
    ],
)
def test_pictures_are_those_of_diffusers(case: Case, run: Run, models: Path) -> None:
    assert largest_difference(case, run, models) < TOLERANCE


def test_another_grid_gives_other_pictures(models: Path) -> None:
    """The tolerance tells schedulers apart."""
    (case,) = (case for case in CASES if str(case) == "sd-PNDMScheduler-leading-0")
    assert largest_difference(replace(case, stand_in=None), GUIDED, models) > 2 * TOLERANCE


def test_every_case_of_the_quick_suite_exists() -> None:
    assert {str(case) for case in CASES} >= DEFAULT and len({str(c) for c in CASES}) == len(CASES)
