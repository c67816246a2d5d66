"""Batch sizes that become smaller where memory runs out, without a result that depends on them."""

import gc
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

__all__ = ["AUTO", "BatchSize", "GlobalNoise", "Part", "Parts", "free_memory", "sized"]

T = TypeVar("T")
AUTO: Literal["auto"] = "auto"


class BatchSize:
    """How many rows are computed at a time.

    A given number stays. An automatic one becomes the next smaller power of two whenever memory
    runs out, and never larger again.

    Args:
        key: The setting, for messages.
        given: A number, "auto", or None for all rows.
        start: What "auto" is unless `begin` is called; None is all rows.
        say: Is told of each number that becomes smaller.

    Attributes:
        automatic: Whether the number may change.
        rows: The number at present; None is all rows.
        begun: Whether an automatic number is more than a plain default.
        most: Most rows that were taken at a time since it was set to 0.
    """

    def __init__(
        self,
        key: str,
        given: int | Literal["auto"] | None,
        start: int | None = None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self.key, self.say, self._start = key, say, start
        self.most = 0
        self.give(given)

    def give(self, given: int | Literal["auto"] | None) -> None:
        """Take another setting in place of what was given, and of what "auto" has come to."""
        self.given, self.automatic = given, given == AUTO
        self.rows = self._start if given == "auto" else given
        self.begun = False

    def begin(self, rows: int) -> None:
        """Set where an automatic number begins, unless it has begun."""
        if not self.begun:
            self.go_on(rows)

    def go_on(self, rows: int | None) -> None:
        """Set an automatic number, as it was in an earlier run or on another process."""
        if self.automatic:
            self.rows, self.begun = rows, True

    def fewer(self, taken: int) -> bool:
        """Take fewer than `taken` rows from now on; return False where that cannot be."""
        if not self.automatic or taken <= 1:
            return False
        self.go_on(1 << (taken - 1).bit_length() - 1)
        if self.say is not None:
            self.say(f"memory ran out with {taken} rows: {self.key} is {self.rows} from now on")
        return True

    def parts(self, total: int) -> "Parts":
        """Return consecutive parts of `total` rows, to iterate over."""
        return Parts(self, total)


class Parts:
    """Consecutive parts of some rows; one in whose block memory ran out comes again, smaller.

    Args:
        size: Rows of a part.
        total: Number of all rows.
    """

    def __init__(self, size: BatchSize, total: int) -> None:
        self.size, self.total = size, total

    def __len__(self) -> int:
        """Return the number of parts, unless memory runs out."""
        return -(-self.total // (self.size.rows or max(self.total, 1)))

    def __iter__(self) -> Iterator["Part"]:
        """Iterate over the parts; the work on each belongs into `with part:`."""
        start = 0
        while start < self.total:
            stop = min(start + (self.size.rows or self.total), self.total)
            self.size.most = max(self.size.most, stop - start)
            yield (part := Part(self.size, slice(start, stop)))
            if part.failed:
                free_memory()
            else:
                start = stop


class Part:
    """Some rows, and the block in which they are computed.

    Where memory runs out in it, and the number of rows is automatic, the block ends without an
    error and torch's own random numbers are as before it. What the block has done outside of torch
    it must do last, or undo.

    Attributes:
        rows: The rows.
        failed: Whether memory ran out.
    """

    def __init__(self, size: BatchSize, rows: slice) -> None:
        self.rows, self.failed = rows, False
        self._size = size

    def __enter__(self) -> "Part":
        self._noise = GlobalNoise() if self._size.automatic else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        self.failed = self._size.fewer(self.rows.stop - self.rows.start)
        if self.failed and self._noise is not None:
            self._noise.restore()
        return self.failed


class GlobalNoise:
    """The state of torch's own random numbers, to go back to."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._gpus: list[Any] = torch.cuda.get_rng_state_all() if _gpus_in_use() else []

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._cpu)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)


def sized(given: int | BatchSize) -> BatchSize:
    """Return a batch size for a plain number."""
    return given if isinstance(given, BatchSize) else BatchSize("batch size", given)


def free_memory() -> None:
    """Give back what an error has left behind on a GPU: in cycles of frames, in torch's blocks."""
    if _gpus_in_use():
        gc.collect()
        torch.cuda.empty_cache()


def _gpus_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
