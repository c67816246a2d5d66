"""The DataModules: splits, batches of one size, conditions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.data import QM9_COUNTS, QM9_HEAVY_COUNTS, AtomCounts, MoleculeData, histogram
from domains.molecule.samples import EMPTY
from domains.molecule.sources import MoleculeFile
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.size_batches import FixedBatches, SizeBatches, training_batches


def source(path: Path, num: int = 60, max_atoms: int = 6, seed: int = 0) -> MoleculeFile:
    """Write atoms at random places: 2 to 6 a molecule, few of 6."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([rng.integers(2, 6, num - 2), [6, 6]])
    numbers = np.zeros((num, 6), np.uint8)
    for row, size in enumerate(sizes):
        numbers[row, :size] = rng.choice([6, 8], size)
    path.mkdir(exist_ok=True)
    file = path / f"random{seed}.npz"
    np.savez(file, positions=rng.normal(size=(num, 6, 3)), atomic_numbers=numbers)
    return MoleculeFile(str(file), max_atoms=max_atoms, cache_dir=str(path / "cache"))


def rows(data: Any, split: Any) -> list[dict[str, Any]]:
    data.setup("fit")
    dataset = data.rows(split)
    return [dataset[i] for i in range(len(dataset))]


def key(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row["positions"].flatten().tolist())


