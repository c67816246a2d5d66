"""Rewards of images: by hand, by an independent computation, and what they refuse."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from domains.image.networks.features import FeatureArchitecture, FeatureNetwork
from domains.image.rewards import Brightness, ClassProbability
from domains.image.sources import Digits
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition


def condition_of(num: int) -> Condition:
    return Condition([{"name": "image"}], {}, torch.zeros(num, dtype=torch.int64))


def test_brightness_is_pillows_luminance() -> None:
    pixels = torch.randint(0, 256, (4, 3, 9, 7), generator=torch.Generator().manual_seed(0))
    pixels = pixels.byte()
    expected = [
        torch.tensor(list(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L").tobytes()))
        .double()
        .mean()
        / 255
        for p in pixels
    ]
    own = Brightness()(pixels / 255, condition_of(4))
    # Pillow rounds each pixel to a byte.
    torch.testing.assert_close(own.double(), torch.stack(expected), rtol=0, atol=0.5 / 255)
    target = Brightness(target=0.25)(pixels / 255, condition_of(4))
    torch.testing.assert_close(target, -(own - 0.25).abs())


def test_brightness_has_the_gradient_of_its_weights() -> None:
    pictures = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    Brightness()(pictures, condition_of(1)).sum().backward()
    assert pictures.grad is not None
    expected = torch.tensor([0.299, 0.587, 0.114]) / 4
    torch.testing.assert_close(pictures.grad[0, :, 0, 0], expected)


def test_the_digit_classifier_knows_the_digits() -> None:
    images = Digits().load()
    assert images.labels is not None
    pictures = torch.from_numpy(images.pixels[:200]).expand(-1, 3, -1, -1) / 255
    labels = torch.from_numpy(images.labels[:200])
    columns = [
        ClassProbability(str(digit), output="probability")(pictures, condition_of(200))
        for digit in range(10)
    ]
    table = torch.stack(columns, dim=1)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(200))
    assert (table.argmax(dim=1) == labels).float().mean() > 0.97
    logs = ClassProbability("4")(pictures, condition_of(200))
    torch.testing.assert_close(logs.exp(), table[:, 4], rtol=1e-4, atol=1e-6)


def test_the_share_of_a_class() -> None:
    images = Digits().load()
    assert images.labels is not None
    pictures = torch.from_numpy(images.pixels[:200]).expand(-1, 3, -1, -1) / 255
    reward = ClassProbability("7")
    values = reward.evaluate(pictures, condition_of(200))
    assert set(values) == {"ClassProbability", "ClassProbability/share"}
    shown = torch.from_numpy(images.labels[:200] == 7)
    assert (values["ClassProbability/share"].bool() == shown).float().mean() > 0.98
    torch.testing.assert_close(values["ClassProbability"], reward(pictures, condition_of(200)))


def test_several_classes_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureArchitecture(8, 3, ["red", "round"], exclusive=False))
    network.save(tmp_path / "net")
    pictures = torch.rand(5, 3, 8, 8)
    loaded = FeatureNetwork.load(tmp_path / "net", "net")
    expected = loaded.logits(loaded(pictures)).sigmoid()
    for i, label in enumerate(("red", "round")):
        reward = ClassProbability(label, str(tmp_path / "net"), output="probability")
        torch.testing.assert_close(reward(pictures, condition_of(5)), expected[:, i])
        share = reward.evaluate(pictures, condition_of(5))["ClassProbability/share"]
        assert torch.equal(share.bool(), expected[:, i] > 0.5)


def test_gradients_of_the_classifier_agree_with_differences() -> None:
    reward = ClassProbability("3").double()
    pictures = 0.1 + 0.8 * torch.rand(
        2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    pictures.requires_grad_()
    network = reward.classifier
    value = network.log_probabilities(network(pictures))[:, 3].sum()
    (exact,) = torch.autograd.grad(value, pictures)
    (own,) = torch.autograd.grad(reward(pictures, condition_of(2)).sum(), pictures)
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-7)
    step = torch.zeros_like(pictures)
    step[0, 1, 3, 4] = 1e-5
    with torch.no_grad():
        up, down = (
            network.log_probabilities(network(pictures + sign * step))[0, 3] for sign in (1, -1)
        )
    assert exact[0, 1, 3, 4] == pytest.approx(float(up - down) / 2e-5, rel=1e-4)


def test_the_classifier_is_frozen() -> None:
    reward = ClassProbability()
    reward.train()
    assert not reward.classifier.training
    assert not any(p.requires_grad for p in reward.parameters())


def test_settings_and_samples_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"target must be in \[0, 1\]"):
        Brightness(target=2)
    with pytest.raises(UsageError, match="label is 'ten'; 'digits_classifier' knows 0, 1, 2"):
        ClassProbability("ten")
    with pytest.raises(UsageError, match="output is 'logit'; use"):
        ClassProbability(output="logit")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="could not be loaded as a feature network"):
        ClassProbability(pretrained=str(tmp_path))
    with pytest.raises(UsageError, match=r"shape \(2, 3, H, W\).*got \(2, 1, 8, 8\)"):
        Brightness()(torch.rand(2, 1, 8, 8), condition_of(2))
    with pytest.raises(UsageError, match=r"shape \(3, 3, H, W\), one per condition"):
        Brightness()(torch.rand(2, 3, 8, 8), condition_of(3))
    with pytest.raises(UsageError, match="got values from 2"):
        Brightness()(2 + torch.rand(2, 3, 8, 8), condition_of(2))
