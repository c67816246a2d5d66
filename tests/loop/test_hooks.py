"""What an algorithm's `collect` and `loss` may return."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.hooks import Audience

THREE = Experience(
    {"x": torch.zeros(3, 2)},
    Condition([{}], {}, torch.zeros(3, dtype=torch.int64)),
    [0, 1, 2],
    metrics={"reward": 1.0, "share": torch.ones(())},  # type: ignore[dict-item]
    histograms={"reward": torch.ones(5)},
    counts=[1, 2],
)


def audience() -> Audience:
    module: Any = SimpleNamespace()
    return Audience(module, None)


def watched(found: Any) -> Any:
    """Return what comes of a loss of three samples."""
    return audience().watched(lambda *_: found)(THREE, None)


def test_a_loss_per_sample_passes() -> None:
    losses, values = watched((torch.ones(3), {"a": torch.ones(3)}))
    assert losses.tolist() == [1, 1, 1] and values.keys() == {"a"}


@pytest.mark.parametrize(
    ("found", "given"),
    [
        # A mean, which microbatches would add up.
        ((torch.ones(()), {}), r"a tensor of float32 \[\] as losses"),
        ((torch.ones(3, 1), {}), r"a tensor of float32 \[3, 1\] as losses"),
        (torch.ones(3), r"a tensor of float32 \[3\]"),
        ((torch.ones(3), None), "None as values to log"),
        (None, "None"),
    ],
)
def test_anything_else_is_refused(found: Any, given: str) -> None:
    sentence = (
        rf"loss returned {given}; it returns .* one loss per sample, shape \(3,\), and a dict"
    )
    with pytest.raises(UsageError, match=sentence):
        watched(found)


@pytest.mark.parametrize("value", [1.0, torch.ones(()), torch.ones(2)])
def test_values_to_log_are_one_per_sample(value: Any) -> None:
    """A mean would be divided by the number of samples once more."""
    sentence = r"loss returned a .* as value 'a' to log; .* one number per sample, shape \(3,\)"
    with pytest.raises(UsageError, match=sentence):
        watched((torch.ones(3), {"a": value}))


def test_an_experience_whose_parts_fit_passes() -> None:
    audience().on_experience(THREE)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "returned None; it returns a lit_rlft.loop.experience.Experience"),
        ({"states": {}}, "returned a dict; it returns"),
        (replace(THREE, states={"x": torch.zeros(2)}), r"3 seeds whose state 'x' is .* \[2\]"),
        (replace(THREE, states={"x": None}), "3 seeds whose state 'x' is None"),
        (replace(THREE, seeds=[0]), r"1 seeds whose state 'x' is a tensor of float32 \[3, 2\]"),
        (replace(THREE, condition=THREE.condition.index(slice(1))), "a condition of 1 rows"),
        (replace(THREE, counts=[1, 1]), "3 seeds, but counts for 2 samples"),
        (replace(THREE, metrics={"a": torch.ones(2)}), r"metric 'a' is .* \[2\]; it is a number"),
        (replace(THREE, metrics={"a": "x"}), "metric 'a' is a str; it is a number"),
        (replace(THREE, histograms={"a": [1.0]}), "histogram 'a' is a list, not a tensor"),
    ],
)
def test_parts_that_do_not_fit_are_refused(found: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=rf"SimpleNamespace\.collect .*{sentence}"):
        audience().on_experience(found)
