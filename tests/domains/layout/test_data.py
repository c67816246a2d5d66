"""The DataModule: splits, tasks and what they give."""

from pathlib import Path
from typing import Any

import pytest
import torch

from domains.layout.data import LayoutData, given
from domains.layout.samples import EMPTY
from domains.layout.sources import Grammar, RicoArrays
from lit_rlft.core.checks import UsageError
from tests.domains.layout.sources.test_formats import arrays

TASKS = ("unconditional", "category", "category_size", "completion")


def rows(data: LayoutData, split: Any) -> list[dict[str, Any]]:
    data.setup("fit")
    dataset = data.rows(split)
    return [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(map(tuple, row["boxes"].tolist())))


def test_splits_share_no_layout_and_lose_none() -> None:
    data = LayoutData(Grammar(200), val_fraction=0.1, test_fraction=0.2)
    parts = [{key(row) for row in rows(data, split)} for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [140, 20, 40]
    assert len(set().union(*parts)) == 200


def test_limits_draws_and_own_sources() -> None:
    data = LayoutData(
        Grammar(100), test_source=Grammar(30, seed=1), num_train=10, num_val=3, num_test=7
    )
    assert [len(rows(data, split)) for split in ("train", "val", "test")] == [10, 3, 7]
    data = LayoutData(Grammar(100), num_train=10, num_draws=3, tasks={"completion": 1})
    drawn = rows(data, "train")
    assert len(drawn) == 30 and key(drawn[0]) == key(drawn[10]) == key(drawn[20])
    known = [row["known_labels"] for row in drawn]
    assert any(not torch.equal(known[i], known[i + 10]) for i in range(10))


def test_rows_do_not_depend_on_when_they_are_made() -> None:
    data = LayoutData(Grammar(50), tasks=dict.fromkeys(TASKS, 1.0), seed=3)
    first, second = rows(data, "train"), rows(data, "train")
    for a, b in zip(first, reversed(second[::-1]), strict=True):
        assert a["task"] == b["task"] and torch.equal(a["known_boxes"], b["known_boxes"])
    other = rows(LayoutData(Grammar(50), tasks=dict.fromkeys(TASKS, 1.0), seed=4), "train")
    assert [row["task"] for row in other] != [row["task"] for row in first]


def test_tasks_come_in_their_shares() -> None:
    data = LayoutData(Grammar(2000), tasks={"unconditional": 1, "category": 2, "completion": 1})
    tasks = [row["task"] for row in rows(data, "train")]
    assert "category_size" not in tasks
    assert tasks.count("category") / len(tasks) == pytest.approx(0.5, abs=0.05)
    assert tasks.count("completion") / len(tasks) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_gives_what_it_says(task: str) -> None:
    for row in rows(LayoutData(Grammar(60), tasks={task: 1.0}), "train"):
        full = row["labels"] != EMPTY
        boxes, labels = row["known_boxes"], row["known_labels"]
        if task == "unconditional":
            assert not boxes.any() and not labels.any()
        elif task == "completion":
            assert torch.equal(boxes, labels.unsqueeze(1).expand(-1, 4))
            assert 1 <= labels.sum() < full.sum() and not (labels & ~full).any()
        else:
            assert labels.all() and not boxes[:, :2].any()
            sized = full if task == "category_size" else torch.zeros_like(full)
            assert torch.equal(boxes[:, 2:], sized.unsqueeze(1).expand(-1, 2))


@pytest.mark.parametrize("task", TASKS)
def test_the_order_of_elements_follows_from_the_condition(task: str) -> None:
    data = LayoutData(Grammar(60), tasks={task: 1.0})
    read = {key(row): row for row in rows(LayoutData(Grammar(60)), "train")}
    for row in rows(data, "train"):
        fixed = row["known_boxes"].all(dim=1)
        numbers = row["labels"].where(row["labels"] != EMPTY, 5)
        if not task.startswith("category"):
            numbers = (numbers == 5).long()
        # Given elements first, then by class where it is given, empty slots last.
        keys = list(zip((~fixed).tolist(), numbers.tolist(), strict=True))
        assert keys == sorted(keys)
        # Equal ones stay in reading order.
        order = list(map(tuple, read[key(row)]["boxes"].tolist()))
        places = [order.index(tuple(box)) for box in row["boxes"].tolist()]
        ranks = [(*k, place) for k, place in zip(keys, places, strict=True)]
        filled = [ranks[i] for i, label in enumerate(row["labels"].tolist()) if label != EMPTY]
        assert filled == sorted(filled)


def test_given_handles_one_layout_at_a_time() -> None:
    labels, fixed = torch.tensor([2, 0, EMPTY]), torch.tensor([True, False, False])
    boxes, known = given("completion", labels, fixed)
    assert known.tolist() == [True, False, False] and boxes.sum() == 4
    boxes, known = given("category_size", labels, fixed)
    assert known.all() and boxes.tolist() == [[False, False, True, True]] * 2 + [[False] * 4]


def test_batches_have_the_documented_columns() -> None:
    data = LayoutData(Grammar(100), batch_size=8, eval_batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["boxes"].shape == (8, 12, 4) and batch["boxes"].dtype == torch.float32
    assert batch["labels"].shape == (8, 12) and batch["labels"].dtype == torch.int64
    assert batch["known_boxes"].dtype == batch["known_labels"].dtype == torch.bool
    assert batch["task"] == ["unconditional"] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {"colour": 1.0}}, r"names \['colour'\]"),
        ({"tasks": {"category": -1.0, "completion": 2.0}}, "tasks must be at least 0"),
        ({"tasks": {"category": 0.0}}, "not all 0"),
        ({"source": Grammar(2)}, "too few for three splits"),
        ({"val_source": Grammar(5, max_elements=9)}, "val_source has 9 slots.*source has 12"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayoutData(**settings).setup("fit")


def test_mixed_class_lists_are_refused(tmp_path: Path) -> None:
    other = RicoArrays(str(arrays(tmp_path / "a.npz")), 12, ["a", "b", "c"])
    with pytest.raises(UsageError, match="test_source has 12 slots and the classes"):
        LayoutData(Grammar(50), test_source=other).setup("fit")
