"""Bad entries of data files: each is left out, counted and listed, or stops the run."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from lit_rlft.core.checks import UsageError

__all__ = ["BadEntry", "Report", "usable"]

E = TypeVar("E")

_MAX_LISTED = 5  # names per kind of fault in the one-line report


@dataclass(frozen=True, slots=True)
class BadEntry:
    """An entry that cannot be used.

    Attributes:
        name: Where it is in its file, e.g. "line 17".
        kind: What is wrong, in words that fit every entry with the same fault.
        detail: What exactly.
    """

    name: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """Return the fault in one phrase."""
        return f"{self.name} has {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """How many entries of a data file are used, and why others are not.

    Attributes:
        source: The file.
        noun: What its entries are, e.g. "molecules".
        strict: Whether the first bad entry stops the run.
        num_kept: Entries used.
        faults: Entries left out, in the file's order.
        notes: Further remarks, in phrases.
    """

    source: str
    noun: str
    strict: bool = False
    num_kept: int = 0
    faults: list[BadEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, bad: BadEntry) -> None:
        """Note an entry that cannot be used.

        Raises:
            UsageError: None may be left out.
        """
        if self.strict:
            raise UsageError(
                f"{self.source}: {bad}; fix the file, or set strict to false to leave such "
                f"{self.noun} out"
            )
        self.faults.append(bad)

    def check(self) -> None:
        """Raise UsageError where no entry is left."""
        if not self.num_kept:
            raise UsageError(f"{self}; nothing is left to use")

    def __str__(self) -> str:
        """Return the report in one line, with the first few entries of every kind of fault."""
        total = self.num_kept + len(self.faults)
        parts = [f"{self.source}: {self.num_kept} of {total} {self.noun} used", *self.notes]
        for kind, count in Counter(bad.kind for bad in self.faults).items():
            names = [bad.name for bad in self.faults if bad.kind == kind][:_MAX_LISTED]
            more = ", ..." if count > _MAX_LISTED else ""
            parts.append(f"{count} left out with {kind} ({', '.join(names)}{more})")
        return "; ".join(parts)

    def listing(self) -> str:
        """Return every entry that was left out, a sentence a line."""
        return "".join(f"{self.source}: {bad}.\n" for bad in self.faults)


def usable(
    entries: Iterable[E | BadEntry], fault: Callable[[E], BadEntry | None], report: Report
) -> Iterator[E]:
    """Iterate over the entries that can be used; the report counts them and the others.

    Args:
        entries: Entries, or what is wrong with one that could not be read.
        fault: Returns what is wrong with an entry, or None.
        report: On the file.

    Raises:
        UsageError: An entry cannot be used, and none may be left out.
    """
    for entry in entries:
        bad = entry if isinstance(entry, BadEntry) else fault(entry)
        if bad is not None:
            report.leave_out(bad)
        elif not isinstance(entry, BadEntry):
            report.num_kept += 1
            yield entry
