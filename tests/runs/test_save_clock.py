"""When checkpoints are due, by a clock that is turned by hand."""

from itertools import pairwise

import pytest

from lit_rlft.runs.save_clock import SaveClock


class Clock:
    """A clock that stands still unless it is turned."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def saves(cost: float, interval: float | None, share: float, hours: float) -> list[float]:
    """Return when a run saves that looks at the clock every second, in seconds from its start."""
    clock = Clock()
    watch = SaveClock(interval, share, clock)
    times = []
    while clock.seconds < 100 + 3600 * hours:
        clock.seconds += 1
        if watch.due():
            times.append(clock.seconds - 100)
            with watch.saving():
                clock.seconds += cost
    return times


def test_a_quick_save_comes_every_five_minutes() -> None:
    times = saves(cost=0.5, interval=300, share=0.01, hours=2)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 300 and len(times) == 23
    assert all(300 <= gap <= 302 for gap in gaps)


@pytest.mark.parametrize(("cost", "share"), [(9.0, 0.01), (60.0, 0.01), (9.0, 0.002)])
def test_a_slow_save_takes_its_share_of_the_time_at_most(cost: float, share: float) -> None:
    times = saves(cost, interval=300, share=share, hours=20)
    between = times[-1] - times[1]  # the first one's cost is not known before
    assert len(times) > 3
    assert (len(times) - 2) * cost <= share * between
    # Nor is it rarer than that asks for, but for the seconds between two looks.
    assert times[2] - times[1] <= cost / share + 2


def test_without_an_interval_none_is_due() -> None:
    assert saves(cost=1, interval=None, share=0.01, hours=1) == []


def test_a_save_that_fails_stays_due() -> None:
    clock = Clock()
    watch = SaveClock(10, clock=clock)
    clock.seconds += 11
    with pytest.raises(OSError), watch.saving():
        raise OSError
    assert watch.due()
