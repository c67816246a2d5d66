"""Inverted noise is made once: continued, shared, repaired, and never mixed with other noise."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from lit_rlft.algorithms.inverse_noise_correction.inversion import Inversion
from lit_rlft.core.checks import UsageError
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.data import Rows, collate
from tests.algorithms.inverse_noise_correction_support import (
    MIXTURE,
    STEPS,
    Biased,
    MoreBiased,
    fit,
    points,
    store_of,
    tuner_of,
)


def points_rows() -> Any:
    data = points()
    data.setup("fit")
    return data.rows("train")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_missing_is_shared_out_evenly(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four shards the first process's two are finished: each makes one of the others."""
    fit(tuner_of(Biased(), shard_size=5), points(), tmp_path)
    before, store = stamps(tmp_path), store_of(tmp_path, shard_size=5)
    for shard in (1, 3):
        (store.folder / f"0000{shard}.json").unlink()

    def lacking(value: Any, world_size: int) -> list[Any]:
        return [value] if value == "" or world_size == 1 else [[], [1, 3]]

    monkeypatch.setattr("lit_rlft.algorithms.inverse_noise_correction.inversion.gather", lacking)
    monkeypatch.setattr("lit_rlft.distributed.gather", lacking)
    tuner = tuner_of(Biased(), shard_size=5)
    tuner.setup("fit")
    tuner.trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        default_root_dir=tmp_path,
        loggers=[],
        callbacks=[],
        progress_bar_callback=None,
    )
    with torch.no_grad():
        inversion = tuner.inversion(points_rows(), collate)
        inversion.run(tuner._identity(), rank, 2, lambda items, label: items)
    after = stamps(tmp_path)
    made = {name[:5] for name in after if after[name] != before[name]} - {"noise"}
    assert made == {f"0000{1 + 2 * rank}"}


def rows_of(tuner: Any) -> list[int]:
    """Return a list that grows by the number of rows of every call of the base."""
    seen: list[int] = []
    tuner.pipeline.denoiser.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    return seen


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "inverted_noise").iterdir()}


def test_an_interrupted_inversion_continues_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    calls = 0
    invert = Inversion.invert

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop
        return invert(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Inversion, "invert", interrupted)
        fit(tuner_of(Biased()), points(), tmp_path)
    store = store_of(tmp_path)
    assert [store.finished(shard) for shard in range(3)] == [True, True, False]
    before, again = stamps(tmp_path), tuner_of(Biased())
    seen = rows_of(again)
    fit(again, points(), tmp_path)
    after = stamps(tmp_path)
    assert all(after[name] == before[name] for name in before)
    assert store.finished(2)
    # Four rows, fewer and fewer, and the four samples by which the noise is recognised.
    assert max(seen) == 4
    whole = tmp_path / "whole"
    fit(tuner_of(Biased()), points(), whole)
    every = torch.arange(20)
    assert torch.equal(store.read(every), store_of(whole).read(every))  # type: ignore[arg-type]


def test_a_corrupt_shard_is_made_anew_and_the_others_are_left(tmp_path: Path) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    store, every = store_of(tmp_path), torch.arange(20)
    good, before = store.read(every), stamps(tmp_path)
    path = store.folder / "00001.x_1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    fit(tuner_of(Biased()), points(), tmp_path)
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        "00001.json",
        "00001.x_1.npy",
    }
    assert torch.equal(store_of(tmp_path).read(every), good)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_full_disk_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "inverted_noise"
    folder.mkdir()
    (folder / "00001.x_1.npy.partial").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="disk is full after 1 of 3 shards"):
        fit(tuner_of(Biased()), points(), tmp_path)
    before = stamps(tmp_path)
    fit(tuner_of(Biased()), points(), tmp_path)
    assert stamps(tmp_path)["00000.x_1.npy"] == before["00000.x_1.npy"]
    assert all(map(store_of(tmp_path).finished, range(3)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"sampler": Sampler(STEPS + 1)}, "num_steps"),
        ({"data_noise": 1e-3}, "data_noise"),
        ({"shard_size": 7}, "shard_size"),
    ],
)
def test_noise_of_other_settings_is_not_mixed_in(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    with pytest.raises(UsageError, match=rf"other {what}.*delete the folder"):
        fit(tuner_of(Biased(), **change), points(), tmp_path)


def test_noise_of_other_data_or_another_sampler_is_not_mixed_in(tmp_path: Path) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased()), points(seed=1), tmp_path)
    with pytest.raises(UsageError, match="other sampler"):
        fit(tuner_of(MoreBiased()), points(), tmp_path)


class Altered(MixtureData):
    """Points some of which are others, by what `change` does to all of them [n, 2]."""

    def __init__(self, change: Callable[[Tensor], Tensor], num: int = 20) -> None:
        super().__init__(**MIXTURE, num_train=num, batch_size=4)
        self.change = change

    def rows(self, split: Any) -> Any:
        rows = super().rows(split)
        x_0 = self.change(torch.stack([rows[i]["x_0"] for i in range(len(rows))]))
        return Rows(len(rows), lambda i: {**rows[i], "x_0": x_0[i]})


def later(x_0: Tensor) -> Tensor:
    return torch.cat([x_0[:-1], x_0[-1:] + 0.1])


