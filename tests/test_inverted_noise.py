"""Inverted noise on disk: what is written is read, what is damaged or of something else is seen."""

import json
from pathlib import Path

import pytest
import torch

from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import index
from lit_rlft.inverted_noise import InvertedNoise

STATES = torch.arange(70, dtype=torch.float32).reshape(10, 7).reshape(10, 7, 1)
IDENTITY = {"num_steps": 8, "data": [0.5, -1.0], "pretrained": "abc"}


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


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no notes", "notes cut"])
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
    else:
        notes.write_text(notes.read_text()[:-5])
    assert [store.finished(shard) for shard in range(3)] == [True, False, True]
    store.write(1, STATES[4:8] + 1, {"num_rows": 4}, 2)
    assert store.finished(1)
    assert torch.equal(store.read(torch.tensor([5])), STATES[[5]] + 1)  # type: ignore[arg-type]


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    store = stored(tmp_path)
    InvertedNoise(store.folder, 10, 4).claim({**IDENTITY, "data": [0.5 + 1e-5, -1.0]})
    for name, value in [
        ("num_steps", 9),
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
