"""Errors of FID and KID beside repeated sampling, for few and many samples."""

import pytest

from benchmarks.set_metric_errors import ratios

REPEATS = 90


@pytest.mark.parametrize(
    ("num", "dims", "others"),
    [
        (32, 256, False),
        pytest.param(32, 256, True, marks=pytest.mark.slow),
        pytest.param(240, 8, False, marks=pytest.mark.slow),
    ],
)
def test_errors_are_those_of_repeated_sampling(num: int, dims: int, others: bool) -> None:
    table = ratios("normal", num, dims, REPEATS, 0, shares=False, others=others)
    assert set(table) == {"FID", "KID"}
    # 15 %, and three times the relative error of a deviation over so many repeats.
    tolerance = 0.15 + 3 / (2 * REPEATS) ** 0.5
    for name, columns in table.items():
        for arm in ("reference", "tuned", "gain"):
            assert columns[arm] == pytest.approx(1, abs=tolerance), (name, arm)
    if others:  # what errors of sets with repeated samples would be
        assert table["KID"]["gain, bootstrap"] > 1 + tolerance
