import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from domains.text_to_image.data import PromptData, ShapesPictures, ShapesPrompts, read_prompts
from domains.text_to_image.shapes import world
from domains.text_to_image.shapes.detector import judge
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import SplitData, collate

PROMPTS = Path(__file__).parents[3] / ".." / "shared" / "data" / "prompts"
SPLITS = ("train", "val", "test")
RECORDS = [
    {"prompt": "a cat", "tag": "animal"},
    {"prompt": "  a “quoted” dog \n", "tag": "animal"},
    {"prompt": 'a "plain", comma', "tag": "other"},
]
TEXTS = ["a cat", "a “quoted” dog", 'a "plain", comma']


def real(name: str) -> Path:
    if not (PROMPTS / name).is_file():
        pytest.skip(f"{name} is not here")
    return PROMPTS / name


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def texts(records: Sequence[Any]) -> list[str]:
    return [record["prompt"] for record in records]


def rows(data: SplitData, split: Any) -> list[dict[str, Any]]:
    data.setup("fit")
    dataset = data.rows(split)
    return [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]


def many(path: Path, num: int = 100) -> Path:
    return written(path, "\n".join(f"prompt {i}" for i in range(num)))


@pytest.mark.parametrize(
    ("name", "num", "num_unique"),
    [
        ("geneval_metadata.jsonl", 553, 553),
        ("parti_prompts.tsv", 1632, 1632),
        ("t2i_compbench_color_train.txt", 700, 679),
        ("t2i_compbench_non_spatial_val.txt", 300, 300),
    ],
)
def test_prompt_sets_of_the_field(name: str, num: int, num_unique: int) -> None:
    path, column = real(name), "Prompt" if name.startswith("parti") else "prompt"
    prompts = texts(read_prompts(path, column))
    assert len(prompts) == num and len(set(prompts)) == num_unique
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    data = PromptData(str(path), column, batch_size=32)
    parts = [texts(rows(data, split)) for split in SPLITS]
    assert len(set().union(*parts)) == sum(map(len, parts)) == num_unique
    assert len(parts[1]) == len(parts[2]) == round(0.1 * num_unique)
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert {tuple(batch) for batch in batches} == {tuple(rows(data, "train")[0])}


def test_geneval_records_keep_what_is_expected() -> None:
    records = read_prompts(real("geneval_metadata.jsonl"))
    assert records[0]["prompt"] == "a photo of a bench"
    assert records[0]["include"] == [{"class": "bench", "count": 1}]
    assert Counter(record["tag"] for record in records)["counting"] == 80
    # Only counting has "exclude"; a batch needs the same columns in every row.
    excluding = [record["tag"] for record in records if record["exclude"] is not None]
    assert excluding == ["counting"] * 80
    batch = collate([{"index": i, **record} for i, record in enumerate(records)])
    assert batch["exclude"][0] is None and len(batch["exclude"]) == 553


def test_parti_prompts_keep_their_quotation_marks() -> None:
    prompts = texts(read_prompts(real("parti_prompts.tsv"), "Prompt"))
    assert prompts[0] == "bond"
    assert sum(prompt.startswith('"G I G G L E" painted') for prompt in prompts) == 1


def test_prompts_of_their_own_files(tmp_path: Path) -> None:
    train, val = (real(f"t2i_compbench_color_{part}.txt") for part in ("train", "val"))
    test = real("t2i_compbench_shape_val.txt")
    data = PromptData(str(train), val_source=str(val), test_source=str(test), num_val_prompts=50)
    assert sorted(texts(rows(data, "train"))) == sorted(texts(read_prompts(train)))
    assert texts(rows(data, "val")) == texts(read_prompts(val))[:50]
    assert texts(rows(data, "test")) == texts(read_prompts(test))


def test_every_file_type_gives_the_same_prompts(tmp_path: Path) -> None:
    files = [
        written(tmp_path / "a.txt", "\n".join(["", *(r["prompt"] for r in RECORDS), "  "])),
        written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        written(tmp_path / "a.json", json.dumps(RECORDS)),
        written(tmp_path / "b.json", json.dumps([record["prompt"] for record in RECORDS])),
        written(tmp_path / "b.jsonl", "\n".join(json.dumps(r["prompt"]) for r in RECORDS)),
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["tag", "prompt"])
        writer.writeheader()
        writer.writerows(RECORDS)
    pairs = zip(TEXTS, (record["tag"] for record in RECORDS), strict=True)
    lines = ["prompt\ttag", *map("\t".join, pairs)]
    files += [tmp_path / "a.csv", written(tmp_path / "a.TSV", "\n".join(lines))]
    for path in files:
        records = read_prompts(path)
        assert texts(records) == TEXTS, path.name
        if path.stem == "a" and path.suffix != ".txt":
            assert [record["tag"] for record in records] == ["animal", "animal", "other"]


