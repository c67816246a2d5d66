"""Samples that a run keeps: pictures and drawings, numbers that JSON has no word for, damage."""

import base64
import io
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_rlft.core.checks import UsageError
from lit_rlft.core.figure import Body, Figure
from lit_rlft.runs.shown import read_shown, shown, write_shown


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_pictures_are_kept_as_they_are_and_large_ones_small() -> None:
    small = torch.randint(256, (3, 8, 12), dtype=torch.uint8)
    kept = opened(shown(small, None, {})["image"])
    assert torch.equal(torch.tensor(list(kept.getdata())).T.reshape(3, 8, 12).byte(), small)
    large = opened(shown(torch.zeros(3, 600, 300, dtype=torch.uint8), None, {})["image"])
    assert large.size == (128, 256)


def test_records_come_back_and_damage_is_told(tmp_path: Path) -> None:
    values = {"a": 0.1, "b": math.nan, "c": math.inf}
    body = Body([[0, 0, 1]], ["C"], ["#000000"], [0.5], [])
    sample = shown(torch.zeros(3, 1, 1).byte(), Figure("<svg/>", body), values)
    path = write_shown(tmp_path / "x.json.gz", {"entries": [sample]})
    (read,) = read_shown(path)["entries"]
    assert read["values"] == {"a": 0.1, "b": None, "c": None} and "image" not in read
    assert read["svg"] == "<svg/>" and read["body"]["points"] == [[0, 0, 1]]
    first = path.read_bytes()
    assert write_shown(path, {"entries": [sample]}).read_bytes() == first  # no time in it
    path.write_bytes(first[:-9])
    with pytest.raises(UsageError, match=r"x\.json\.gz is damaged"):
        read_shown(path)
