"""Where a fit asks its questions and waits for their votes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_rlft.runs.lines import locked
from lit_rlft.voting.questions import Question, QuestionFile, Questions
from lit_rlft.voting.votes import Vote, Votes

__all__ = ["LOCK", "Desk"]

LOCK = ".lock"
"""Held while votes are added, taken back, and taken to train on: none is taken back after that."""
_PAUSE, _PATIENCE = 0.1, 60.0
"""Seconds between two looks, and until a process that has no questions is no longer waited for."""


@dataclass
class Desk:
    """A fit's side of the folder of votes.

    Attributes:
        folder: Of the votes.
        num_candidates: M, samples of a condition.
        rank: Of this process.
        world_size: Number of processes.
        stopping: Whether the run was asked to end.
    """

    folder: Path
    num_candidates: int
    rank: int = 0
    world_size: int = 1
    stopping: Callable[[], bool] = lambda: False
    _own: QuestionFile = field(init=False)
    _all: Questions = field(init=False)
    _votes: Votes = field(init=False)

    def __post_init__(self) -> None:
        self._own = QuestionFile(self.folder, self.rank)
        self._all, self._votes = Questions(self.folder), Votes(self.folder)

    def start(self) -> None:
        """Close what a process of this number has left open that is no more.

        The first process does so for those that the run has no longer.
        """
        self._all.refresh()
        ranks = [self.rank]
        if self.rank == 0:
            ranks += [rank for rank in self._all.ranks if rank >= self.world_size]
        with locked(self.folder / LOCK):
            for rank in set(ranks) & self._all.ranks:
                QuestionFile(self.folder, rank).close(self._all.open_by(rank), -1, "restarted")

    def ask(self, questions: Sequence[Question]) -> None:
        """Show questions on the page."""
        self._own.ask(questions)

    def end(self) -> None:
        """Tell the page that this process asks nothing more."""
        self._own.end()

    def wait(
        self,
        questions: Sequence[Question],
        number: int,
        *,
        timeout: float | None,
        undo_seconds: float,
    ) -> dict[str, Vote]:
        """Return the votes on questions by their names, once all are there or nobody votes.

        A process waits for the questions of the others too: else it would wait for them where no
        process may wait for long.

        Args:
            questions: This process's own, which were asked.
            number: Of the round.
            timeout: Seconds without a vote until the run goes on; None for no limit.
            undo_seconds: Seconds since the last vote in which it can be taken back.
        """
        self._own.ready(number)
        names = [question.id for question in questions]
        self._votes.refresh()
        begun = last = time.monotonic()
        while True:
            now = time.monotonic()
            if self._votes.refresh():
                last = now
            self._all.refresh()
            settled = last == begun or now - last >= undo_seconds
            if settled and self._complete(names, number, patient=now - last < _PATIENCE):
                why = "trained"
            elif self.stopping() or number in self._all.stopped.values():
                why = "stopped"
            elif timeout is not None and now - last > timeout:
                why = "time"
            else:
                time.sleep(_PAUSE)
                continue
            return self._taken(names, number, why)

    def _complete(self, names: Sequence[str], number: int, *, patient: bool) -> bool:
        """Return whether nobody waits for votes any more, on any process."""
        votes = self._votes.by_question
        ready = sum(last == number for last in self._all.ready.values())
        if patient and ready < self.world_size:
            return False
        others = self._all.open_of(number, but=self.rank)
        return all(name in votes for name in (*names, *others))

    def _taken(self, names: Sequence[str], number: int, why: str) -> dict[str, Vote]:
        """Return the votes; from now on they cannot be taken back."""
        with locked(self.folder / LOCK):
            self._votes.refresh()
            self._own.close(names, number, why)
        votes = self._votes.by_question
        return {name: votes[name] for name in names if name in votes}
