"""Preference files: what is read, and what a bad line is told."""

import json
from pathlib import Path

import pytest

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.preferences import preference_line, read_preferences

GOOD = {"condition": {"prompt": "a"}, "chosen": [1.0, 2.0], "rejected": [0.0, 0.0]}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "votes.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_lines_come_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    lines = [
        preference_line({"prompt": "fox\u2028é"}, "a.png", [1.0], voter="me", seed=3),
        preference_line({}, [2.0], [1.0], time=None),
        preference_line({}, [2.0], [1.0], tie=True),
    ]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(lines) + "\n", encoding="utf-8")
    first, second = read_preferences(path)  # the tie is left out
    assert first == ({"prompt": "fox\u2028é"}, "a.png", [1.0], str(tmp_path), 1, "me")
    assert second == ({}, [2.0], [1.0], str(tmp_path), 2, None)


def test_a_text_is_a_prompt(tmp_path: Path) -> None:
    (pair,) = read_preferences(write(tmp_path, {**GOOD, "condition": "a red fox"}))
    assert pair.condition == {"prompt": "a red fox"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ("no JSON", "one object a line")),
        ([1], ("JSON list", "write an object")),
        ({"chosen": [1.0]}, ("no rejected", "give the path")),
        ({"rejected": [1.0], "chosen": ""}, ("no chosen", "give the path")),
        ({**GOOD, "chosen": 7}, ("chosen is 7", "give the path")),
        ({**GOOD, "rejected": "7.png"}, ("rejected names '7.png'", "relative to the preference")),
        ({**GOOD, "rejected": [1.0, 2.0]}, ("the same sample", "take the line out")),
        ({**GOOD, "condition": ["a"]}, ("condition must be an object", "or a text")),
        ({**GOOD, "tie": 1}, ("tie must be true or false, got 1",)),
        ({**GOOD, "voter": 1}, ("voter must be a text, got 1",)),
    ],
)
def test_a_bad_line_is_named_with_key_and_remedy(
    tmp_path: Path, line: object, words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        read_preferences(write(tmp_path, GOOD, line, GOOD))
    for word in ("votes.jsonl: line 2: ", *words):
        assert word in str(caught.value)


def test_all_bad_lines_are_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: .*line 5: .*and 2 more bad lines$"):
        read_preferences(write(tmp_path, *["{"] * 7, GOOD))


def test_a_file_without_comparisons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no comparisons but 1 ties; write one a line"):
        read_preferences(write(tmp_path, {**GOOD, "tie": True}))
    with pytest.raises(UsageError, match="there is no file"):
        read_preferences(tmp_path / "missing.jsonl")
