import multiprocessing
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset, DistributedSampler

from domains.gaussian_mixture.data import MixtureData
from domains.molecule.data import MoleculeData
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import Rows, Split, SplitData, _TrainOrder, collate


class Numbers(SplitData):
    sizes = {"train": 21, "val": 7, "test": 5}  # noqa: RUF012

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        return Rows(self.sizes[split], lambda i: {"text": f"{split} {i}", "x": torch.tensor([i])})


def on(data: Numbers, ranks: int, rank: int, batches: int = 0) -> Numbers:
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer = SimpleNamespace(world_size=ranks, global_rank=rank, fit_loop=fit_loop)
    data.trainer = trainer  # type: ignore[assignment]
    return data


def seen(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def test_rows_are_numbered_and_collated() -> None:
    rows = Numbers().rows("val")
    assert len(rows) == 7  # type: ignore[arg-type]
    batch = collate([rows[0], rows[3]])
    assert batch["index"].tolist() == [0, 3] and batch["index"].dtype == torch.int64
    assert batch["text"] == ["val 0", "val 3"]
    assert batch["x"].tolist() == [[0], [3]]


def test_training_rows_are_shuffled_by_the_seed() -> None:
    first, again, other = (
        seen(Numbers(batch_size=4, seed=seed).train_dataloader()) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert [len(batch) for batch in first] == [4] * 5
    loader = Numbers(batch_size=4).train_dataloader()
    loader.sampler.set_epoch(1)
    assert seen(loader) != first


def test_training_goes_on_after_the_batches_already_seen() -> None:
    loader = Numbers(batch_size=4).train_dataloader()
    passes = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        passes += seen(loader)
    for batches in (0, 3, 5):
        rest = seen(on(Numbers(batch_size=4), 1, 0, batches).train_dataloader())
        assert rest == passes[batches : batches + 5]


def test_processes_share_a_round_and_every_evaluation_row_is_seen_once() -> None:
    rounds = [seen(on(Numbers(batch_size=6), 2, r).train_dataloader()) for r in range(2)]
    assert [len(batch) for batch in rounds[0]] == [len(batch) for batch in rounds[1]] == [3] * 3
    rows = [row for batches in rounds for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == 18
    shares = [seen(on(Numbers(eval_batch_size=2), 2, r).val_dataloader()) for r in range(2)]
    rows = [row for batches in shares for batch in batches for row in batch]
    assert sorted(rows) == list(range(7))


@pytest.mark.parametrize("num_rows", [12, 21, 23, 24, 35, 47])
def test_rounds_do_not_depend_on_the_number_of_processes(num_rows: int) -> None:
    """Row j of rank r of R is row r + R j of the round; no process has a round more."""

    def rounds(ranks: int, batches: int) -> list[list[int]]:
        loaders = []
        for rank in range(ranks):
            data = on(Numbers(batch_size=12), ranks, rank, batches)
            data.sizes = {"train": num_rows}
            loaders.append(data.train_dataloader())
        shares = [seen(loader) for loader in loaders]
        assert {len(loader) for loader in loaders} == {len(share) for share in shares}
        return [
            [row for rows in zip(*parts, strict=True) for row in rows]
            for parts in zip(*shares, strict=True)
        ]

    for batches in (0, 5):
        alone = rounds(1, batches)
        assert len(alone) == num_rows // 12
        assert all(rounds(ranks, batches) == alone for ranks in (2, 3, 4))


def test_few_rows_are_shared_evenly_or_not_at_all() -> None:
    shares = [seen(on(Numbers(batch_size=24), 3, r).train_dataloader()) for r in range(3)]
    assert [[len(batch) for batch in share] for share in shares] == [[7]] * 3
    with pytest.raises(UsageError, match=r"21 rows.* set data.init_args.batch_size to 20$"):
        on(Numbers(batch_size=24), 2, 0).train_dataloader()


def test_a_small_training_split_still_gives_a_batch() -> None:
    assert [len(batch) for batch in seen(Numbers(batch_size=64).train_dataloader())] == [21]


def test_a_round_must_divide_among_processes() -> None:
    with pytest.raises(UsageError, match=r"batch_size \(5\)"):
        on(Numbers(batch_size=5), 2, 0).train_dataloader()


def test_too_few_rows_to_validate_are_told_before_the_first_round() -> None:
    data = on(Numbers(batch_size=6), 3, 0)
    data.sizes = Numbers.sizes | {"val": 2}
    data.train_dataloader()  # this trainer does not validate
    own = vars(data.trainer)
    own |= {"enable_validation": True, "check_val_every_n_epoch": 2, "max_epochs": 1}
    data.train_dataloader()  # nor does this one, which ends before
    own["max_epochs"] = 2
    with pytest.raises(UsageError, match="the val data have 2 rows, too few for 3 processes"):
        data.train_dataloader()


@pytest.mark.parametrize(("num_rows", "ranks"), [(3, 2), (10, 1), (11, 3), (2, 3)])
def test_passes_are_those_of_torch(num_rows: int, ranks: int) -> None:
    rows = Rows(num_rows, lambda i: {})
    for rank in range(ranks):
        own = _TrainOrder(rows, ranks, rank, seed=4, batch_size=1, seen=lambda: None)
        other = DistributedSampler(rows, ranks, rank, shuffle=True, seed=4)
        for epoch in (0, 1, 5):
            own.set_epoch(epoch)
            other.set_epoch(epoch)
            assert list(own) == list(other)[: len(own)]


def test_fewer_rows_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = MixtureData(num_train=8, num_val=1, num_test=2, batch_size=8)
    data.setup("fit")
    monkeypatch.setattr(type(data), "_place", lambda self: (2, 0))
    with pytest.raises(UsageError, match=r"the val data have 1 rows.*2 processes.*devices to 1"):
        data.val_dataloader()
    assert len(data.test_dataloader()) == 1


def test_a_rows_number_is_its_own_whatever_its_columns() -> None:
    assert Rows(3, lambda i: {"index": 7, "n": i})[2] == {"index": 2, "n": 2}


class Given(SplitData):
    """Rows as somebody's DataModule returns them."""

    def __init__(self, found: Any) -> None:
        super().__init__(batch_size=2)
        self.found = found

    def rows(self, split: Split) -> Any:
        return self.found


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([{"n": 1}, {"n": 2}], r'number under "index", as Rows.*row 0 .* the columns \[\'n\'\]'),
        (["a red ring", "a star"], "row 0 of a batch is none"),
        (Rows(2, lambda i: "a red ring"), "row . of the data is a str; Rows needs a function"),  # type: ignore[arg-type, return-value]
        (Rows(2, lambda i: {"n": 1} if i else {}), "one alone has 'n'; give every row the same"),
        (None, r"Given\.rows\('train'\) returned a NoneType; it returns a Dataset with a length"),
    ],
)
def test_rows_that_are_none_are_named_with_the_remedy(found: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        list(Given(found).train_dataloader())


def test_no_rows_at_all_have_their_own_sentence() -> None:
    with pytest.raises(UsageError, match="the test data have no rows; give them some"):
        Given([]).test_dataloader()


def test_a_data_module_that_forgets_its_base_is_told() -> None:
    class Forgetful(Given):
        def __init__(self) -> None:
            LightningDataModule.__init__(self)

    with pytest.raises(UsageError, match=r"Forgetful\.__init__ has to call super\(\)\.__init__"):
        Forgetful().check_batch_size(1)


def test_so_are_its_evaluations_which_come_first_in_a_fit() -> None:
    class Forgetful(Given):
        def __init__(self) -> None:
            LightningDataModule.__init__(self)

        def rows(self, split: str) -> Any:
            raise AssertionError("asked before its settings are known")

    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        with pytest.raises(UsageError, match=r"Forgetful\.__init__ has to call super"):
            getattr(Forgetful(), loader)()


@pytest.mark.parametrize("data", [Numbers, MoleculeData])
def test_loaders_have_workers_in_each_way_that_processes_start(
    data: type[SplitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.14 no longer forks unless it is asked to."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        module = data(batch_size=8, num_workers=1)
        module.setup("fit")
        assert len(next(iter(module.train_dataloader()))["index"]) == 8
    finally:
        multiprocessing.set_start_method(before, force=True)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"num_workers must be 0 on this system.*got 1"):
        data(batch_size=8, num_workers=1)