def test_prompts_under_another_column(tmp_path: Path) -> None:
    csv_file = written(tmp_path / "a.csv", 'caption,n\n"two\nlines",1\nx,2\n')
    assert texts(read_prompts(csv_file, "caption")) == ["two\nlines", "x"]
    plain = written(tmp_path / "a.txt", "x\ny")
    assert texts(read_prompts(plain, "caption")) == ["x", "y"]
    assert texts(read_prompts(written(tmp_path / "a.json", '["x"]'), "caption")) == ["x"]


def test_line_separators_inside_json_and_byte_order_marks(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), '{"prompt": "d"}']
    path = written(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines))
    assert texts(read_prompts(path)) == ["a\u2028b\x85c", "d"]


def test_records_without_a_prompt_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"prompt": null}, {"prompt": " "}, {"prompt": 3}]')
    assert texts(read_prompts(path)) == ["3"]
    ragged = written(tmp_path / "a.csv", "tag,prompt\nx\ny,a cat\n")
    assert texts(read_prompts(ragged)) == ["a cat"]
    trailing = written(tmp_path / "b.csv", "prompt\na cat,,\n")
    assert texts(read_prompts(trailing)) == ["a cat"]


def test_columns_whose_names_batches_use_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows would be row 0: with the same seeds, and files that replace each other."""
    lines = [{"prompt": f"prompt {i}", "index": 0, "pair": "x", "n": i} for i in range(4)]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    said: list[str] = []
    monkeypatch.setattr("domains.text_to_image.sources.prompts.rank_zero_info", said.append)
    data = PromptData(str(path), val_source=str(path), test_source=str(path))
    found = rows(data, "train")
    assert sorted(row["index"] for row in found) == [0, 1, 2, 3]
    assert all(row.keys() == {"index", "prompt", "n"} for row in found)
    assert any("the column 'index' is left out" in line for line in said)
    assert texts(read_prompts(path, "index")) == ["0"] * 4  # unless it is the prompt


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.yaml", "", r"unknown file type; use one of .*\.tsv"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", "{", "cannot be read"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "cannot be read"),
        ("a.json", '{"prompt": "x"}', "a list of texts or of records"),
        ("a.json", "[1, 2]", "a list of texts or of records"),
        (
            "a.csv",
            "text\nx\n",
            r"record 1 of .* has no 'prompt', only \['text'\]; set data",
        ),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}', "record 2 of .* has no 'prompt'"),
        ("a.csv", "prompt\na\na ring, big\n", "record 2 of .* more fields .* commas in quotes"),
        ("a.tsv", "prompt\na\tb\n", "record 1 of .* more fields .* cannot hold tabs"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(UsageError, match=sentence) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        PromptData(str(tmp_path / "a.txt")).setup("fit")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "b.txt")


def test_splits_are_disjoint_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    source = str(many(tmp_path / "a.txt"))
    splits = {}
    for seed in (0, 0, 1):
        data = PromptData(source, val_fraction=0.2, seed=seed)
        parts = [texts(rows(data, split)) for split in SPLITS]
        assert [len(part) for part in parts] == [70, 20, 10]
        assert len(set().union(*parts)) == 100
        assert splits.setdefault(seed, parts) == parts
    assert splits[0] != splits[1]


def test_a_repeated_prompt_is_in_one_split(tmp_path: Path) -> None:
    repeated = [{"prompt": f"prompt {i % 20}", "n": i} for i in range(100)]
    path = written(tmp_path / "a.json", json.dumps(repeated))
    parts = [rows(PromptData(str(path)), split) for split in SPLITS]
    assert sum(map(len, parts)) == len({text for part in parts for text in texts(part)}) == 20
    assert {row["n"] for part in parts for row in part} == set(range(20))  # the first of each
    own = PromptData(str(path), val_source=str(path), test_source=str(path))
    assert len(rows(own, "train")) == 100


def test_limits_take_the_first_prompts(tmp_path: Path) -> None:
    source = str(many(tmp_path / "a.txt"))
    whole = PromptData(source)
    part = PromptData(source, num_val_prompts=3, num_test_prompts=4)
    for split, num in (("train", 80), ("val", 3), ("test", 4)):
        assert rows(part, split) == rows(whole, split)[:num]


def test_too_few_prompts_for_three_splits(tmp_path: Path) -> None:
    path = many(tmp_path / "a.txt", 2)
    with pytest.raises(UsageError, match="has 2 prompts, too few for three splits"):
        PromptData(str(path)).setup("fit")
    PromptData(str(path), val_source=str(path), test_source=str(path)).setup("fit")


def shares(make: Any, split: str, ranks: int) -> list[list[str]]:
    parts = []
    for rank in range(ranks):
        data = make()
        data.trainer = Mock(world_size=ranks, global_rank=rank, enable_validation=False)
        data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 0
        data.setup("fit")
        loader = getattr(data, f"{split}_dataloader")()
        parts.append([prompt for batch in loader for prompt in batch["prompt"]])
    return parts


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_prompts(tmp_path: Path, ranks: int) -> None:
    source = str(many(tmp_path / "a.txt", 121))

    def make() -> PromptData:
        return PromptData(source, batch_size=6, eval_batch_size=4)

    for split, total in (("train", 96), ("val", 12), ("test", 12)):
        parts = shares(make, split, ranks)
        seen = [prompt for part in parts for prompt in part]
        assert len(set(seen)) == len(seen) == total
        if split != "train":
            assert set(seen) == set(texts(rows(make(), split)))


def test_shapes_tasks_take_turns() -> None:
    data = ShapesPrompts(num_train_prompts=600, num_val_prompts=48, num_test_prompts=192)
    for split in SPLITS:
        prompts = [world.parse(text) for text in texts(rows(data, split))]
        assert len(prompts) == data.sizes[split]
        assert [prompt.task for prompt in prompts] == [
            world.TASKS[i % len(world.TASKS)] for i in range(len(prompts))
        ]
        assert set(prompts) <= set(world.split_prompts(split))


def test_shapes_train_on_the_tasks_that_are_named() -> None:
    data = ShapesPrompts(600, 48, 192, train_tasks=["counting", "colors", "counting"])
    tasks = {s: Counter(world.parse(t).task for t in texts(rows(data, s))) for s in SPLITS}
    assert tasks["train"] == {"counting": 400, "colors": 200}
    assert tasks["val"] == dict.fromkeys(world.TASKS, 8)
    assert tasks["test"] == dict.fromkeys(world.TASKS, 32)
    with pytest.raises(
        UsageError, match="ShapesPrompts: train_tasks must be some of single_object"
    ):
        ShapesPrompts(train_tasks=[])


def test_shapes_prompts_are_held_out() -> None:
    data = ShapesPrompts(num_train_prompts=6000, num_val_prompts=600, num_test_prompts=1200)
    train, val, test = (set(texts(rows(data, split))) for split in SPLITS)
    assert not train & val and not train & test and not val & test
    # Enough rows show every prompt of the shorter tasks, none more than once too often.
    colors = Counter(t for t in texts(rows(data, "train")) if world.parse(t).task == "colors")
    own = [p.text for p in world.split_prompts("train") if p.task == "colors"]
    assert set(colors) == set(own) and max(colors.values()) - min(colors.values()) <= 1


def test_shapes_prompts_depend_on_the_seed_alone() -> None:
    first, again, other = (texts(rows(ShapesPrompts(60, seed=s), "train")) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_shapes_prompts(ranks: int) -> None:
    def make() -> ShapesPrompts:
        return ShapesPrompts(24, 12, 17, batch_size=6)

    for split, total in (("train", 24), ("val", 12), ("test", 17)):
        seen = Counter(prompt for part in shares(make, split, ranks) for prompt in part)
        assert seen == Counter(texts(rows(make(), split))) and seen.total() == total


def test_shapes_pictures_are_functions_of_their_number() -> None:
    data, again = (ShapesPictures(num_pictures=40).rows("train") for _ in range(2))
    backwards = {i: again[i] for i in reversed(range(40))}
    tasks = Counter()
    for i in range(40):
        row, twin = data[i], backwards[i]
        assert row["index"] == i and row["prompt"] == twin["prompt"]
        assert row["image"].shape == (3, 64, 64) and row["image"].dtype == torch.uint8
        assert torch.equal(row["image"], twin["image"])
        tasks[world.parse(row["prompt"]).task] += 1
    assert set(tasks) == set(world.TASKS)
    other = ShapesPictures(num_pictures=40, seed=1).rows("train")
    assert not torch.equal(other[0]["image"], data[0]["image"])
    trained = {prompt.text for prompt in world.split_prompts("train")}
    assert all(data[i]["prompt"] in trained for i in range(40))


def test_shapes_pictures_show_their_prompts() -> None:
    data = ShapesPictures(num_pictures=30).rows("train")
    for i in range(30):
        row = data[i]
        array = row["image"].permute(1, 2, 0).numpy().astype(np.float32) / 255
        assert judge(array, world.parse(row["prompt"])).correct, row["prompt"]


def test_shapes_pictures_show_the_tasks_that_are_named() -> None:
    named: list[world.Task] = ["position", "position", "colors"]
    data = ShapesPictures(num_pictures=300, num_val_prompts=12, train_tasks=named)
    tasks = Counter(world.parse(text).task for text in texts(rows(data, "train")))
    assert set(tasks) == {"position", "colors"} and 170 < tasks["position"] < 230
    assert {world.parse(text).task for text in texts(rows(data, "val"))} == set(world.TASKS)
    with pytest.raises(UsageError, match="ShapesPictures: train_tasks must be some of single"):
        ShapesPictures(train_tasks=[])


def test_shapes_pictures_come_in_batches_and_are_evaluated_by_prompt() -> None:
    data = ShapesPictures(num_pictures=20, num_val_prompts=12, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 64, 64) and len(batch["prompt"]) == 8
    val = rows(data, "val")
    assert [set(row) for row in val] == [{"index", "prompt"}] * 12
    assert texts(val) == texts(rows(ShapesPrompts(num_val_prompts=12), "val"))
