"""Folders of pictures: what is decoded, what is left out, what is kept between runs."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from domains.image.sources import ImageFolder
from lit_rlft.core.checks import UsageError
from lit_rlft.kit import sources
from lit_rlft.kit.picture_folder import Reading


def picture(seed: int, height: int = 12, width: int = 12) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of five pictures, nested, of three formats, and files that are none."""
    folder = tmp_path / "pictures"
    (folder / "a/b").mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "a/0.png")
    Image.fromarray(picture(1)).save(folder / "a/b/1.PNG")
    Image.fromarray(picture(2)).save(folder / "a/b/2.webp", lossless=True)
    Image.fromarray(picture(3, 40, 30)).save(folder / "3.jpg", quality=95)
    Image.fromarray(picture(4, 5, 7)).save(folder / "4.jpeg")
    (folder / "readme.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("nor this")
    return folder


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Return a function that reads a folder with its cache in the test's own folder."""

    def load(path: Path, **settings: Any) -> NDArray[np.uint8]:
        settings = {"size": 12, "cache_dir": str(tmp_path / "cache"), **settings}
        return ImageFolder(str(path), **settings).load().pixels

    return load


def test_nested_folders_of_all_formats(pictures: Path, load: Any) -> None:
    pixels = load(pictures)
    assert pixels.shape == (5, 3, 12, 12) and isinstance(pixels, np.memmap)
    # In the order of their paths: 3.jpg, 4.jpeg, a/0.png, a/b/1.PNG, a/b/2.webp.
    for place, seed in ((2, 0), (3, 1), (4, 2)):
        np.testing.assert_array_equal(pixels[place].transpose(1, 2, 0), picture(seed))


def test_a_second_reading_decodes_nothing(
    pictures: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = np.array(load(pictures))
    monkeypatch.setattr(Reading, "read", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load(pictures), first)


def test_a_change_of_the_folder_makes_a_new_array(pictures: Path, load: Any) -> None:
    assert len(load(pictures)) == 5
    Image.fromarray(picture(9)).save(pictures / "a/0.png")
    os.utime(pictures / "a/0.png", (1, 1))
    np.testing.assert_array_equal(load(pictures)[2].transpose(1, 2, 0), picture(9))
    (pictures / "a/0.png").rename(pictures / "a/b/0.png")  # same age and size, another name
    assert len(load(pictures)) == 5
    (pictures / "4.jpeg").unlink()
    assert len(load(pictures)) == 4
    assert load(pictures, size=6).shape == (4, 3, 6, 6)
    assert load(pictures, size=(6, 8)).shape == (4, 3, 6, 8)
    assert load(pictures, channels=1).shape == (4, 1, 12, 12)


def test_broken_files_are_left_out_and_counted(
    pictures: Path, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.fromarray(picture(5, 64, 64)).save(pictures / "cut.jpg")
    content = (pictures / "cut.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(content[: len(content) // 2])
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "moving.gif").write_bytes(b"")
    (pictures / "readme.txt").write_text("no picture")
    (pictures / "text.webp").write_text("no picture")
    png = (pictures / "a/0.png").read_bytes()
    (pictures / "damaged.png").write_bytes(png[:60] + bytes(40) + png[100:])
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
    said: list[str] = []
    monkeypatch.setattr("domains.image.sources.folders.rank_zero_info", said.append)
    assert len(load(pictures)) == 5
    assert load(pictures).shape[0] == 5  # from the cache
    assert len(said) == 2 and said[0] == said[1]
    assert f"{pictures}: 5 of 9 pictures used; 1 enlarged" in said[0]
    assert "2 left out with no readable picture (empty.png, text.webp)" in said[0]
    assert "1 .gif" in said[0] and "1 .txt" in said[0] and "not looked at" in said[0]
    assert "2 left out with damage or an early end (cut.jpg, damaged.png)" in said[0]
    with pytest.raises(UsageError, match=r"cut.jpg has damage or an early end; fix the file"):
        load(pictures, strict=True)
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_folders_without_pictures(tmp_path: Path, load: Any) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no picture files"):
        load(tmp_path / "empty")
    (tmp_path / "empty/text.png").write_text("no picture")
    with pytest.raises(
        UsageError, match=r"1 left out with no readable picture .*; nothing is left to use"
    ):
        load(tmp_path / "empty")
    (tmp_path / "empty/text.png").rename(tmp_path / "empty/text.bmp")
    with pytest.raises(UsageError, match=r"it has 1 other file \(1 \.bmp\)"):
        load(tmp_path / "empty")


def test_a_full_disk_ends_with_one_sentence(
    pictures: Path, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match=r"No space left on device\); set cache_dir"):
            load(pictures)
    assert not list((tmp_path / "cache").iterdir())
    assert len(load(pictures)) == 5


def test_crop_pad_and_stretch(tmp_path: Path, load: Any) -> None:
    (tmp_path / "wide").mkdir()
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = 255  # a white square in the middle of a wide black picture
    Image.fromarray(stripes).save(tmp_path / "wide/0.png")
    assert (load(tmp_path / "wide", size=4) == 255).all()
    padded = load(tmp_path / "wide", size=12, fit="pad", resample="nearest")[0, 0]
    np.testing.assert_array_equal(padded, np.pad(stripes[..., 0], ((4, 4), (0, 0))))
    stretched = load(tmp_path / "wide", size=(4, 3), fit="stretch", resample="box")[0, 0]
    np.testing.assert_array_equal(stretched, [[0, 255, 0]] * 4)


def test_transparency_greys_palettes_and_rotations(tmp_path: Path, load: Any) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    clear = np.zeros((12, 12, 4), np.uint8)
    clear[:, :6] = (200, 0, 0, 255)
    Image.fromarray(clear).save(folder / "0.png")
    deep = np.linspace(0, 65535, 144).reshape(12, 12).round().astype(np.uint16)
    Image.fromarray(deep).save(folder / "1.png")
    Image.fromarray(picture(0)).convert("P").save(folder / "2.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    Image.fromarray(picture(1)).save(folder / "3.png", exif=exif)
    Image.fromarray(picture(2)[..., 0]).save(folder / "4.png")
    Image.new("1", (12, 12), 1).save(folder / "5.png")
    pixels = load(folder)
    assert (pixels[0, :, :, 6:] == 255).all() and (pixels[0, 0, :, :6] == 200).all()
    np.testing.assert_array_equal(pixels[1, 0], (deep / 257).round())
    assert pixels.shape == (6, 3, 12, 12)
    np.testing.assert_array_equal(pixels[3].transpose(1, 2, 0), np.rot90(picture(1), -1))
    np.testing.assert_array_equal(pixels[4, 1], picture(2)[..., 0])
    assert (pixels[5] == 255).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"fit": "zoom"}, "fit is 'zoom'; use 'crop', 'pad' or 'stretch'"),
        ({"resample": "sinc"}, "resample is 'sinc'; use 'nearest', 'box'"),
        ({"channels": 4}, r"channels is 4; use 1 or 3"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ImageFolder(str(tmp_path), **settings)


def test_two_processes_at_once_leave_one_array(
    pictures: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.array(load(pictures))
    (made,) = (tmp_path / "cache").iterdir()
    shutil.move(made, tmp_path / "made")
    original = sources.save_arrays

    def overtaken(*args: Any) -> None:
        original(*args)
        shutil.copytree(tmp_path / "made", made)  # the other process is done first

    monkeypatch.setattr(sources, "save_arrays", overtaken)
    np.testing.assert_array_equal(load(pictures), expected)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made.name]
