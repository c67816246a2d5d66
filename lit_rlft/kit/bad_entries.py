"""Bad entries of data files: each is left out, counted and listed, or stops the run."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from lit_rlft.core.checks import UsageError

__all__ = ["BadEntry", "NothingLeft", "Report", "usable"]

E = TypeVar("E")

_MAX_LISTED = 5  # names per kind of fault in the one-line report
_MAX_DETAIL = 80  # characters of a detail where nothing is left


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
        parts: Parts that were left out of entries that are used, such as a page's elements.
        remedies: What to do about a kind of fault, e.g. "set classes to the file's own".
    """

    source: str
    noun: str
    strict: bool = False
    num_kept: int = 0
    faults: list[BadEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[BadEntry] = field(default_factory=list)
    remedies: dict[str, str] = field(default_factory=dict)

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

    def leave_out_part(self, bad: BadEntry) -> None:
        """Note a part of an entry that cannot be used, while the entry can.

        Raises:
            UsageError: None may be left out.
        """
        if self.strict:
            self.leave_out(bad)
        self.parts.append(bad)

    def check(self) -> None:
        """Raise NothingLeft where no entry is left: why, the first few, and what to do."""
        if self.num_kept:
            return
        kinds = Counter(bad.kind for bad in self.faults)
        found = [self.remedies[kind] for kind in kinds if kind in self.remedies]
        remedy = f": {'; '.join(found)}" if found else ""
        raise NothingLeft(f"{self._line(details=True)}; nothing is left to use{remedy}", self)

    def __str__(self) -> str:
        """Return the report in one line, with the first few entries of every kind of fault."""
        return self._line(details=False)

    def _line(self, *, details: bool) -> str:
        """Return the report in one line; with details, what exactly the first of a kind has."""
        total = self.num_kept + len(self.faults)
        phrases = [f"{self.source}: {self.num_kept} of {total} {self.noun} used", *self.notes]
        for of_used, faults in ((False, self.faults), (True, self.parts)):
            for kind, count in Counter(bad.kind for bad in faults).items():
                chosen = [bad for bad in faults if bad.kind == kind][:_MAX_LISTED]
                names = [bad.name for bad in chosen]
                if details and chosen[0].detail:
                    names[0] += f": {chosen[0].detail[:_MAX_DETAIL]}"
                more = ", ..." if count > _MAX_LISTED else ""
                what = f"{'part' if count == 1 else 'parts'} of these " if of_used else ""
                phrases.append(f"{count} {what}left out with {kind} ({', '.join(names)}{more})")
        return "; ".join(phrases)

    def listing(self) -> str:
        """Return every entry and part that was left out, a sentence a line."""
        return "".join(f"{self.source}: {bad}.\n" for bad in (*self.faults, *self.parts))


class NothingLeft(UsageError):
    """No entry of a data file can be used.

    Attributes:
        listing: Every entry that was left out, a sentence a line.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.listing = report.listing() if report else ""


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
