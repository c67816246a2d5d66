"""Curves read from event files and CSV: resumed, of tests, damaged, missing."""

from pathlib import Path

import pytest

from lit_rlft.report.curves import read_curves
from tests.report.folders import write_events


def test_a_resumed_run_takes_the_place_of_what_was_lost(tmp_path: Path) -> None:
    write_events(tmp_path, range(5))
    first = next(tmp_path.glob("*tfevents*"))
    first.rename(tmp_path / "events.out.tfevents.1700000000.host.1.0")
    write_events(tmp_path, range(3, 6), offset=0.5)  # from a checkpoint before step 3
    curves = read_curves(tmp_path)
    assert curves.points["train/reward"] == [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert curves.points["val/Reward"] == [(1, 2), (3, 6.5), (5, 10.5)]
    assert curves.over("reward_calls", [-1, 0, 4, 9]) == [None, 100, 500, 600]
    assert curves.over("samples", [0]) == [None] and not curves.notes


def test_tests_and_validations_alone_are_no_curves(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    write_events(tmp_path, range(4))
    writer = SummaryWriter(tmp_path, filename_suffix=".later")
    writer.add_scalar("val/Reward", 99.0, 0)
    writer.close()
    assert read_curves(tmp_path).points["val/Reward"] == [(1, 2), (3, 6)]


@pytest.mark.parametrize("damage", ["cut", "bits", "noise"])
def test_damaged_event_files_are_read_up_to_the_damage(tmp_path: Path, damage: str) -> None:
    write_events(tmp_path, range(9))
    (path,) = tmp_path.glob("*tfevents*")
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    if damage == "bits":
        content[half] ^= 0xFF
    path.write_bytes({"cut": content[:half], "bits": content, "noise": b"nothing" * 9}[damage])
    curves = read_curves(tmp_path)
    (note,) = curves.notes
    assert note.startswith(f"{path.name} is damaged after ") and "curves end there" in note
    found = curves.points.get("train/reward", [])
    assert found == [(i, float(i)) for i in range(len(found))]
    assert len(found) == 0 if damage == "noise" else 2 < len(found) < 8


def test_csv_is_read_where_there_are_no_events(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train/reward,val/Reward,cost/samples\n0,1.5,,8\n1,,2.5,\n1,2.0,,16\n2,broken,,\n"
    )
    curves = read_curves(tmp_path)
    assert curves.points["train/reward"] == [(0, 1.5), (1, 2.0)]
    assert curves.points["val/Reward"] == [(1, 2.5)]
    assert curves.over("samples", [0, 1]) == [8, 16]
    assert curves.notes == ["metrics.csv is damaged after 3 lines; its curves end there"]
    assert read_curves(tmp_path / "nothing").points == {}
