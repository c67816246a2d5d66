"""Inverted noise on disk: what is written is read, what is damaged or of something else is seen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.algorithms.inverse_noise_correction import noise_store
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import index
from lit_rlft.distributed import together
from lit_rlft.runs.files import write_whole

STATES = torch.arange(70, dtype=torch.float32).reshape(10, 7).reshape(10, 7, 1)
IDENTITY = {"num_steps": 8, "data": [0.5, -1.0], "data_noise": 0.0, "pretrained": "abc"}


def stored(folder: Path) -> InvertedNoise:
    """Ten rows in shards of four, four and two."""
    store = InvertedNoise(folder / "noise", 10, 4)
    store.claim(IDENTITY)
    for shard in range(store.num_shards):
        rows = store.rows(shard)
        store.write(shard, STATES[rows.start : rows.stop], {"num_rows": len(rows)}, shard)
    return store


def test_rows_are_read_as_written_in_any_order(tmp_path: Path) -> None:
    store = stored(tmp_path)
    assert store.num_shards == 3 and list(store.rows(2)) == [8, 9]
    rows = torch.tensor([9, 0, 5, 0])
    assert torch.equal(store.read(rows), STATES[rows])  # type: ignore[arg-type]
    assert [note["num_rows"] for note in store.all_notes()] == [4, 4, 2]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        *(f"0000{i}.{end}" for i in range(3) for end in ("json", "x_1.npy")),
        "noise.json",
    ]


def test_fields_are_read_as_written(tmp_path: Path) -> None:
    state = {"box": torch.randn(3, 2, 4), "atoms": torch.randn(3, 5).double()}
    store = InvertedNoise(tmp_path, 3, 8)
    store.write(0, state, {}, 0)
    rows = torch.tensor([2, 0])
    expected = {name: values[rows].float() for name, values in state.items()}
    torch.testing.assert_close(store.read(rows), expected, rtol=0, atol=0)


def test_reading_maps_the_file(tmp_path: Path) -> None:
    store = stored(tmp_path)
    store.read(torch.tensor([4]))
    assert set(store._open) == {1}
    assert type(store._open[1]["x_1"]).__name__ == "memmap"


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "gone", "no notes", "notes cut", "", "null", "[1]", "{}"]
)
def test_damage_is_seen_and_mended(tmp_path: Path, damage: str) -> None:
    store = stored(tmp_path)
    values, notes = store.folder / "00001.x_1.npy", store.folder / "00001.json"
    if damage == "flip":
        content = bytearray(values.read_bytes())
        content[-3] ^= 1
        values.write_bytes(content)
    elif damage == "cut":
        values.write_bytes(values.read_bytes()[:-1])
    elif damage == "gone":
        values.unlink()
    elif damage == "no notes":
        notes.unlink()
    elif damage == "notes cut":
        notes.write_text(notes.read_text()[:-5])
    else:
        notes.write_text(damage)
    assert [store.finished(shard) for shard in range(3)] == [True, False, True]
    store.write(1, STATES[4:8] + 1, {"num_rows": 4}, 2)
    assert store.finished(1)
    assert torch.equal(store.read(torch.tensor([5])), STATES[[5]] + 1)  # type: ignore[arg-type]


def test_notes_are_as_they_were_written_or_do_not_count(tmp_path: Path) -> None:
    store = stored(tmp_path)
    notes = store.folder / "00001.json"
    assert '"num_rows": 4' in notes.read_text()
    notes.write_text(notes.read_text().replace('"num_rows": 4', '"num_rows": 5'))
    assert not store.finished(1)
    with pytest.raises(UsageError, match=r"00001\.json is damaged; run the same command again"):
        list(store.all_notes())


def test_a_file_that_is_not_what_was_to_be_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a failing disk: the checksum is that of the bytes before they are written."""

    def failing(path: Path, content: bytes) -> Path:
        return write_whole(path, content if ".npy" not in path.name else content[:-1] + b"?")

    monkeypatch.setattr(noise_store, "write_whole", failing)
    store = stored(tmp_path)
    assert [store.finished(shard) for shard in range(3)] == [False] * 3


@pytest.mark.parametrize("damage", ["", "null", "[]", '{"num_steps": 8', "gone"])
def test_a_damaged_claim_is_written_anew_and_shards_are_trusted_by_their_own(
    tmp_path: Path, damage: str
) -> None:
    store = stored(tmp_path)
    path = store.folder / "noise.json"
    path.unlink() if damage == "gone" else path.write_text(damage)
    again = InvertedNoise(store.folder, 10, 4)
    again.claim(IDENTITY)
    assert json.loads(path.read_text())["num_steps"] == 8
    assert all(map(again.finished, range(3)))
    path.unlink() if damage == "gone" else path.write_text(damage)
    other = InvertedNoise(store.folder, 10, 4)
    other.claim({**IDENTITY, "pretrained": "abd"})
    assert not any(map(other.finished, range(3)))
    other.write(0, STATES[:4] + 1, {"num_rows": 4}, 0)
    assert [other.finished(shard) for shard in range(3)] == [True, False, False]


def test_what_one_process_raises_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = [None]
    handed: list[Any] = []

    def all_gather(values: list[Any], value: Any) -> None:
        handed.append(value)
        values[:] = [others[-1], value]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    with together(2):
        pass
    with pytest.raises(KeyError, match="atoms"), together(2):
        raise KeyError("atoms")
    others += handed[-1:]
    with (
        pytest.raises(UsageError, match=r"another process failed \(KeyError: 'atoms'\)"),
        together(2),
    ):
        pass


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    store = stored(tmp_path)
    InvertedNoise(store.folder, 10, 4).claim({**IDENTITY, "data": [0.5 + 1e-5, -1.0]})
    for name, value in [
        ("num_steps", 9),
        ("data_noise", 1e-3),
        ("data", [0.51, -1.0]),
        ("data", None),
        ("data", [0.5]),
        ("pretrained", "abd"),
    ]:
        with pytest.raises(UsageError, match=rf"other {name}.*noise_folder"):
            InvertedNoise(store.folder, 10, 4).claim({**IDENTITY, name: value})
    with pytest.raises(UsageError, match="other num_rows"):
        InvertedNoise(store.folder, 11, 4).claim(IDENTITY)
    assert json.loads((store.folder / "noise.json").read_text())["num_steps"] == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize("file", ["00002.x_1.npy", "00002.json"])
def test_a_full_disk_ends_with_one_sentence_and_keeps_what_is_there(
    tmp_path: Path, file: str
) -> None:
    store = stored(tmp_path)
    (store.folder / file).unlink()
    (store.folder / f"{file}.partial").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"disk is full after 2 of 3 shards.*same command again"):
        store.write(2, STATES[8:], {"num_rows": 2}, 2)
    assert [store.finished(shard) for shard in range(3)] == [True, True, False]
    assert not list(store.folder.glob("*.partial"))
    store.write(2, STATES[8:], {"num_rows": 2}, 2)
    assert store.finished(2)
    torch.testing.assert_close(store.read(torch.arange(10)), index(STATES, slice(0, 10)))
