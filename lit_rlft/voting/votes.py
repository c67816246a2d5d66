"""The votes of persons, in a file of preferences (`lit_rlft.kit.preferences`).

`votes.jsonl` has a line for every sample that another one was preferred to:

    {"condition": {"prompt": "a red ring"}, "chosen": "samples/1f.png", "rejected":
     "samples/a0.png", "voter": "anna", "time": "2026-01-31T12:00:00.000000+00:00",
     "question": "5c...", "vote": 17}

Paths are relative to the file's folder. A choice among four samples has three lines with one number
`vote`. Where no sample was the better one, `tie` is true, and what stands first has no meaning.
A line is on the disk before its voter hears of it. A vote that is taken back is removed by a file
without it that takes the old one's place.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_rlft.kit.preferences import preference_line
from lit_rlft.runs.files import write_whole, writing
from lit_rlft.runs.lines import append_lines, read_lines, signature
from lit_rlft.voting.questions import Question

__all__ = ["VOTES", "Vote", "Votes"]

VOTES = "votes.jsonl"
"""Name of the file."""


@dataclass(frozen=True)
class Vote:
    """An answer to a question.

    Attributes:
        number: Grows from vote to vote.
        question: The question's name.
        chosen: The sample's path; None where no sample was the better one.
        voter: Who.
    """

    number: int
    question: str
    chosen: str | None
    voter: str


class Votes:
    """The votes in a folder; one process at a time writes them, any number read them.

    Args:
        folder: Of the votes.

    Attributes:
        by_question: The first vote on each question, the oldest first.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VOTES
        self.by_question: dict[str, Vote] = {}
        self._seen: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """Read the file where it has changed; return whether it had."""
        seen = signature(self.path)
        if seen == self._seen:
            return False
        self._seen, self.by_question = seen, {}
        for line in read_lines(self.path):
            if (vote := _vote(line)) is not None:
                self.by_question.setdefault(vote.question, vote)
        return True

    def last_of(self, voter: str) -> Vote | None:
        """Return the latest vote of somebody."""
        own = [vote for vote in self.by_question.values() if vote.voter == voter]
        return own[-1] if own else None

    def add(self, question: Question, chosen: str | None, voter: str) -> Vote:
        """Write a vote; it is on the disk when this returns.

        Args:
            question: What was asked.
            chosen: Path of the better sample; None where there is none.
            voter: Who says so.

        Raises:
            DiskError: The disk takes no more.
        """
        self.refresh()
        number = max((vote.number for vote in self.by_question.values()), default=0) + 1
        samples = [one.sample for one in question.candidates]
        best = samples[0] if chosen is None else chosen
        further: dict[str, Any] = {
            "tie": True if chosen is None else None,
            "voter": voter,
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
            "question": question.id,
            "vote": number,
        }
        lines = [
            preference_line(question.condition, best, other, **further)
            for other in samples
            if other != best
        ]
        append_lines(self.path, "".join(lines))
        self.refresh()
        return self.by_question[question.id]

    def remove(self, vote: Vote) -> None:
        """Take a vote back.

        Raises:
            DiskError: The disk takes no more; the vote stays.
        """
        kept = [line for line in read_lines(self.path) if line.get("vote") != vote.number]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        with writing(self.path):
            write_whole(self.path, text)
        self.refresh()


def _vote(line: dict[str, Any]) -> Vote | None:
    """Return the vote that a line is of; None for a preference from elsewhere."""
    number, question = line.get("vote"), line.get("question")
    if not isinstance(number, int) or not isinstance(question, str):
        return None
    chosen = None if line.get("tie") else str(line.get("chosen"))
    return Vote(number, question, chosen, str(line.get("voter", "")))
