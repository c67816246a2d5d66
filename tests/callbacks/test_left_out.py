"""The list of what the data leave out, in the run's folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_rlft.callbacks.left_out import LeftOut
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import NothingLeft
from tests.kit.test_sources import Data, Kept


def trainer(data: Any, folder: Path) -> Any:
    return SimpleNamespace(
        datamodule=data, is_global_zero=True, loggers=[], default_root_dir=str(folder)
    )


def test_the_list_is_kept_in_the_runs_folder(tmp_path: Path) -> None:
    source = Kept(40, tmp_path / "cache", bad=tuple(range(20)))
    other = Kept(9, tmp_path / "cache", bad=(3,))
    data = Data(source, val_source=other)
    data.prepare_data()
    LeftOut().on_train_start(trainer(data, tmp_path / "run"), None)  # type: ignore[arg-type]
    lines = (tmp_path / "run/left_out.txt").read_text().splitlines()
    assert len(lines) == 21 and lines[0].endswith("below 40.txt: number 0 has a bad name.")
    assert lines[-1].endswith("below 9.txt: number 3 has a bad name.")
    sound = Data(Kept(9, tmp_path / "cache"))
    sound.prepare_data()
    for data_module in (sound, object()):
        LeftOut().on_test_start(trainer(data_module, tmp_path / "none"), None)  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


def test_the_list_is_kept_where_nothing_is_left(tmp_path: Path) -> None:
    data = Data(Kept(7, tmp_path / "cache", bad=tuple(range(7))))
    with pytest.raises(UsageError, match=r"every one is listed in .*left_out\.txt") as raised:
        data.prepare_data()
    run = trainer(data, tmp_path / "run")
    LeftOut().on_exception(run, None, UsageError("another"))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    assert isinstance(raised.value.__cause__, NothingLeft)
    LeftOut().on_exception(run, None, raised.value)  # type: ignore[arg-type]
    assert len((tmp_path / "run/left_out.txt").read_text().splitlines()) == 7
