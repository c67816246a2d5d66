"""Pictures of the shapes world without captions: what is painted is what the labels say."""

import sys
from pathlib import Path

import numpy as np
import pytest

from domains.text_to_image.shapes import pictures
from domains.text_to_image.shapes.detector import detect
from domains.text_to_image.shapes.pictures import CLASSES, labels_of, paint, scene
from domains.text_to_image.shapes.world import COLORS, SHAPES


def test_a_picture_follows_from_seed_and_number() -> None:
    np.testing.assert_array_equal(paint(3, 5, 32), paint(3, 5, 32))
    assert paint(3, 5, 32).shape == (32, 32, 3) and paint(3, 5, 32).dtype == np.uint8
    every = {paint(seed, i, 32).tobytes() for seed in (0, 1) for i in range(20)}
    assert len(every) == 40


def test_labels_are_what_the_detector_finds() -> None:
    agree = 0
    for i in range(60):
        found = {name for d in detect(paint(0, i, 64)) for name in (d.shape, d.color)}
        labels = dict(zip(CLASSES, labels_of(scene(0, i)), strict=True))
        agree += found == {name for name in (*SHAPES, *COLORS) if labels[name]}
        assert sum(labels[f"{ground} ground"] for ground in ("white", "grey", "black")) == 1
    assert agree >= 58


def test_pictures_are_of_all_kinds() -> None:
    labels = np.stack([labels_of(scene(0, i)) for i in range(400)])
    assert labels.shape == (400, 17)
    assert (labels.mean(axis=0) > 0.05).all() and (labels.mean(axis=0) < 0.95).all()
    counts = [len(scene(0, i).figures) for i in range(400)]
    assert set(counts) == {1, 2, 3, 4}


def test_the_file_holds_what_is_painted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shapes.npz"
    monkeypatch.setattr(
        sys, "argv", ["pictures", "--num=4", "--size=16", "--seed=2", f"--out={path}"]
    )
    pictures.main()
    with np.load(path) as file:
        assert list(file["classes"]) == list(CLASSES)
        for i in range(4):
            np.testing.assert_array_equal(file["images"][i], paint(2, i, 16))
            np.testing.assert_array_equal(file["labels"][i], labels_of(scene(2, i)))
