"""The losses and the measurement of benchmarks/contrast.py."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def contrast(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("contrast")


def test_the_terms_add_up_and_the_bounded_contrast_is_one_of_them_at_the_reference(
    contrast: ModuleType,
) -> None:
    tuner = contrast.base(0, "page", None)
    store = contrast.Store(tuner, 8)
    tuner.train()
    weights = [p for p in tuner.trainable().parameters() if p.requires_grad]
    part = contrast.parts_of(torch.arange(8), 0, 0, alike=False)

    def gradient(loss: Any) -> torch.Tensor:
        grads = torch.autograd.grad(loss(tuner, store, part), weights, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    apart = gradient(contrast.TERMS["a - mean(a), noise apart"])
    whole = apart + gradient(contrast.TERMS["mean(a), no reward"])
    published = gradient(contrast.LOSSES["published"])
    torch.testing.assert_close(published, whole, rtol=1e-4, atol=1e-4)
    bounded = contrast.STRENGTH * gradient(contrast.LOSSES["contrast"])
    torch.testing.assert_close(bounded, apart, rtol=1e-3, atol=1e-3)


def test_products_find_the_mean_and_the_variance_of_gradients(
    contrast: ModuleType,
) -> None:
    noise = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.6, 0.0, -0.8])
    signal, error, variance = contrast.products(mean + 2 * torch.randn(4000, 3, generator=noise))
    assert signal == pytest.approx(1.0, abs=4 * error) and 0.05 < error < 0.08
    assert variance == pytest.approx(12.0, rel=0.05)
