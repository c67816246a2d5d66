"""A person as the reward: candidates are compared on the page of `lit-rlft vote`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError, at_least, one_of, positive
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.kit.records import plain
from lit_rlft.voting.desk import Desk
from lit_rlft.voting.drawings import clean_drawings, write_drawings
from lit_rlft.voting.groups import Group
from lit_rlft.voting.questions import Candidate
from lit_rlft.voting.scores import Choice, bradley_terry, wins

__all__ = ["HumanPreference"]

_MOST_SHOWN = 9
"""Samples of one question at most: there are no more keys with digits."""

Show = Literal["pairs", "groups"]
Values = Literal["scores", "wins"]


class _Offered(NamedTuple):
    """Samples as they were offered.

    Attributes:
        samples: The very object.
        rows: Which of the round's samples they are.
    """

    samples: Any
    rows: range


class _Waiting(NamedTuple):
    """A sample whose group is not complete."""

    candidate: Candidate
    condition: Mapping[str, Any]
    label: str


class HumanPreference(Reward):
    """Asks a person which of a condition's candidates is the better one.

    The fit writes the candidates of a round into `votes/` in its folder and waits. `lit-rlft vote
    runs/NAME`, another program, shows them on a page and appends the votes to `votes/votes.jsonl`,
    which is a preference file too. Either program may be killed and started again: no vote is lost,
    and candidates that were voted on are not shown again.

    A candidate that was in no comparison with an answer has no reward: it is left out like a sample
    whose reward failed. Nobody is asked in `validate`, `test` and `predict`; add metrics to measure
    there. Rewards of different groups cannot be compared: use algorithms that compare within one.

    Args:
        show: "pairs" shows two candidates at a time, "groups" all of a condition, 9 at most.
        pairs: Comparisons of a condition where pairs are shown; as many as show each candidate once
            unless given.
        values: "scores" are those of the Bradley-Terry model, 0 for a tie. "wins" are shares of
            comparisons won: 1 for a candidate that won all, so that `Threshold` accepts what was
            chosen.
        prior: Precision of the normal prior of scores; smaller values let votes move them further.
        timeout: Seconds without a vote after which the run goes on with the votes there are; null
            waits for ever.
        undo_seconds: How long the last vote of a round can still be taken back.

    Raises:
        BadArgument: A setting is impossible.
        UsageError: Asked where no run has said where to write.

    References:
        Rank Analysis of Incomplete Block Designs (Bradley and Terry, 1952)
    """

    waits = True
    asks = True

    def __init__(
        self,
        show: Show = "pairs",
        pairs: int | None = None,
        values: Values = "scores",
        prior: float = 1.0,
        timeout: float | None = None,
        undo_seconds: float = 2.0,
    ) -> None:
        super().__init__()
        one_of(self, "show", get_args(Show), show)
        one_of(self, "values", get_args(Values), values)
        at_least(1, self, pairs=pairs)
        at_least(0, self, undo_seconds=undo_seconds)
        positive(self, prior=prior, timeout=timeout)
        self.show, self.pairs, self.values = show, pairs, values
        self.prior, self.timeout, self.undo_seconds = prior, timeout, undo_seconds
        self._pipeline: tuple[Pipeline, ...] = ()  # a tuple, or it would be a part of the reward
        self._desk: Desk | None = None
        self.begin_round(0)

    def check(self, pipeline: Pipeline) -> None:
        self._pipeline = (pipeline,)

    def open(
        self,
        folder: Path,
        num_candidates: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Say where questions and votes lie; a run calls it before it trains.

        Args:
            folder: Of the votes.
            num_candidates: M, samples of a condition.
            rank: This process.
            world_size: Number of processes.
            stopping: Whether the run was asked to end: it then goes on with the votes there are.

        Raises:
            BadArgument: There are too few or too many candidates.
        """
        if num_candidates < 2:
            problem = f"needs 2 candidates a condition or more, got {num_candidates}"
            raise BadArgument(self, "show", f"{problem}; raise model.init_args.num_candidates")
        if self.show == "groups" and num_candidates > _MOST_SHOWN:
            problem = f"groups can show {_MOST_SHOWN} candidates at most, got {num_candidates}"
            raise BadArgument(self, "show", f"{problem}; set it to pairs")
        clean_drawings(folder, rank)
        self._desk = Desk(folder, num_candidates, rank, world_size, stopping)
        self._desk.start()

    def close(self) -> None:
        """Tell the page that the run asks nothing more; a run calls it after it has trained."""
        self._asking().end()

    def begin_round(self, number: int) -> None:
        """Forget what an earlier round has left, and take the number of the next one."""
        self._number, self._num_offered = number, 0
        self._offered: list[_Offered] = []
        self._rest: list[_Waiting] = []
        self._groups: list[Group] = []
        self._rewards: Tensor | None = None

    def offer(self, samples: Any, condition: Condition) -> None:
        """Write samples down; the page shows a group as soon as all of it is there."""
        desk, (pipeline,) = self._asking(), self._pipeline
        if self._rewards is not None:  # the round before is over
            self.begin_round(self._number + 1)
        drawn = write_drawings(pipeline, samples, condition, desk.folder, desk.rank)
        rows = range(self._num_offered, self._num_offered + len(drawn))
        self._num_offered = rows.stop
        self._offered.append(_Offered(samples, rows))
        self._rest += [
            _Waiting(candidate, plain(entry), pipeline.describe(entry))
            for candidate, entry in zip(drawn, condition.each(), strict=True)
        ]
        size, new = desk.num_candidates, []
        while len(self._rest) >= size:
            new.append(self._group(self._rest[:size]))
            del self._rest[:size]
        self._groups += new
        desk.ask([question for group in new for question in group.questions])

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return rewards [B], after all that was offered in the round has its votes."""
        found = next((one for one in self._offered if one.samples is samples), None)
        if found is None:  # nobody is asked in evaluations
            return torch.full((len(condition),), torch.nan)
        if self._rewards is None:
            self._rewards = self._answered()
        self._offered = [one for one in self._offered if one is not found]
        return self._rewards[found.rows.start : found.rows.stop].float()

    def __getstate__(self) -> dict[str, Any]:
        """Copies take along neither the pipeline nor what is being asked."""
        held = super().__getstate__()  # type: ignore[no-untyped-call]
        nothing: dict[str, Any] = {"_offered": [], "_rest": [], "_groups": [], "_rewards": None}
        return {**held, "_pipeline": (), "_desk": None, **nothing}

    def _asking(self) -> Desk:
        if self._desk is None or not self._pipeline:
            raise UsageError(
                "HumanPreference was not told where to ask; add lit_rlft.callbacks.voting.Voting() "
                "to the trainer's callbacks, as `lit-rlft fit` does"
            )
        return self._desk

    def _group(self, own: Sequence[_Waiting]) -> Group:
        first, whole = own[0], self.show == "groups"
        candidates = [one.candidate for one in own]
        about = (first.condition, first.label, self._number)
        return Group.of(candidates, *about, pairs=self.pairs, whole=whole)

    def _answered(self) -> Tensor:
        """Wait for votes; return the rewards of all that was offered, NaN without an answer."""
        asked = [question for group in self._groups for question in group.questions]
        votes = self._asking().wait(
            asked, self._number, timeout=self.timeout, undo_seconds=self.undo_seconds
        )
        known = [group.rewards(votes, self._score) for group in self._groups]
        rest = torch.full((len(self._rest),), torch.nan, dtype=torch.float64)
        return torch.cat([*known, rest])

    def _score(self, num_samples: int, choices: Sequence[Choice]) -> Tensor:
        if self.values == "wins":
            return wins(num_samples, choices)
        return bradley_terry(num_samples, choices, self.prior)
