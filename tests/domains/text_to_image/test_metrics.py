from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image import metrics
from domains.text_to_image.metrics import Diversity
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition


def condition(rows: Sequence[int]) -> Condition:
    entries = [{"prompt": f"prompt {i}"} for i in range(max(rows) + 1)]
    return Condition(entries=entries, tables={}, rows=torch.tensor(rows))


def constants(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 64, 64)


class MeanColor(nn.Module):
    """Stands in for CLIP: the direction of the mean colour."""

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.pretrained = pretrained

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return nn.functional.normalize(pictures.mean(dim=(2, 3)), dim=-1)


class TestPixels:
    def test_two_constants(self):
        values = Diversity("pixels").evaluate(constants(0.2, 0.9), condition([0, 0]))
        assert list(values) == ["diversity"]
        assert values["diversity"].allclose(torch.tensor([0.7, 0.7]))

    def test_only_samples_of_the_same_condition_count(self):
        pictures = constants(0.0, 0.5, 0.1, 0.9, 0.4, 1.0)
        value = Diversity("pixels").evaluate(pictures, condition([0, 1, 0, 1, 0, 2]))["diversity"]
        # Of the first three the mean is 0.8 / 3; without one of them 0.3, 0.4 or 0.1.
        expected = torch.tensor([0.8 - 0.6, 0.4, 0.8 - 0.8, 0.4, 0.8 - 0.2])
        assert value[:5].allclose(expected, atol=1e-5)
        assert value[5].isnan()

    def test_equal_pictures_have_none(self):
        pictures = torch.rand(1, 3, 64, 64).expand(3, -1, -1, -1)
        value = Diversity("pixels").evaluate(pictures, condition([0, 0, 0]))["diversity"]
        assert value.equal(torch.zeros(3))

    def test_detail_below_the_pooling_does_not_count(self):
        board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
        pictures = torch.stack([board, 1 - board]).float()[:, None].expand(-1, 3, -1, -1)
        value = Diversity("pixels").evaluate(pictures, condition([0, 0]))["diversity"]
        assert value.allclose(torch.zeros(2), atol=1e-6)


class TestClip:
    @pytest.fixture(autouse=True)
    def mean_color(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(metrics, "CLIPEncoder", MeanColor)

    def test_is_one_minus_the_cosine(self):
        colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
        pictures = colors[:, :, None, None].expand(-1, -1, 32, 32)
        metric = Diversity(pretrained="somewhere")
        assert metric.encoder.pretrained == "somewhere"
        value = metric.evaluate(pictures, condition([0, 0, 0, 1]))["diversity"]
        slanted = 1 - 0.5**0.5
        # Three times the mean, minus twice the mean without one of them.
        whole = 1 + 2 * slanted
        expected = torch.tensor([whole - 2 * slanted, whole - 2 * slanted, whole - 2])
        assert value[:3].allclose(expected, atol=1e-6)
        assert value[3].isnan()

    def test_autocast_changes_nothing(self):
        pictures = torch.rand(4, 3, 32, 32)
        metric, given = Diversity(), condition([0] * 4)
        expected = metric.evaluate(pictures, given)["diversity"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert metric.evaluate(pictures, given)["diversity"].allclose(expected, atol=1e-6)


def test_no_gradient_is_recorded():
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    value = Diversity("pixels").evaluate(pictures, condition([0, 0]))["diversity"]
    assert not value.requires_grad


def test_wrong_input_is_refused():
    with pytest.raises(UsageError, match="features is 'dino'; use 'clip' or 'pixels'"):
        Diversity("dino")
    with pytest.raises(UsageError, match=r"got torch\.uint8"):
        Diversity("pixels").evaluate(constants(0, 1).byte(), condition([0, 0]))
