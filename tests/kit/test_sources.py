"""Sources: arrays are kept once; splits of one source or of several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.kit.bad_entries import BadEntry, Report, usable
from lit_rlft.kit.data import Rows, Split
from lit_rlft.kit.sources import CachedSource, Source, SourceData, Splits


class Numbers:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)


class Kept(CachedSource[Numbers]):
    """The numbers below `size`; negative ones and those of `bad` are left out."""

    noun = "numbers"
    packed = Numbers
    names = ("values",)

    def __init__(
        self, size: int, cache_dir: Path, *, bad: tuple[int, ...] = (), unit: str = "m"
    ) -> None:
        super().__init__("numbers", str(cache_dir))
        self.size, self.bad, self.unit = size, bad, unit
        self.made = 0

    @property
    def label(self) -> str:
        return f"all numbers/below {self.size}.txt"

    def identity(self) -> list[Any]:
        return [self.size, self.bad]

    def kind(self) -> str:
        return f"numbers in {self.unit}"

    def pack(self) -> tuple[Numbers, Report]:
        self.made += 1
        report = Report(self.label, self.noun)
        fault = lambda n: BadEntry(f"number {n}", "a bad name") if n in self.bad else None  # noqa: E731
        values = np.array(list(usable(range(self.size), fault, report)))
        report.check()
        return Numbers(values), report


class Standard(Source[Numbers]):
    """Ten numbers with standard splits, of which the last is as long as it is told."""

    def __init__(self, num_test: int) -> None:
        self.num_test = num_test

    def load(self) -> Numbers:
        return Numbers(np.arange(10))

    def kind(self) -> str:
        return "numbers in m"

    def splits(self, packed: Numbers) -> Splits | None:
        return {"train": np.arange(5), "val": np.arange(5, 8), "test": np.arange(self.num_test)}


class Data(SourceData[Numbers]):
    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        packed, places = self.chosen(split)
        return Rows(len(places), lambda i: {"number": int(packed.values[places[i]])})


def numbers(data: Data, split: Split) -> list[int]:
    rows = data.rows(split)
    return [rows[i]["number"] for i in range(len(rows))]  # type: ignore[arg-type]


def test_arrays_are_made_once_and_named_by_what_they_depend_on(tmp_path: Path) -> None:
    first, again, other = Kept(9, tmp_path), Kept(9, tmp_path), Kept(9, tmp_path, bad=(3,))
    first.prepare()
    assert list(first.load().values) == list(again.load().values) == list(range(9))
    assert list(other.load().values) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert (first.made, again.made, other.made) == (1, 0, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(name.startswith("below-9-") for name in names)
    text = (tmp_path / f"below-9-{other.digest()}/left_out.txt").read_text()
    assert text == "all numbers/below 9.txt: number 3 has a bad name.\n"


def test_splits_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    data = Data(Kept(40, tmp_path), val_fraction=0.25, test_fraction=0.1, num_val=4)
    data.prepare_data()
    data.setup("fit")
    train, val, test = (numbers(data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (26, 4, 4)
    assert len({*train, *val, *test}) == 34
    data.limits["val"] = None
    assert sorted([*train, *numbers(data, "val"), *test]) == list(range(40))


def test_own_sources_and_standard_splits(tmp_path: Path) -> None:
    data = Data(Kept(20, tmp_path), val_source=Kept(3, tmp_path), test_source=Kept(2, tmp_path))
    data.setup("fit")
    assert sorted(numbers(data, "train")) == list(range(20))
    assert numbers(data, "val") == [0, 1, 2] and numbers(data, "test") == [0, 1]
    data = Data(Standard(2), val_fraction=0.5)
    data.setup("fit")
    assert [numbers(data, split) for split in ("train", "val", "test")] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7],
        [0, 1],
    ]


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    metres, feet = Kept(9, tmp_path), Kept(9, tmp_path, unit="ft")
    with pytest.raises(UsageError, match=r"val_source has numbers in ft, but source has .* in m"):
        Data(metres, val_source=feet).setup("fit")
    with pytest.raises(UsageError, match="has 2 numbers, too few for three splits"):
        Data(Kept(2, tmp_path)).setup("fit")
    with pytest.raises(UsageError, match="Standard has 10 entries, too few"):
        Data(Standard(0)).setup("fit")


class Missing(Kept):
    def identity(self) -> list[Any]:
        raise UsageError("there is no file numbers.txt")


@pytest.mark.parametrize("name", ["source", "val_source", "test_source"])
def test_errors_name_the_setting_that_gave_the_data(name: str, tmp_path: Path) -> None:
    sources = {"source": Kept(20, tmp_path), name: Missing(3, tmp_path)}
    for step in (Data.prepare_data, lambda data: data.setup("fit")):
        with pytest.raises(BadArgument) as raised:
            step(Data(**sources))
        message = f"Data: {name} cannot be used: there is no file numbers.txt"
        assert str(raised.value) == message


def test_a_strict_report_stops_at_the_first_bad_entry() -> None:
    report = Report("a.txt", "lines", strict=True)
    entries = ["good", BadEntry("line 2", "no number"), "never read"]
    found = usable(entries, lambda _: None, report)
    assert next(found) == "good"
    with pytest.raises(UsageError, match=r"a.txt: line 2 has no number; fix the file, or set"):
        next(found)
    assert report.num_kept == 1
