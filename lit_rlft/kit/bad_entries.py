"""Entries of data files that cannot be used: left out, counted and listed, or a reason to stop."""

from collections import Counter
from dataclasses import dataclass, field

from lit_rlft.core.checks import UsageError

__all__ = ["BadEntry", "Report"]

_MAX_LISTED = 5  # names per kind of fault in the one-line report


@dataclass(frozen=True, slots=True)
class BadEntry:
    """An entry that cannot be used.

    Attributes:
        name: Where it is in its file, e.g. "line 17".
        kind: What is wrong, in words that entries with the same fault share.
        detail: More of it.
    """

    name: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """Return the fault in one phrase."""
        return f"{self.name} has {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """How many entries of a file were used, and why others were not.

    Attributes:
        source: The file.
        noun: What its entries are, e.g. "molecules".
        strict: Whether the first bad entry stops the run.
        num_kept: Entries used.
        faults: Entries left out, in the file's order.
    """

    source: str
    noun: str
    strict: bool = False
    num_kept: int = 0
    faults: list[BadEntry] = field(default_factory=list)

    def leave_out(self, bad: BadEntry) -> None:
        """Note an entry that cannot be used.

        Raises:
            UsageError: None may be left out.
        """
        if self.strict:
            raise UsageError(
                f"{self.source}: {bad}; mend the file, or set strict to false to leave such "
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
        parts = [f"{self.source}: {self.num_kept} of {total} {self.noun} used"]
        for kind, count in Counter(bad.kind for bad in self.faults).items():
            names = [bad.name for bad in self.faults if bad.kind == kind][:_MAX_LISTED]
            more = ", ..." if count > _MAX_LISTED else ""
            parts.append(f"{count} left out with {kind} ({', '.join(names)}{more})")
        return "; ".join(parts)

    def listing(self) -> str:
        """Return every entry that was left out, a sentence a line."""
        return "".join(f"{self.source}: {bad}.\n" for bad in self.faults)