@pytest.mark.parametrize(
    "change",
    [later, lambda x: x.flip(1), lambda x: x[[*range(10), 11, 10, *range(12, 20)]], lambda x: -x],
    ids=["a later row", "flipped", "two swapped", "negative"],
)
def test_changed_data_are_not_taken_for_those_that_were_inverted(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    fit(tuner_of(Biased()), Altered(lambda x: x), tmp_path)
    fit(tuner_of(Biased()), Altered(lambda x: x + 1e-4), tmp_path)  # another machine's rounding
    with pytest.raises(UsageError, match=r"other data.*delete the folder"):
        fit(tuner_of(Biased()), Altered(change), tmp_path)


def test_of_many_rows_those_in_between_are_not_looked_at(tmp_path: Path) -> None:
    """Of 200 rows 64, from the first to the last; of 200 shards one row each."""

    def between(x_0: Tensor) -> Tensor:
        return torch.cat([x_0[:1], x_0[1:2] + 1, x_0[2:]])

    few = {"shard_size": 50, "noise_folder": str(tmp_path / "few")}
    fit(tuner_of(Biased(), **few), Altered(lambda x: x, 200), tmp_path)
    fit(tuner_of(Biased(), **few), Altered(between, 200), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased(), **few), Altered(later, 200), tmp_path)
    many = {"shard_size": 1, "noise_folder": str(tmp_path / "many")}
    fit(tuner_of(Biased(), **many), Altered(lambda x: x, 90), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased(), **many), Altered(between, 90), tmp_path)


def test_data_that_are_random_are_not_compared(tmp_path: Path) -> None:
    class Random(MixtureData):
        def rows(self, split: Any) -> Any:
            rows = super().rows(split)
            return Rows(len(rows), lambda i: {**rows[i], "x_0": torch.randn(2)})

    for _ in range(2):
        fit(tuner_of(Biased()), Random(**MIXTURE, num_train=20, batch_size=4), tmp_path)
    identity = json.loads((tmp_path / "inverted_noise/noise.json").read_text())
    assert identity["data"] is None and identity["num_steps"] == STEPS


def test_noise_can_be_shared_between_runs(tmp_path: Path) -> None:
    shared = {"noise_folder": str(tmp_path / "noise")}
    fit(tuner_of(Biased(), **shared), points(), tmp_path / "first")
    other = tuner_of(Biased(), **shared, width=8)
    seen = rows_of(other)
    fit(other, points(), tmp_path / "second")
    assert sum(seen) == 4 * STEPS  # the samples by which the noise is recognised
    assert not (tmp_path / "second/inverted_noise").exists()


def test_iterations_that_do_not_contract_are_warned_of(tmp_path: Path) -> None:
    tuner = tuner_of(Biased(), sampler=Sampler(1), solver=FixedPoint(1e-5, 3, memory=0))
    with pytest.warns(UserWarning, match=r"does not converge.*raise model.*num_steps.*data_noise"):
        fit(tuner, points(), tmp_path)
    notes = list(store_of(tmp_path).all_notes())
    assert sum(note["unconverged"] for note in notes) > 10


def test_what_is_told_of_an_inversion_counts_rows(tmp_path: Path) -> None:
    """Shards have unequally many; of one that is exact enough nothing failed."""
    notes = [
        {"num_rows": 8, "residual": 1e-6, "unconverged": 3, "iterations": 2.0, "noise_power": 1.0},
        {"num_rows": 4, "residual": 0.5, "unconverged": 1, "iterations": 5.0, "noise_power": 4.0},
    ]
    store: Any = SimpleNamespace(all_notes=lambda: notes, num_rows=12, folder=tmp_path)
    rest: Any = None
    with pytest.warns(UserWarning, match=r"inversion of 8\.3% of the data .*residual 0\.5"):
        told = Inversion(rest, store, rest, Sampler(STEPS), FixedPoint(), 4).tell()
    means = {"iterations": 3.0, "noise_power": 2.0}
    assert told == pytest.approx({**means, "residual": 0.5, "unconverged": 1 / 12})


LOOSE, PLAIN = FixedPoint(1e-2, 3, memory=0), FixedPoint(1e-9, 3, memory=0)


def test_noise_that_another_solver_made_too_roughly_is_made_anew(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def residuals(solver: FixedPoint) -> list[float]:
        fit(tuner_of(Biased(), solver=solver), points(), tmp_path)
        notes = list(store_of(tmp_path).all_notes())
        assert all(note["solver"] == asdict(solver) for note in notes)
        return [note["residual"] for note in notes]

    def warned() -> bool:
        seen = [str(w.message) for w in recwarn if "does not converge" in str(w.message)]
        recwarn.clear()
        return bool(seen)

    assert min(residuals(PLAIN)) > 1e-5 and warned()
    before = stamps(tmp_path)
    assert min(residuals(PLAIN)) > 1e-5 and warned()
    assert stamps(tmp_path) == before  # as good as this solver makes it
    assert max(residuals(FixedPoint())) <= 1e-5 and not warned()


def test_noise_that_another_solver_made_well_enough_is_used(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What had not converged for the one has for the other: there is nothing to warn of."""
    fit(tuner_of(Biased(), sampler=Sampler(30), solver=PLAIN), points(), tmp_path)
    notes, before = list(store_of(tmp_path).all_notes()), stamps(tmp_path)
    assert all(note["unconverged"] for note in notes)
    recwarn.clear()
    fit(tuner_of(Biased(), sampler=Sampler(30), solver=LOOSE), points(), tmp_path)
    assert stamps(tmp_path) == before
    assert list(store_of(tmp_path).all_notes()) == notes
    assert notes[0]["solver"] == asdict(PLAIN)
    assert not any("converge" in str(w.message) for w in recwarn)
