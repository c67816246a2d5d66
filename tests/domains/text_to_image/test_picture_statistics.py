"""Statistics of pictures, against closed forms and an independent computation."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from domains.text_to_image.picture_statistics import PictureStatistics, grid_strength
from lit_rlft.core.checks import BadArgument
from tests.domains.text_to_image.test_metrics import condition, constants


def lines(period: int, size: int, *, first: int = 3) -> torch.Tensor:
    """Black lines on grey, every so many pixels, [1, H, W]."""
    luma = torch.full((1, size, size), 0.5)
    luma[:, :, first::period] = 0
    return luma


@pytest.mark.parametrize("period", [8, 16])
def test_lines_have_the_closed_form(period: int) -> None:
    # An edge on both sides of a line: 2 of p places have it.
    luma = lines(period, 8 * period + 1)
    for one in (luma, luma.transpose(1, 2)):
        assert float(grid_strength(one, period)) == pytest.approx((period / 2 - 1) ** 0.5, rel=1e-5)


def test_a_ramp_and_a_plain_picture_have_no_grid() -> None:
    ramp = torch.linspace(0, 1, 65).expand(1, 65, -1)
    assert float(grid_strength(ramp, 8)) < 1e-4
    assert float(grid_strength(torch.full((1, 64, 64), 0.3), 8)) == 0


def test_noise_has_little_grid_and_a_grid_upon_it_shows() -> None:
    noise = 0.5 + 0.1 * torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0))
    plain = float(grid_strength(noise, 8))
    patched = noise.clone()
    patched[:, :, ::8] += 0.1
    assert plain < 0.05 and float(grid_strength(patched, 8)) > 5 * plain


def test_small_pictures_have_no_grid_at_all() -> None:
    values = PictureStatistics().evaluate(torch.rand(1, 3, 15, 40), condition([0]))
    assert values["grid"].isnan().all() and not values["sharpness"].isnan().any()
    # Of two periods the one that fits counts.
    assert (
        not PictureStatistics().evaluate(torch.rand(1, 3, 20, 20), condition([0]))["grid"].isnan()
    )


def test_statistics_equal_scipys() -> None:
    pictures = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    values = PictureStatistics().evaluate(pictures, condition([0, 1]))
    for i, picture in enumerate(pictures.double().numpy()):
        luma = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        laplacian = ndimage.laplace(luma)[1:-1, 1:-1]
        assert float(values["sharpness"][i]) == pytest.approx(np.abs(laplacian).mean(), rel=1e-5)
        assert float(values["contrast"][i]) == pytest.approx(luma.std(), rel=1e-5)
        assert float(values["saturation"][i]) == pytest.approx(
            np.ptp(picture, axis=0).mean(), rel=1e-5
        )


def test_grey_pictures_have_no_saturation() -> None:
    values = PictureStatistics().evaluate(constants(0.2, 0.9), condition([0, 0]))
    assert values["saturation"].tolist() == [0, 0] and values["sharpness"].abs().max() < 1e-6


@pytest.mark.parametrize("periods", [(), (1,)])
def test_periods_are_checked(periods: tuple[int, ...]) -> None:
    with pytest.raises(BadArgument, match="periods"):
        PictureStatistics(periods)
