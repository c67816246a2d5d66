"""The candidates of one condition, what a person is asked about them, and what follows from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_rlft.voting.questions import Candidate, Question, pairs_to_show
from lit_rlft.voting.scores import Choice
from lit_rlft.voting.votes import Vote

__all__ = ["Group"]


@dataclass(frozen=True)
class Group:
    """Candidates of one condition; equal ones are one sample that is shown once.

    Attributes:
        places: Which of the different samples each candidate is.
        questions: About the different samples; none where all are equal.
        shown: Which of the samples each question shows.
    """

    places: tuple[int, ...]
    questions: tuple[Question, ...]
    shown: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        condition: Mapping[str, Any],
        label: str,
        number: int,
        *,
        pairs: int | None,
        whole: bool,
    ) -> "Group":
        """Return the group and its questions.

        Args:
            candidates: M.
            condition: Their record, as JSON can hold it.
            label: The same for a reader.
            number: Of the round.
            pairs: How many pairs are shown; None for as many as show each sample once.
            whole: One question shows all samples instead.
        """
        samples = list(dict.fromkeys(candidates))
        places = tuple(samples.index(one) for one in candidates)
        if len(samples) < 2:
            return cls(places, (), ())
        shown: list[tuple[int, ...]] = [tuple(range(len(samples)))]
        if not whole:
            shown = [*pairs_to_show(len(samples), pairs or len(samples) // 2)]
        questions = [
            Question(condition, label, tuple(samples[i] for i in own), number) for own in shown
        ]
        return cls(places, tuple(questions), tuple(shown))

    def rewards(
        self, votes: Mapping[str, Vote], score: Callable[[int, Sequence[Choice]], Tensor]
    ) -> Tensor:
        """Return the reward of each candidate, [M], NaN where votes say nothing of it.

        Args:
            votes: By the question's name.
            score: From a number of samples and choices among them to their rewards.
        """
        choices = []
        for question, shown in zip(self.questions, self.shown, strict=True):
            if (vote := votes.get(question.id)) is not None:
                places = {one.sample: i for one, i in zip(question.candidates, shown, strict=True)}
                chosen = None if vote.chosen is None else places.get(vote.chosen)
                choices.append(Choice(shown, chosen))
        return score(max(self.places) + 1, choices)[list(self.places)]
