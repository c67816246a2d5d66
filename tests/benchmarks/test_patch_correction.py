"""Arms of the benchmark on photographs: what is kept of them and whom they are compared with."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import patch_correction
from benchmarks.patch_correction import OWN, SHAPES, Arm, RandomConvolutions
from domains.image import EMBEDDED
from lit_rlft.kit.statistics import frechet_distance

OPTIONS = argparse.Namespace(
    tolerance=1e-2, max_iterations=2, data_noise=0.0, passes=1, epochs=1, rows=4, num=8
)


def test_features_see_brightness_and_contrast() -> None:
    """Networks that normalise within a picture would not; the weights are always the same."""
    pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = RandomConvolutions()
    features = network(pictures)
    torch.testing.assert_close(features, RandomConvolutions()(pictures))
    for other in (pictures + 0.2, (pictures - 0.5) / 2 + 0.5):
        moved = (network(other) - features).norm() / features.norm()
        assert moved > 0.1


def test_structure_is_what_is_left_without_colour_and_contrast() -> None:
    """Colour is not seen, contrast hardly, what was smoothed is; all flat pictures are the same."""
    flat = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(4, 3, 32, 32)
    pictures = flat + 0.2 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = RandomConvolutions(standardised=True)
    features = network(pictures)
    coloured = pictures + torch.tensor([0.3, -0.1, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(network(coloured), features, rtol=1e-4, atol=1e-4)
    moved = (network(1.5 * pictures) - features).norm() / features.norm()
    smooth = torch.nn.functional.avg_pool2d(pictures, 4).repeat_interleave(4, -1)
    other = (network(smooth.repeat_interleave(4, -2)) - features).norm() / features.norm()
    assert 0.01 < moved < 0.2 < other
    torch.testing.assert_close(network(flat), network(flat[:1]).expand(4, -1), rtol=0, atol=1e-4)


def test_an_arm_is_compared_with_the_next_dearer_base() -> None:
    costs = {Arm(2): 2.0, Arm(3): 3.0, Arm(8): 8.0, Arm(2, 64): 2.5, Arm(8, 64): 8.5}
    results = {arm: {"flops": flops} for arm, flops in costs.items()}
    assert patch_correction.dearer(Arm(2, 64), results) == Arm(3)
    assert patch_correction.dearer(Arm(8, 64), results) is None


def test_seeds_do_not_shrink_the_error_of_the_pictures_they_share() -> None:
    """Deviation of 1, 3 and 5 is 2, so that their mean has 2 / sqrt(3) beside the pictures' 0.5."""
    assert patch_correction.over_seeds([(3.0, 0.5)]) == (3.0, 0.5)
    value, error = patch_correction.over_seeds([(1.0, 0.1), (3.0, 0.5), (5.0, 0.7)])
    assert value == pytest.approx(3.0)
    assert error == pytest.approx((4 / 3 + (0.01 + 0.25 + 0.49) / 3) ** 0.5)


def test_copies_come_first_among_sets_of_patches(root: Path) -> None:
    data = patch_correction.data_of(root, 4)
    data.setup("fit")
    packed, inverted = data.chosen("train")
    copies = torch.from_numpy(packed.pixels[inverted]) / 255 + 0.001
    distances = patch_correction.nearest_by_set(copies, root, 4)
    assert distances[0] == pytest.approx(0.001 * (3 * 32 * 32) ** 0.5, rel=0.01)
    assert len(distances) == 40
    assert patch_correction.rank_of_first(distances) == 1
    assert patch_correction.rank_of_first([3.0, 2.0, 5.0, 1.0]) == 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded flow as the base, and noise as its patches."""
    folder = tmp_path_factory.mktemp("patches")
    (folder / "base").mkdir()
    (folder / "base" / "tuned").symlink_to(EMBEDDED / "shapes")
    draw = np.random.default_rng(0).integers
    for name in ("train", "held_out"):
        np.save(folder / f"{name}.npy", draw(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    return folder


@pytest.mark.slow
def test_arms_start_from_the_same_noise_and_are_kept(root: Path) -> None:
    options = argparse.Namespace(
        **vars(OPTIONS), base_only=[1, 2], base_steps=[2], widths=[8], seeds=[0]
    )
    patch_correction.sweep(root, options)
    judged = patch_correction.metrics(root)
    found = patch_correction.held(root, judged)
    assert list(found) == [Arm(1), Arm(2), Arm(2, 8)]
    assert found[Arm(2)]["flops"] == 2 * found[Arm(1)]["flops"]
    assert found[Arm(2)]["flops"] < found[Arm(2, 8)]["flops"] < 1.1 * found[Arm(2)]["flops"]
    # A corrector of few updates hands noise on nearly unchanged: the pictures are nearly the same.
    alone, corrected = (found[arm]["pictures"].float() for arm in (Arm(2), Arm(2, 8)))
    assert (alone - corrected).abs().mean() < 10
    metric, *_ = judged
    (value, error), gain = patch_correction.distances(metric, Arm(1), found)
    features = found[Arm(1)]["features"][OWN]
    assert value == pytest.approx(frechet_distance(features, metric.real_features()))
    assert error > 0
    assert gain is None
    assert found[Arm(1)]["features"][SHAPES].shape == (8, 64)
    assert len(found[Arm(2, 8)]["nearest"]) == 40
    assert patch_correction.shown(root) == list(found)
