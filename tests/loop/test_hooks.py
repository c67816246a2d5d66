"""What an algorithm's loss may return."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.hooks import Audience


def watched(found: Any) -> Any:
    """Return what comes of a loss of three samples."""
    module: Any = SimpleNamespace()
    condition = Condition([{}], {}, torch.zeros(3, dtype=torch.int64))
    part = Experience({"x": torch.zeros(3, 2)}, condition, [0, 1, 2])
    return Audience(module, None).watched(lambda *_: found)(part, None)


def test_a_loss_per_sample_passes() -> None:
    losses, values = watched((torch.ones(3), {"a": torch.ones(3)}))
    assert losses.tolist() == [1, 1, 1] and values.keys() == {"a"}


@pytest.mark.parametrize(
    ("found", "given"),
    [
        ((torch.ones(()), {}), r"shape \(\)"),  # a mean, which microbatches would add up
        ((torch.ones(3, 1), {}), r"shape \(3, 1\)"),
        (torch.ones(3), r"shape \(3,\)"),
        ((torch.ones(3), None), r"shape \(3,\)"),
        (None, "NoneType"),
    ],
)
def test_anything_else_is_refused(found: Any, given: str) -> None:
    sentence = (
        rf"loss returned {given}; it returns .* one loss per sample, shape \(3,\), and a dict"
    )
    with pytest.raises(UsageError, match=sentence):
        watched(found)
