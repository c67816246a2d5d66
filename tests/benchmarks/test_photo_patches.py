"""Patches of photographs: no pixel is in both parts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import photo_patches
from domains.image.sources import Arrays

SHAPE = (100, 151)


@pytest.fixture(scope="module")
def picture() -> photo_patches.Picture:
    """Every pixel has a colour of its own."""
    numbers = np.arange(SHAPE[0] * SHAPE[1])
    channels = [numbers % 256, numbers // 256, np.zeros_like(numbers)]
    return np.stack(channels, axis=-1).reshape(*SHAPE, 3).astype(np.uint8)


def pixels(patches: photo_patches.Picture) -> set[int]:
    wide = patches.astype(np.int64)
    return set((wide[..., 0] + 256 * wide[..., 1]).ravel().tolist())


def test_parts_share_no_pixel(picture: photo_patches.Picture) -> None:
    train, held_out = photo_patches.split([picture], seed=0)
    assert train.shape[1:] == held_out.shape[1:] == (32, 32, 3)
    assert len(train) > len(held_out) > 0
    assert not pixels(train) & pixels(held_out)
    assert len({patch.tobytes() for patch in train}) == len(train)


def test_patches_are_of_the_picture(picture: photo_patches.Picture) -> None:
    allowed = np.zeros(SHAPE, bool)
    allowed[10:43, 20:52] = True  # one patch fits, and one a pixel below, which is no second one
    (patch,) = photo_patches.patches(picture, allowed)
    np.testing.assert_array_equal(patch, picture[10:42, 20:52])


def test_files_are_read_by_the_domain(
    tmp_path: Path, picture: photo_patches.Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    arguments = ["--pictures", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["photo_patches.py", *arguments])
    photo_patches.main()
    train, _ = photo_patches.split([picture], seed=0)
    read = Arrays(str(tmp_path / "out" / "train.npy")).load().pixels
    np.testing.assert_array_equal(read, train.transpose(0, 3, 1, 2))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--pictures"):
        photo_patches.photographs(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        photo_patches.photographs(None)
