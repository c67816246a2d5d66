"""Questions to a person: which of some samples is the better one; the files they wait in.

A fit appends to `questions_<rank>.jsonl` in the folder of its votes, one JSON object a line:

- a question: `{"question": id, "round": 3, "condition": {...}, "label": "a red ring", "candidates":
  [{"sample": "samples/1f.png", "drawing": "samples/1f.png"}, ...]}`; paths are relative to the
  folder;
- `{"ready": 3}`: all questions of the round are there;
- `{"closed": [id, ...], "round": 3, "why": "trained"}`: the run has gone on; or "time", "stopped",
  or "restarted": a new start asks again what it still needs.

A question that is written again is open again. Its name is made of the condition and the samples,
so that a run that was killed and draws the same samples once more finds their votes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_rlft.runs.lines import append_lines, read_lines, signature

__all__ = ["Candidate", "Question", "QuestionFile", "Questions", "pairs_to_show"]


@dataclass(frozen=True)
class Candidate:
    """A sample that can be chosen.

    Attributes:
        sample: Its file in the domain's format, relative to the folder of votes.
        drawing: A picture of it, PNG or SVG.
    """

    sample: str
    drawing: str


@dataclass(frozen=True)
class Question:
    """Samples of one condition, of which one is to be chosen.

    Attributes:
        condition: The record that they were drawn under.
        label: The same for a reader.
        candidates: Two or more.
        round: Of the run that asks; None where none does.
    """

    condition: Mapping[str, Any]
    label: str
    candidates: tuple[Candidate, ...]
    round: int | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        asked = [self.condition, [one.sample for one in self.candidates]]
        text = json.dumps(asked, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        object.__setattr__(self, "id", digest)

    def record(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {
            "question": self.id,
            "round": self.round,
            "condition": self.condition,
            "label": self.label,
            "candidates": [asdict(one) for one in self.candidates],
        }


class QuestionFile:
    """The questions of one process of a fit, which alone appends to it.

    Args:
        folder: Of the votes.
        rank: Number of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"questions_{rank}.jsonl"
        self.rank = rank

    def ask(self, questions: Iterable[Question]) -> None:
        """Add questions, all of them open."""
        append_lines(self.path, "".join(_line(question.record()) for question in questions))

    def ready(self, number: int) -> None:
        """Say that all questions of a round are there."""
        append_lines(self.path, _line({"ready": number}))

    def close(self, questions: Iterable[str], number: int, why: str) -> None:
        """Say that a round has gone on, and which questions nobody waits for any more."""
        append_lines(self.path, _line({"closed": list(questions), "round": number, "why": why}))

    def end(self) -> None:
        """Say that the fit has ended: it asks nothing until it is resumed."""
        append_lines(self.path, _line({"ended": True}))


class Questions:
    """What a reader knows of the questions of all processes.

    Args:
        folder: Of the votes.

    Attributes:
        known: Questions by their names, in the order in which they were asked.
        open: Names of those that somebody waits for.
        ready: By process, the last round whose questions are all there.
        stopped: By process, the last round in which it was asked to end.
        ended: Whether the fit has ended; it may be resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Question] = {}
        self.open: set[str] = set()
        self.ready: dict[int, int] = {}
        self.stopped: dict[int, int] = {}
        self.ended = False
        self._owners: dict[str, int] = {}
        self._seen: dict[Path, tuple[int, int, int]] = {}

    @property
    def ranks(self) -> set[int]:
        """Numbers of the processes that have asked anything so far."""
        return {_rank(path) for path in self._seen}

    def refresh(self) -> None:
        """Read the files that have changed."""
        files = sorted(self.folder.glob("questions_*.jsonl"), key=_rank)
        changed = {path: signature(path) for path in files}
        if changed == self._seen:
            return
        self._seen = changed
        self.known, self.open, self._owners = {}, set(), {}
        for path in files:
            for line in read_lines(path):
                self._take(line, _rank(path))

    def open_by(self, rank: int) -> list[str]:
        """Return the open questions that a process has asked."""
        return [name for name in self.open if self._owners[name] == rank]

    def open_of(self, number: int, but: int) -> list[str]:
        """Return the open questions of a round that other processes than one have asked."""
        return [
            name
            for name in self.open
            if self.known[name].round == number and self._owners[name] != but
        ]

    def _take(self, line: Mapping[str, Any], rank: int) -> None:
        if "question" in line:
            question = _question(line)
            self.known[question.id] = question
            self._owners[question.id] = rank
            self.open.add(question.id)
        elif "ready" in line:
            self.ready[rank] = int(line["ready"])
        elif "closed" in line:
            self.open -= set(line["closed"])
            if line.get("why") == "stopped":
                self.stopped[rank] = int(line["round"])
            elif line.get("why") == "restarted":
                self.stopped.pop(rank, None)
                self.ready.pop(rank, None)
        if rank == 0:  # any later line is of a fit that goes on
            self.ended = "ended" in line


def _rank(path: Path) -> int:
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def _question(line: Mapping[str, Any]) -> Question:
    candidates = tuple(
        Candidate(str(one["sample"]), str(one["drawing"])) for one in line["candidates"]
    )
    return Question(line["condition"], str(line["label"]), candidates, line.get("round"))


def pairs_to_show(num_candidates: int, num_pairs: int) -> Sequence[tuple[int, int]]:
    """Return which candidates of a group are compared, so that all appear as often as can be.

    First neighbours (0 and 1, 2 and 3, ...), then the pairs between them (1 and 2, ...), then
    those that are two apart, and so on.

    Args:
        num_candidates: M.
        num_pairs: Pairs asked for; there are M (M - 1) / 2 at most.
    """
    found: dict[frozenset[int], tuple[int, int]] = {}
    for apart in range(1, num_candidates // 2 + 1):
        block = range(0, num_candidates - 1, 2) if apart == 1 else range(0)
        rest = [i for i in range(num_candidates) if i not in block]
        for i in [*block, *rest]:
            pair = (i, (i + apart) % num_candidates)
            found.setdefault(frozenset(pair), pair)
    return list(found.values())[:num_pairs]
