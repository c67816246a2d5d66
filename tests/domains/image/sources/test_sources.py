"""The digits, painted images and array files."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from domains.image.sources import Arrays, Digits, Generated
from lit_rlft.core.checks import UsageError


def paint(seed: int, number: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng([seed, number]).integers(0, 256, (size, size, 3), np.uint8)


def test_the_digits_are_the_published_ones() -> None:
    images = Digits().load()
    assert images.pixels.shape == (1797, 1, 8, 8) and images.pixels.dtype == np.uint8
    assert images.labels is not None
    # Numbers of each digit, and the first image, as the data set's own documentation has them.
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(images.labels).tolist() == counts
    first = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert (images.pixels[0, 0, :2] / 255 * 16).round().tolist() == first and images.labels[0] == 0
    assert images.pixels.min() == 0 and images.pixels.max() == 255
    # The mean of all 64 attributes of the UCI file's 1,797 rows, in its units of 0 to 16.
    levels = (images.pixels / 255 * 16).round()
    assert levels.mean() == pytest.approx(4.884165, abs=1e-6)


def test_painted_images_follow_from_seed_and_number() -> None:
    images = Generated(paint, num_images=5, size=4, seed=7).load()
    assert images.pixels.shape == (5, 3, 4, 4)
    np.testing.assert_array_equal(images.pixels[3].transpose(1, 2, 0), paint(7, 3, 4))
    fewer = Generated(paint, num_images=2, size=4, seed=7).load()
    np.testing.assert_array_equal(fewer.pixels, images.pixels[:2])


def test_painters_must_return_pictures() -> None:
    source = Generated(lambda seed, number, size: np.zeros((size, size)), num_images=2, size=4)
    with pytest.raises(UsageError, match=r"paint returned float64 \(4, 4\) as image 0; return"):
        source.load()
    with pytest.raises(UsageError, match="at least 1"):
        Generated(paint, num_images=0)


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)


def test_array_files_of_every_layout(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    expected = pixels.transpose(0, 3, 1, 2)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", expected)
    np.save(tmp_path / "floats.npy", (pixels / 255).astype(np.float32))
    np.savez(tmp_path / "one.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "named.npz", images=pixels, labels=np.arange(6))
    np.savez(tmp_path / "key.npz", a=pixels, b=pixels[:1])
    for name in ("last.npy", "first.npy", "floats.npy", "one.npz", "named.npz"):
        np.testing.assert_array_equal(Arrays(str(tmp_path / name)).load().pixels, expected)
    np.testing.assert_array_equal(
        Arrays(str(tmp_path / "key.npz"), key="b").load().pixels, expected[:1]
    )
    labels = Arrays(str(tmp_path / "named.npz")).load().labels
    assert labels is not None and labels.tolist() == list(range(6))
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    np.testing.assert_array_equal(
        Arrays(str(tmp_path / "grey.npy")).load().pixels, pixels[:, None, :, :, 0]
    )


def test_byte_files_are_not_read_into_memory(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    np.save(tmp_path / "file.npy", pixels)
    loaded = Arrays(str(tmp_path / "file.npy")).load().pixels
    base: object = loaded
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_a_layout_that_could_be_either_has_to_be_said(tmp_path: Path) -> None:
    both = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    np.save(tmp_path / "both.npy", both)
    path = str(tmp_path / "both.npy")
    with pytest.raises(UsageError, match="both axes 1 and 3 have 1 or 3 entries; set layout"):
        Arrays(path).load()
    np.testing.assert_array_equal(Arrays(path, layout="channels_first").load().pixels, both)
    last = Arrays(path, layout="channels_last").load().pixels
    np.testing.assert_array_equal(last, both.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((2, 4, 4, 3), 1.5), r"image 0 has values outside \[0, 1\]"),
        (np.full((2, 4, 4, 3), np.nan), r"image 0 has values outside \[0, 1\]"),
        (np.zeros((2, 4, 4, 3), np.int64), "holds int64; give uint8"),
        (np.zeros((2, 4, 4, 4), np.uint8), "neither axis 1 nor 3 has"),
        (np.zeros((2, 4), np.uint8), r"has the shape \(2, 4\); images are"),
        (np.zeros((0, 4, 4, 3), np.uint8), "has 0 images"),
    ],
)
def test_arrays_that_are_no_images(
    content: NDArray[np.generic], message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "bad.npy", content)
    with pytest.raises(UsageError, match=message):
        Arrays(str(tmp_path / "bad.npy")).load()


def test_files_that_cannot_be_used(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        Arrays(str(tmp_path / "none.npy")).load()
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UsageError, match="cannot be read as an array file"):
        Arrays(str(tmp_path / "text.npz")).load()
    np.save(tmp_path / "header.npy", pixels)
    content = (tmp_path / "header.npy").read_bytes()
    (tmp_path / "header.npy").write_bytes(content.replace(b"'descr': ", b"'$escr'$0", 1))
    with pytest.raises(UsageError, match="cannot be read as an array file"):
        Arrays(str(tmp_path / "header.npy")).load()
    np.savez(tmp_path / "two.npz", a=pixels, b=pixels)
    with pytest.raises(UsageError, match=r"holds \['a', 'b'\]; set key"):
        Arrays(str(tmp_path / "two.npz")).load()
    with pytest.raises(UsageError, match="has no 'c', only"):
        Arrays(str(tmp_path / "two.npz"), key="c").load()
    np.savez(tmp_path / "labels.npz", images=pixels, labels=np.arange(3))
    with pytest.raises(UsageError, match="6 images but 3 labels"):
        Arrays(str(tmp_path / "labels.npz")).load()
    np.savez(tmp_path / "cut.npz", images=pixels)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="cannot be read as an array file"):
        Arrays(str(tmp_path / "cut.npz")).load()
