"""The files of questions and votes: whole, readable, and counted once."""

import json
import os
from pathlib import Path

import pytest

from lit_rlft.kit.preferences import read_preferences
from lit_rlft.runs.lines import append_lines, read_lines
from lit_rlft.voting.questions import Question, QuestionFile, Questions
from lit_rlft.voting.votes import Votes
from tests.voting.client import questions


def test_votes_are_a_file_of_preferences(tmp_path: Path) -> None:
    pair, four, tied = (
        *questions(tmp_path, 1),
        questions(tmp_path, 2, 4)[1],
        questions(tmp_path, 3)[2],
    )
    votes = Votes(tmp_path)
    votes.add(pair, "samples/0-1.png", "anna")
    votes.add(four, "samples/1-2.png", "bo")
    votes.add(tied, None, "anna")
    pairs = read_preferences(tmp_path / "votes.jsonl")
    assert [(p.chosen, p.rejected) for p in pairs] == [
        ("samples/0-1.png", "samples/0-0.png"),
        *(("samples/1-2.png", f"samples/1-{i}.png") for i in (0, 1, 3)),
    ]
    assert pairs[0].condition == {"prompt": "prompt 0"} and pairs[1].voter == "bo"
    again = Votes(tmp_path)
    assert again.refresh() and again.by_question == votes.by_question
    assert [vote.chosen for vote in again.by_question.values()] == [
        "samples/0-1.png",
        "samples/1-2.png",
        None,
    ]


@pytest.mark.parametrize("torn", ['{"condition": {"pro', "{", "x" * 10_000])
def test_a_line_that_was_torn_is_not_there(tmp_path: Path, torn: str) -> None:
    first, second, third = questions(tmp_path, 3)
    votes = Votes(tmp_path)
    votes.add(first, None, "anna")
    whole = votes.path.read_bytes()
    with votes.path.open("a") as file:
        file.write(torn)
    again = Votes(tmp_path)
    again.refresh()
    assert list(again.by_question) == [first.id]
    again.add(second, "samples/1-0.png", "anna")
    with votes.path.open("a") as file:
        file.write(torn)
    assert len(read_preferences(votes.path)) == 1
    again.add(third, None, "anna")
    assert votes.path.read_bytes().startswith(whole)
    assert len(list(read_lines(votes.path))) == votes.path.read_bytes().count(b"\n") == 3


def test_a_vote_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    Votes(tmp_path).add(questions(tmp_path, 1)[0], None, "anna")
    assert synced == [(tmp_path / "votes.jsonl").stat().st_size]


def test_a_vote_taken_back_leaves_the_others(tmp_path: Path) -> None:
    asked = questions(tmp_path, 3, 3)
    votes = Votes(tmp_path)
    for question in asked:
        votes.add(question, question.candidates[1].sample, "anna")
    last = votes.last_of("anna")
    assert last is not None and last.question == asked[2].id and votes.last_of("bo") is None
    votes.remove(votes.by_question[asked[1].id])
    assert list(votes.by_question) == [asked[0].id, asked[2].id]
    assert len(read_preferences(votes.path)) == 4
    votes.add(asked[1], None, "bo")
    numbers = [line["vote"] for line in read_lines(votes.path)]
    assert numbers == [1, 1, 3, 3, 4, 4]


def test_questions_of_two_processes_are_known_open_and_closed(tmp_path: Path) -> None:
    asked = [Question(q.condition, q.label, q.candidates, 5) for q in questions(tmp_path, 4)]
    first, second, reader = (
        QuestionFile(tmp_path, 0),
        QuestionFile(tmp_path, 1),
        Questions(tmp_path),
    )
    first.ask(asked[:2])
    second.ask(asked[2:])
    first.ready(5)
    reader.refresh()
    assert [*reader.known.values()] == asked and reader.open == set(reader.known)
    assert reader.ready == {0: 5} and set(reader.open_of(5, but=0)) == {q.id for q in asked[2:]}
    first.close([asked[0].id], 5, "trained")
    second.close([], 5, "stopped")
    reader.refresh()
    assert asked[0].id not in reader.open and reader.stopped == {1: 5}
    first.ask(asked[:1])  # a run that was killed has resumed
    reader.refresh()
    assert asked[0].id in reader.open


def test_names_of_questions_are_of_condition_and_samples(tmp_path: Path) -> None:
    one, other = questions(tmp_path, 2)
    same = Question(dict(one.condition), "other words", one.candidates, 7)
    assert same.id == one.id != other.id
    assert Question({"prompt": "else"}, one.label, one.candidates).id != one.id


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\x00\x00\x00\n[1]\n\n{"a": 2}\n{"a": 3')
    assert [line["a"] for line in read_lines(path)] == [1, 2]
    append_lines(path, json.dumps({"a": 4}) + "\n")
    assert [line["a"] for line in read_lines(path)] == [1, 2, 4]
