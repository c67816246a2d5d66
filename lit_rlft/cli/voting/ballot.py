"""Who is asked what next, and what becomes of the answers; any number of threads may ask."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lit_rlft.runs.lines import locked
from lit_rlft.voting.desk import LOCK
from lit_rlft.voting.places import SUFFIXES
from lit_rlft.voting.questions import Candidate, Question
from lit_rlft.voting.votes import Vote, Votes

__all__ = ["Ballot", "Fixed", "Refused", "Source", "shown_order"]

_RESERVED = 60.0
"""Seconds for which a question that somebody looks at is shown to nobody else."""


class Refused(Exception):
    """A request that cannot be met.

    Args:
        status: Of HTTP.
        sentence: Why, for the voter.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Source(Protocol):
    """Where questions are from.

    Attributes:
        known: Questions by name, in the order in which they are asked.
        open: Names of those to be asked.
        ended: Whether who asks has ended, so that no more come unless it is resumed.
    """

    known: dict[str, Question]
    open: set[str]
    ended: bool

    def refresh(self) -> None:
        """Look for new ones."""


class Fixed:
    """Questions that are all there from the start.

    Args:
        questions: In the order in which they are asked.
    """

    def __init__(self, questions: list[Question]) -> None:
        self.known = {question.id: question for question in questions}
        self.open = set(self.known)
        self.ended = False

    def refresh(self) -> None:
        """Look for none."""


class Ballot:
    """Hands out questions and takes votes.

    Args:
        folder: Of the votes; paths of samples are relative to it.
        source: The questions.
        root: No drawing outside this folder is shown.
        live: Whether more questions may come.
        keep: Is told of a question before a vote on it is written.
        result: Says what came out, once all is answered; None says nothing.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        root: Path,
        *,
        live: bool,
        keep: Callable[[Question], None] = lambda question: None,
        result: Callable[[Votes], str] | None = None,
    ) -> None:
        self.folder, self.source, self.root, self.live = folder, source, root.resolve(), live
        self.votes, self._keep, self._result = Votes(folder), keep, result
        self._mutex = threading.Lock()
        self._reserved: dict[str, tuple[str, float]] = {}

    def next(self, voter: str) -> dict[str, Any]:
        """Return what somebody is asked next, and how far all is.

        `state` is "ask"; "wait" where more may come; "ended" where they come only if the fit is
        resumed; "others" where others look at all that is left; or "done".
        """
        with self._mutex:
            self.source.refresh()
            self.votes.refresh()
            return self._next(voter)

    def vote(self, name: str, place: int | None, voter: str) -> dict[str, Any]:
        """Write a vote; return as `next`. The same vote once more is no second one.

        Args:
            name: The question's.
            place: Of the better sample, as shown, from 0; None where none is better.
            voter: Who.

        Raises:
            Refused: There is no such question or place, or somebody else has answered it.
            DiskError: The disk takes no more; nothing was written.
        """
        with self._mutex, locked(self.folder / LOCK):
            question = self._question(name)
            shown = shown_order(question)
            if place is not None and not 0 <= place < len(shown):
                raise Refused(400, f"there is no sample {place + 1} in this question")
            chosen = None if place is None else shown[place].sample
            self.votes.refresh()
            known = self.votes.by_question.get(name)
            if known is not None and (known.voter, known.chosen) != (voter, chosen):
                self._reserved.pop(name, None)
                raise Refused(409, "this question was answered already; the first vote counts")
            if known is None:
                self._keep(question)
                self.votes.add(question, chosen, voter)
            self._reserved.pop(name, None)
            self.source.refresh()
            return self._next(voter)

    def undo(self, voter: str) -> dict[str, Any]:
        """Take back somebody's last vote; return as `next`, with that question.

        Raises:
            Refused: There is none, or the run was trained on it.
            DiskError: The disk takes no more; the vote stays.
        """
        with self._mutex, locked(self.folder / LOCK):
            self.source.refresh()
            self.votes.refresh()
            vote = self.votes.last_of(voter)
            if vote is None:
                raise Refused(409, "there is no vote of yours to take back")
            if vote.question not in self.source.open:
                raise Refused(409, "the run has gone on with your last vote; it stays")
            self.votes.remove(vote)
            self._release(voter)
            self._reserved[vote.question] = (voter, time.monotonic())
            return self._next(voter)

    def drawing(self, name: str, place: int) -> Path:
        """Return the file of a sample's picture.

        Raises:
            Refused: There is none.
        """
        with self._mutex:
            shown = shown_order(self._question(name))
            if not 0 <= place < len(shown):
                raise Refused(404, "there is no such picture")
            path = (self.folder / shown[place].drawing).resolve()
            inside = path.is_relative_to(self.root) and path.suffix.lower() in SUFFIXES
            if not inside or not path.is_file():
                raise Refused(404, "there is no such picture")
            return path

    def _question(self, name: str) -> Question:
        if name not in self.source.known:
            self.source.refresh()
        try:
            return self.source.known[name]
        except KeyError:
            raise Refused(404, "there is no such question; reload the page") from None

    def _next(self, voter: str) -> dict[str, Any]:
        answered = self.votes.by_question
        waiting = [n for n in self.source.known if n in self.source.open and n not in answered]
        total = len(self.source.open)
        told = {"answered": total - len(waiting), "total": total, "question": None}
        told["undo"] = self._can_undo(self.votes.last_of(voter))
        free = [name for name in waiting if self._free(name, voter)]
        own = [name for name in free if self._reserved.get(name, ("", 0.0))[0] == voter]
        if free:
            name = (own or free)[0]
            self._release(voter)
            self._reserved[name] = (voter, time.monotonic())
            question = self.source.known[name]
            shown = {"id": name, "label": question.label, "count": len(question.candidates)}
            return told | {"state": "ask", "question": shown}
        if waiting:
            return told | {"state": "others"}
        if self.live:
            return told | {"state": "ended" if self.source.ended else "wait"}
        return told | {"state": "done", "result": self._result and self._result(self.votes)}

    def _can_undo(self, vote: Vote | None) -> bool:
        return vote is not None and vote.question in self.source.open

    def _free(self, name: str, voter: str) -> bool:
        who, since = self._reserved.get(name, (voter, 0.0))
        return who == voter or time.monotonic() - since > _RESERVED

    def _release(self, voter: str) -> None:
        self._reserved = {name: own for name, own in self._reserved.items() if own[0] != voter}


def shown_order(question: Question) -> list[Candidate]:
    """Return the samples in the order of the page: mixed, but always the same for a question."""
    shown = list(question.candidates)
    random.Random(question.id).shuffle(shown)
    return shown
