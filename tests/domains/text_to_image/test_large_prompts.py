"""Prompts of a large file are packed on disk once: no process has them all in its memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from domains.text_to_image.data import PromptData
from domains.text_to_image.sources import prompts

SEVERAL = 7
"""Every so many lines repeat the one before."""


def text(i: int) -> str:
    return f"a photo of thing number {i - (i % SEVERAL == 1)} in the manner of an old master"


def large(path: Path, num: int) -> Path:
    lines = (text(i) for i in range(num))
    if path.suffix == ".jsonl":
        tags: dict[int, Any] = {0: {"tag": "first"}}
        lines = (json.dumps({"prompt": text(i)} | tags.get(i, {})) for i in range(num))
    path.write_text("\n".join(lines))
    return path


def own_memory() -> int:
    """Return the bytes of this process's memory that no file holds."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def data_of(path: Path) -> PromptData:
    return PromptData(str(path), batch_size=8, cache_dir=str(path.parent / "cache"))


@pytest.mark.parametrize(
    ("num", "suffix"),
    [
        (100_000, ".txt"),
        pytest.param(100_000, ".jsonl", marks=pytest.mark.slow),
        pytest.param(1_000_000, ".txt", marks=pytest.mark.slow),
        pytest.param(1_000_000, ".jsonl", marks=pytest.mark.slow),
    ],
)
def test_a_large_file_is_read_once_and_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, suffix: str
) -> None:
    path = large(tmp_path / f"many{suffix}", num)
    data_of(path).prepare_data()
    monkeypatch.setattr(prompts, "_pack", None)  # nothing is read again
    before = own_memory()
    data = data_of(path)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    grown = own_memory() - before
    print(f"{num} prompts: {grown / 2**20:.0f} MiB, {grown / num:.0f} bytes each")
    assert grown < 2**23 + 64 * num  # a list of texts and their records takes 400 and more
    assert all(prompt.startswith("a photo of thing") for prompt in batch["prompt"])
    records, places = data.chosen("train")
    assert len(records) == len({text(i) for i in range(num)})
    assert len(places) == len(records) - 2 * round(0.1 * len(records))
    assert [records[i]["prompt"] for i in (0, 1, 2)] == [text(i) for i in (0, 2, 3)]
    if suffix == ".jsonl":
        assert records[0]["tag"] == "first" and records[1]["tag"] is None


def test_what_was_left_out_is_said_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(prompts, "rank_zero_info", said.append)
    monkeypatch.setattr(prompts, "_LARGE", 1)
    path = large(tmp_path / "many.txt", 100)
    for _ in range(2):
        data_of(path).setup("fit")
    assert len(said) == 2 and said[0] == said[1]
    assert "85 prompts used; 15 left out that repeat another" in said[0]
    path.write_text(f"{path.read_text()}\nand one more")  # another file
    data_of(path).setup("fit")
    assert "86 prompts used" in said[2]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_packed_records_are_those_of_a_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"few{suffix}"
    if suffix == ".csv":
        path.write_text('prompt,tag\n"é, a \u2028",1\nb,\n')
    else:
        large(path, 10)
    small = prompts.PromptFile(str(path)).load()
    monkeypatch.setattr(prompts, "_LARGE", 1)
    packed = prompts.PromptFile(str(path), cache_dir=str(tmp_path)).load()
    assert list(packed) == list(small) and list(packed[1:]) == list(small)[1:]
