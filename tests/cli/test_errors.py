"""Errors name the argument in Python and its key on the command line."""

from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lit_rlft.cli import main
from lit_rlft.cli.errors import sentence
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import TopK
from lit_rlft.loop.reference import LoRA

CONFIGS = ["--config=gaussian_mixture", "--config=p_graft", "--name=run"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "TopK: k must be at least 1, got 0"),
        (lambda: Sampler(0), "Sampler: num_steps must be at least 1, got 0"),
        (lambda: LoRA(rank=0), "LoRA: rank must be at least 1, got 0"),
    ],
)
def test_python_reads_the_class_and_its_argument(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(BadArgument) as raised:
        make()
    assert str(raised.value) == message and sentence(raised.value) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.selection.k=0", r"model\.init_args\.selection\.init_args\.k must be at least 1"),
        ("model.sampler.num_steps=0", r"model\.init_args\.sampler\.num_steps must be at least 1"),
        ("model.lora.rank=0", r"model\.init_args\.lora\.rank must be at least 1"),
        ("pipeline.stds=null", r"cannot be made .*\(null is no value of stds\)"),
        ("model.init_args.seed=null", r"model\.init_args\.seed must be a whole number, not null"),
        ("model.num_candidates=0", r"model\.init_args\.num_candidates must be at least 1"),
        (
            "pipeline.stds=[1e300, 0.25, 0.2, 0.25, 0.2]",
            r"pipeline\.init_args: GaussianMixturePipeline cannot be made with these settings",
        ),
        ("model.selection.k=9", r"selection\.init_args\.k is 9, more than the 4 candidates"),
    ],
)
def test_the_command_line_reads_the_key(
    setting: str, message: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(SystemExit, match=f"^lit-rlft: error: .*{message}"):
        main(["fit", *CONFIGS, f"--{setting}"])


def test_keys_are_found_in_lists_and_below_other_classes() -> None:
    part = {"class_path": "a.TopK", "init_args": {"k": 0}}
    config = Namespace(metrics={"parts": [{"class_path": "b.C"}, part]})
    with pytest.raises(UsageError) as raised:
        TopK(0)
    assert sentence(raised.value, config) == (
        "metrics.parts.1.init_args.k must be at least 1, got 0"
    )
    assert sentence(raised.value, Namespace(metrics={})) == str(raised.value)


def test_a_network_that_cannot_be_compiled_is_told_with_the_remedy() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction")

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    torch._dynamo.reset()
    layer = Twice()
    layer.compile(backend=broken)
    with pytest.raises(Exception) as caught:
        layer(torch.zeros(1, 1))
    torch._dynamo.reset()
    told = sentence(caught.value)
    assert told is not None and "\n" not in told
    assert told.startswith("pipeline.init_args.compile: torch could not compile the denoiser")
    assert "set it to null" in told
