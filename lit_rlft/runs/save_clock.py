"""When it is time for a checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["SaveClock"]


class SaveClock:
    """Says that a checkpoint is due, so often that little is lost and saving costs little.

    One is due after `interval` seconds without any. Where the last one took more than `share` of
    that time, the next one waits until it has taken that share.

    Args:
        interval: Seconds between checkpoints; None never has one due.
        share: Of the time that saving may take, in (0, 1].
        clock: Returns seconds.
    """

    def __init__(
        self,
        interval: float | None,
        share: float = 0.01,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval, self.share, self.clock = interval, share, clock
        self.cost = 0.0
        self.start()

    def start(self) -> None:
        """Begin to count now."""
        self._last = self.clock()

    @property
    def wait(self) -> float:
        """Seconds from the end of one save to the next."""
        assert self.interval is not None
        return max(self.interval, self.cost * (1 / self.share - 1))

    def due(self) -> bool:
        """Return whether it is time."""
        return self.interval is not None and self.clock() - self._last >= self.wait

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure what the block's saving costs, and count from its end if it succeeds."""
        began = self.clock()
        yield
        self.start()
        self.cost = self._last - began