def test_splits_share_no_molecule_and_lose_none(tmp_path: Path) -> None:
    data = MoleculeData(source(tmp_path), val_fraction=0.1, test_fraction=0.2)
    parts = [{key(row) for row in rows(data, split)} for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [42, 6, 12]
    assert len(set().union(*parts)) == 60


def test_rows_hold_molecules(tmp_path: Path) -> None:
    data = MoleculeData(source(tmp_path), num_train=10, num_val=2)
    found = rows(data, "train")
    assert len(found) == 10 and len(rows(data, "val")) == 2
    for row in found:
        full = row["types"] != EMPTY
        assert row["num_atoms"] == full.sum() and row["elements"] == EXPLICIT
        assert full[: row["num_atoms"]].all() and row["positions"].shape == (6, 3)
        torch.testing.assert_close(row["positions"].sum(dim=0), torch.zeros(3), atol=1e-5, rtol=0)


def test_own_sources_of_splits(tmp_path: Path) -> None:
    data = MoleculeData(
        source(tmp_path), val_source=source(tmp_path, 20, seed=1), test_fraction=0.1
    )
    assert [len(rows(data, split)) for split in ("train", "val", "test")] == [54, 20, 6]
    other = source(tmp_path, 20, max_atoms=5, seed=2)
    with pytest.raises(UsageError, match="val_source has at most 5 atoms"):
        MoleculeData(source(tmp_path), val_source=other).setup("fit")
    with pytest.raises(UsageError, match="too few for three splits"):
        MoleculeData(source(tmp_path, 3), val_fraction=0.5, test_fraction=0.5).setup("fit")


def test_training_batches_have_one_size_each(tmp_path: Path) -> None:
    data = MoleculeData(source(tmp_path), batch_size=8, val_fraction=0.1, test_fraction=0.1)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 48 // 8
    for batch in batches:
        assert len(batch["num_atoms"].unique()) == 1 and len(batch["index"]) == 8
        assert batch["positions"].shape == (8, 6, 3)
    val = list(data.val_dataloader())
    assert sorted(i for batch in val for i in batch["index"].tolist()) == [*range(6)]
    assert all(len(batch["num_atoms"].unique()) == 1 for batch in val)
    data.bucketed = False
    mixed = next(iter(data.train_dataloader()))
    assert len(mixed["num_atoms"].unique()) > 1
    data.batch_size = 7
    with pytest.raises(UsageError, match="not divisible by the 2 processes"):
        data.check_batch_size(2)


def test_every_row_is_expected_equally_often() -> None:
    sizes = np.repeat([3, 5, 9], [3, 41, 56])
    rng = np.random.default_rng(0)
    counts = np.zeros(len(sizes))
    for _ in range(2000):
        batches = training_batches(sizes, 16, rng)
        assert len(batches) == 6 and all(len(batch) == 16 for batch in batches)
        assert all(len(np.unique(sizes[batch])) == 1 for batch in batches)
        np.add.at(counts, np.concatenate(batches), 1)
    expected = 2000 * 6 * 16 / 100
    for size in (3, 5, 9):
        # Batches of a size come at random: 4 standard deviations of their number.
        share = (sizes == size).mean() * 6
        spread = 4 * np.sqrt(2000 * (share % 1) * (1 - share % 1)) * 16 / (sizes == size).sum()
        assert counts[sizes == size].mean() == pytest.approx(expected, abs=spread + 1e-9)
    # Within a size too.
    assert counts[sizes == 9].std() < 0.05 * expected


def test_few_rows_fill_a_batch_again_and_again() -> None:
    (batch,) = training_batches(np.array([4, 4, 4]), 8, np.random.default_rng(0))
    assert sorted(np.bincount(batch).tolist()) == [2, 3, 3]


def test_order_goes_on_where_it_stopped() -> None:
    sizes = np.random.default_rng(0).integers(2, 6, 100)
    endless = [
        batch
        for number in range(3)
        for batch in SizeBatches(sizes, 10, seen=lambda number=number: 10 * number)
    ]
    for seen in (0, 4, 10, 17):
        found = list(SizeBatches(sizes, 10, seen=lambda seen=seen: seen))
        assert found == endless[seen : seen + 10]
    order = SizeBatches(sizes, 10)
    first = list(order)
    order.set_epoch(1)
    assert list(order) == endless[10:20] and first == endless[:10] and len(order) == 10


def test_processes_share_batches() -> None:
    sizes = np.random.default_rng(0).integers(2, 6, 100)
    whole = list(SizeBatches(sizes, 10))
    parts = [list(SizeBatches(sizes, 10, 2, rank)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first) == len(second) == 5 and sorted(first + second) == sorted(batch)
    fixed = [FixedBatches(sizes, 7, 3, rank) for rank in range(3)]
    seen = [row for order in fixed for batch in order for row in batch]
    assert sorted(seen) == [*range(100)] and sum(map(len, fixed)) == len(FixedBatches(sizes, 7))


@pytest.mark.parametrize("sizes", [[4] * 9, [4, 4, 5, 5, 5], [4, 5, 6]])
def test_every_process_has_a_batch_to_measure(sizes: list[int]) -> None:
    """Also where the rows would fill fewer batches than there are processes."""
    own = [list(FixedBatches(np.array(sizes), 16, 3, rank)) for rank in range(3)]
    assert all(own)
    rows = [row for batches in own for batch in batches for row in batch]
    assert sorted(rows) == [*range(len(sizes))]
    for batches in own:
        assert all(len({sizes[row] for row in batch}) == 1 for batch in batches)
    lengths = [len(batch) for batches in own for batch in batches]
    assert max(lengths) <= 5 and len(lengths) == 3


def test_fewer_molecules_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a fit's validation before the first round."""
    data = MoleculeData(num_train=8, num_val=2, num_test=4, batch_size=6)
    data.setup("fit")
    monkeypatch.setattr(MoleculeData, "_place", lambda self: (3, 0))
    assert len(data.test_dataloader()) > 0
    few = r"the val data have 2 rows, too few for 3 processes.*trainer.devices to 2"
    with pytest.raises(UsageError, match=few):
        data.val_dataloader()
    data.train_dataloader()  # without a trainer there is no validation
    monkeypatch.setattr(MoleculeData, "_validates", lambda self: True)
    with pytest.raises(UsageError, match=few):
        data.train_dataloader()


class Watcher(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch: Any) -> Any:
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["positions"].mean().view(1, 1)).sum()

    def validation_step(self, batch: Any) -> None:
        assert len(batch["num_atoms"].unique()) == 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_takes_the_loaders(tmp_path: Path) -> None:
    data = MoleculeData(source(tmp_path), batch_size=8, eval_batch_size=2)
    watcher = Watcher()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(watcher, data)
    assert len(watcher.seen) == 2 * 6 and watcher.seen[:6] != watcher.seen[6:]


def test_conditions_follow_the_histogram() -> None:
    data = AtomCounts({3: 1, 5: 6, 9: 3}, num_train=3000, num_val=5, num_test=7)
    found = torch.stack([row["num_atoms"] for row in rows(data, "train")])
    shares = [float((found == size).double().mean()) for size in (3, 5, 9)]
    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    assert len(rows(data, "val")) == 5 and len(rows(data, "test")) == 7
    again = rows(AtomCounts({3: 1, 5: 6, 9: 3}, num_train=50), "train")
    assert [int(row["num_atoms"]) for row in again] == found[:50].tolist()
    other = rows(AtomCounts({3: 1, 5: 6, 9: 3}, num_train=50, seed=1), "train")
    assert [int(row["num_atoms"]) for row in other] != found[:50].tolist()
    small = rows(AtomCounts({3: 1, 5: 6, 9: 3}, max_atoms=5), "train")
    assert {int(row["num_atoms"]) for row in small} == {3, 5}
    assert {int(row["most_atoms"]) for row in small} == {5}
    never = AtomCounts({3: 1, 9: 0})
    assert {int(row["most_atoms"]) for row in rows(never, "train")} == {3}
    batch = next(iter(data.train_dataloader()))
    assert batch["num_atoms"].dtype == torch.int64 and batch["num_atoms"].shape == (32,)


def test_conditions_of_a_source(tmp_path: Path) -> None:
    own = source(tmp_path)
    counts = histogram(own.load())
    assert sum(counts.values()) == 60 and counts[6] == 2
    drawn = {int(row["num_atoms"]) for row in rows(AtomCounts(source=own), "train")}
    assert drawn == set(counts)
    with pytest.raises(UsageError, match="exclude each other"):
        AtomCounts({3: 1}, source=own)


@pytest.mark.parametrize("counts", [{}, {0: 1}, {3: -1.0}, {3: 0.0}, {30: 1}])
def test_histograms_that_cannot_be(counts: dict[int, float]) -> None:
    with pytest.raises(UsageError, match=r"counts needs shares|counts must be at least 0"):
        AtomCounts(counts, max_atoms=29).setup("fit")


def test_published_histogram() -> None:
    assert sum(QM9_COUNTS.values()) == sum(QM9_HEAVY_COUNTS.values()) == 100_000
    assert max(QM9_COUNTS) == 29 and max(QM9_HEAVY_COUNTS) == 9
    drawn = [int(row["num_atoms"]) for row in rows(AtomCounts("qm9", num_train=2000), "train")]
    mean = sum(n * count for n, count in QM9_COUNTS.items()) / 100_000
    assert np.mean(drawn) == pytest.approx(mean, abs=0.3) and len(set(drawn)) > 12
    heavy = [int(row["num_atoms"]) for row in rows(AtomCounts("qm9_heavy"), "train")]
    assert np.mean(np.array(heavy) == 9) == pytest.approx(0.834, abs=0.03)
    with pytest.raises(UsageError, match="'qm10'; use 'qm9', 'qm9_heavy' or numbers"):
        AtomCounts("qm10")  # type: ignore[arg-type]
