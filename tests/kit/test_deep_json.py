"""JSON whose lists lie deeper in each other than Python reads: damage like any other."""

from pathlib import Path

import pytest

from domains.layout.sources.formats import page_of, read_rico
from lit_rlft.core.checks import UsageError, from_json
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.preferences import preference_line, read_preferences
from lit_rlft.kit.weight_file import check_file
from lit_rlft.kit.whole_folder import check_whole
from lit_rlft.runs.lines import read_lines
from lit_rlft.runs.results import checkpoint_of

DEEP = "[" * 100_000


def test_it_is_no_json() -> None:
    assert from_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="too deep in each other"):
        from_json(DEEP)


def test_readers_leave_it_out(tmp_path: Path) -> None:
    page = page_of("page", DEEP)
    assert isinstance(page, BadEntry) and "too deep" in str(page)
    path = tmp_path / "0.json"
    path.write_text(DEEP)
    assert [isinstance(entry, BadEntry) for entry in read_rico(tmp_path)] == [True]
    assert checkpoint_of(path) == "an unnamed checkpoint"
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f'{DEEP}\n{{"a": 1}}\n')
    assert list(read_lines(lines)) == [{"a": 1}]
    lines.write_text(preference_line({}, [1.0], [2.0]) + DEEP)
    assert len(read_preferences(lines)) == 1


def test_readers_refuse_it_in_a_sentence(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(len(DEEP + "{").to_bytes(8, "little") + b"{" + DEEP.encode())
    with pytest.raises(UsageError, match=r"key: .*model\.safetensors is no safetensors file"):
        check_file(weights, "key")
    (tmp_path / "model_index.json").write_text(DEEP)
    with pytest.raises(UsageError, match=r"key: .*model_index\.json is no JSON file; copy"):
        check_whole(tmp_path, (), None, "key")
