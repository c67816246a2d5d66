"""What there is to judge in a run's folder: a fit's candidates, samples, pictures of two models."""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from lit_rlft.cli.voting.ballot import Ballot, Fixed
from lit_rlft.core.checks import UsageError
from lit_rlft.runs.files import whole
from lit_rlft.runs.lines import read_lines
from lit_rlft.voting.places import BLIND, FOLDER, PAIRS, SAMPLES, content_name, drawing_of
from lit_rlft.voting.questions import Candidate, Question, Questions, pairs_to_show
from lit_rlft.voting.votes import Votes
from lit_rlft.voting.win_rate import WinRate

__all__ = ["blind_ballot", "fit_ballot", "samples_ballot", "win_rate"]

_NOT_CONDITION = ("seed", "rewards", "facts", "file", "checkpoint")
"""Keys of a line of samples.jsonl that are no part of the condition's record."""


def fit_ballot(run: Path) -> Ballot:
    """Return the questions that a fit asks, now and later."""
    folder = run / FOLDER
    return Ballot(folder, Questions(folder), folder, live=True)


def samples_ballot(run: Path, pairs: int | None) -> Ballot:
    """Return comparisons of the samples that `predict` wrote, of one condition each.

    Args:
        run: Its folder.
        pairs: Comparisons of a condition; None for as many as show each sample once.

    Raises:
        UsageError: No condition has two samples that can be shown.
    """
    folder = run / FOLDER
    groups: dict[str, list[Candidate]] = {}
    files: dict[str, Path] = {}
    for line in read_lines(run / "samples.jsonl"):
        record = {key: value for key, value in line.items() if key not in _NOT_CONDITION}
        file = run / SAMPLES / Path(str(line.get("file"))).name  # never outside the folder
        if file.is_file() and (drawing := drawing_of(file)) is not None:
            # Another checkpoint's samples may take the place of these under their names.
            sample = f"{SAMPLES}/{content_name(file.read_bytes())}{file.suffix}"
            files[sample] = file
            candidate = Candidate(sample, f"../{SAMPLES}/{drawing.name}")
            groups.setdefault(json.dumps(record), []).append(candidate)
    questions = []
    for text, candidates in groups.items():
        candidates = [*{one.sample: one for one in candidates}.values()]
        record, size = json.loads(text), len(candidates)
        for i, j in pairs_to_show(size, pairs or size // 2):
            own = (candidates[i], candidates[j])
            questions.append(Question(record, _label(record), own))
    if not questions:
        raise UsageError(
            f"{run / 'samples.jsonl'} has no condition with two samples that can be shown; run "
            "`lit-rlft predict` with model.num_eval_samples 2 or more, in a domain that writes "
            "pictures"
        )

    def keep(question: Question) -> None:
        for one in question.candidates:
            with whole(folder / one.sample) as file:
                file.write(files[one.sample].read_bytes())

    return Ballot(folder, Fixed(questions), run, live=False, keep=keep)


def blind_ballot(run: Path) -> Ballot:
    """Return comparisons of the tuned model's pictures with the reference's, as `test` wrote them.

    Raises:
        UsageError: There are none.
    """
    folder = run / BLIND
    questions = [
        Question({"label": line["label"]}, str(line["label"]), (_picture(line, "tuned"), other))
        for line in read_lines(folder / PAIRS)
        for other in [_picture(line, "reference")]
        if not _same(folder, line)
    ]
    if not questions:
        raise UsageError(
            f"{folder} has no pictures of two models that differ; run `lit-rlft test` with "
            f"--name {run.name} first, which writes them"
        )
    names = {question.id for question in questions}
    same = sum(1 for _ in read_lines(folder / PAIRS)) - len(questions)
    return Ballot(
        folder,
        Fixed(questions),
        folder,
        live=False,
        result=lambda votes: win_rate(votes, names, same).sentence(),
    )


def win_rate(votes: Votes, names: Container[str], same: int) -> WinRate:
    """Return how often the tuned model's picture was preferred.

    Args:
        votes: Also on pictures of other checkpoints, which do not count.
        names: The questions that count.
        same: Pairs of equal pictures, which are ties.
    """
    chosen = [vote.chosen for name, vote in votes.by_question.items() if name in names]
    wins = sum(one is not None and one.startswith("tuned/") for one in chosen)
    ties = sum(one is None for one in chosen)
    return WinRate(wins, len(chosen) - wins - ties, ties + same)


def _picture(line: Mapping[str, Any], arm: str) -> Candidate:
    return Candidate(str(line[arm]), str(line[arm]))


def _same(folder: Path, line: Mapping[str, Any]) -> bool:
    files = [folder / str(line[arm]) for arm in ("tuned", "reference")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"there is no file {missing[0]}; run `lit-rlft test` again")
    return files[0].read_bytes() == files[1].read_bytes()


def _label(record: Mapping[str, Any]) -> str:
    """Return a condition for a reader: its words and numbers."""
    if set(record) == {"prompt"}:
        return str(record["prompt"])
    plain = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())
