"""What parts measure with: turns with quartiles, memory, cases that may fail, a limit of time."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_rlft.cost.counters import now

__all__ = ["Bench", "NotHere", "quartiles"]

Row = dict[str, Any]


class NotHere(Exception):
    """What a case needs is not there: a setting of another version, a second device."""


@dataclass
class Bench:
    """Measures the cases of one part and collects their rows.

    A case that runs out of memory, or fails, has a row that says so, and the others go on. Cases
    that would begin after the part's time is over are left out by name.

    Args:
        device: Where everything runs.
        tiny: Whether models and numbers are tiny, to try the code itself.
        seconds: Time of the part; cases that have begun are finished.
        repeats: Turns of each arm, at most.

    Attributes:
        rows: What was measured.
    """

    device: torch.device
    tiny: bool
    seconds: float
    repeats: int = 7
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """The precision of frozen weights."""
        return torch.bfloat16

    def pick(self, real: Any, tiny: Any) -> Any:
        """Return what belongs to the size at hand."""
        return tiny if self.tiny else real

    def left(self) -> float:
        """Return the seconds that the part still has."""
        return self.seconds - (time.monotonic() - self._began)

    def case(self, keys: Row, measure: Callable[[], Row]) -> None:
        """Add a row of a case.

        Args:
            keys: What tells the case from others of its part.
            measure: Returns what was measured.
        """
        if self.left() <= 0:
            self.rows.append({**keys, "skipped": "the part's time was over"})
            return
        self.fresh()
        try:
            found = measure()
        except NotHere as reason:
            found = {"skipped": str(reason)}
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        except Exception as error:  # the other cases are worth their time
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.rows.append({**keys, **found})
        self.fresh()

    def fresh(self) -> None:
        """Free what nobody holds any more, and begin the peak of memory anew."""
        if self.cuda:
            gc.collect()  # tuner and trainer hold each other
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """Return the peak of allocated memory in GiB since `fresh`; None without a GPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None

    def turns(self, arms: Mapping[str, Callable[[], object]], warm: int = 2) -> dict[str, Row]:
        """Time arms in turn, each turn beginning with another one; return quartiles of seconds.

        Args:
            arms: What to time, by name.
            warm: Untimed calls of each before.
        """
        for arm in arms.values():
            for _ in range(warm):
                arm()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        names = list(arms)
        for turn in range(self.repeats):
            if turn >= 2 and self.left() <= 0:
                break
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                began = now()
                arms[name]()
                seconds[name].append(now() - began)
        return {name: quartiles(own) for name, own in seconds.items()}


def quartiles(seconds: list[float]) -> Row:
    """Return the median, the quartiles and the number of some times in seconds."""
    if len(seconds) < 2:
        low = middle = high = seconds[0] if seconds else float("nan")
    else:
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"seconds": middle, "low": low, "high": high, "turns": len(seconds)}
