"""Errors name the argument in Python and its key on the command line."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.rewards import Stability
from lit_rlft.cli import main
from lit_rlft.cli.errors import sentence
from lit_rlft.cli.index import index
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import TopK
from lit_rlft.loop.differentiable import NoGradient
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.side.rewards import RewardWorkers

CONFIGS = ["--config=gaussian_mixture", "--config=p_graft", "--name=run"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "TopK: k must be at least 1, got 0"),
        (lambda: Sampler(0), "Sampler: num_steps must be at least 1, got 0"),
        (lambda: LoRA(rank=0), "LoRA: rank must be at least 1, got 0"),
        # What would have no effect.
        (lambda: Stability(power=2.0), "Stability: power must be 1 unless graded is true, got 2.0"),
        (
            lambda: RewardWorkers(parts=[]),
            "RewardWorkers: parts must be names of parts, or null for all of them; set "
            "model.reward_workers to null for none",
        ),
        (
            lambda: LayoutPipeline("grammar", category_weight=2.0),
            "LayoutPipeline: category_weight must be 1 where classes are no integers, got 2.0",
        ),
        (
            lambda: MoleculePipeline("small", type_weight=2.0),
            "MoleculePipeline: type_weight must be 1 where types are no integers, got 2.0",
        ),
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


@pytest.mark.parametrize(
    ("domain", "settings", "message"),
    [
        ("digits", ["--reward=ClassProbability", "--reward.pretrained=no"], "reward.*.pretrained"),
        (
            "digits",
            ["--metrics.parts+=SetDistances", "--metrics.parts.features=no"],
            "metrics.*.features",
        ),
        ("layout", ["--reward=Critic", "--reward.pretrained=no"], "reward.*.pretrained"),
        ("shapes", ["--reward=ShapesClassifier", "--reward.pretrained=no"], "reward.*.pretrained"),
        (
            "shapes",
            ["--reward=LAIONAesthetic", "--reward.clip=shapes_clip", "--reward.head=no"],
            r"reward\.init_args\.head:",
        ),
        ("shapes", ["--reward=HPSv2", "--reward.tokenizer=no"], r"reward\.init_args\.tokenizer:"),
        (
            "shapes",
            ["--metrics.parts+=VLMJudge", "--metrics.parts.pretrained=no"],
            r"metrics\.parts\.2\.init_args\.pretrained:",
        ),
    ],
)
def test_networks_that_cannot_be_loaded_are_named_by_their_key(
    domain: str,
    settings: list[str],
    message: str,
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(SystemExit, match=f"^lit-rlft: error: {message} 'no' could not be loaded"):
        main(["fit", f"--config={domain}", "--config=p_graft", *settings])


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


@pytest.mark.parametrize(
    ("domain", "reward"),
    [("shapes", None), ("molecule", None), ("layout", "HTTPReward --reward.url=http://a")],
)
def test_rewards_with_a_gradient_are_named(
    domain: str, reward: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", f"--config={domain}", "--config=drtune", "--name=run"]
    words += f"--reward={reward}".split() if reward else []
    with pytest.raises(SystemExit, match=r"has no gradient; give --reward one of .*p_graft$") as no:
        main(words)
    (listed,) = re.findall("one of (.*), or take", str(no.value))
    known = {entry.name: entry for entry in index() if entry.kind == "reward" and entry.domain}
    package = {"shapes": "text_to_image"}.get(domain, domain)
    for name in listed.split(", "):
        module = import_module(f"domains.{package}.rewards")
        assert getattr(module, name).differentiable is True and name in known
    without = [e.name for e in known.values() if e.domain == package and e.gradient == "no"]
    assert without and not set(without) & set(listed.split(", "))


def test_a_pipeline_of_ones_own_has_the_general_remedy() -> None:
    error = NoGradient("DRTune needs a differentiable reward, but Own has no gradient")
    config = Namespace(pipeline=Namespace(class_path="own.Pipeline"))
    assert sentence(error, config) == sentence(error) == str(error)
    assert "differentiable = True" in str(error)


def test_a_folder_of_ones_own_may_be_called_lightning(tmp_path: Path) -> None:
    file = tmp_path / "lightning" / "own.py"
    with pytest.raises(ValueError) as raised:
        exec(compile("raise ValueError('max_epochs')", str(file), "exec"))
    assert sentence(raised.value, Namespace(trainer=Namespace(max_epochs=1))) is None
