"""Interleaved Gibbs models through the command line: algorithms, resume, processes, precision."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from domains.layout.networks.transformer import Architecture as Layouts
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.networks import Architecture as Molecules
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.cli import main
from lit_rlft.core.pipeline import Pipeline
from tests.support import (
    TWO_FORKS,
    arguments,
    assert_equal,
    checkpoint,
    report,
    working_directory,
)

LAST = "runs/run/checkpoints/last.ckpt"
TINY: dict[str, Any] = {
    "data.init_args.num_train": 4,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 2,
    "data.init_args.batch_size": 2,
    "data.init_args.eval_batch_size": 2,
    "model.init_args.sampler": {"num_steps": 4, "eta": 1.0},
    "model.init_args.num_eval_samples": 2,
    "model.init_args.num_candidates": 4,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.limit_val_batches": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "layout": {
        "data.init_args.source.init_args.num_pages": 40,
        "reward": {"class_path": "domains.layout.rewards.Overlap"},
        "metrics.parts": [{"class_path": "domains.layout.metrics.LayoutMeasures"}],
    },
    "molecule": {
        # Molecules of a random model are never stable: nothing would be learned from that.
        "reward": {"class_path": "domains.molecule.rewards.SoftValence"},
        "metrics.parts": [{"class_path": "domains.molecule.metrics.MoleculeMeasures"}],
    },
}
ALGORITHMS = ("graft", "p_graft", "ddpo", "grpo", "nft", "dpo")
Command = Callable[..., None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small model of each domain whose predictions are not 0."""
    folder = tmp_path_factory.mktemp("gibbs")
    sizes: dict[str, Any] = {"state": "gibbs", "width": 8, "depth": 1, "num_heads": 2, "rounds": 2}
    pipelines: dict[str, Pipeline] = {
        "layout": LayoutPipeline(None, architecture=Layouts(**sizes)),
        "molecule": MoleculePipeline(None, architecture=Molecules(**sizes)),
    }
    torch.manual_seed(0)
    for name, pipeline in pipelines.items():
        for parameter in pipeline.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        pipeline.save(folder / name)
    return folder


@pytest.fixture
def command(models: Path, tmp_path: Path) -> Iterator[Command]:
    """Run from an empty folder."""

    def run(stage: str, domain: str, algorithm: str, *settings: dict[str, Any]) -> None:
        configs = [f"configs/domains/{domain}_gibbs.yaml", f"configs/algorithms/{algorithm}.yaml"]
        model = {"pipeline.init_args.pretrained": str(models / domain), "name": "run"}
        main(arguments(stage, configs, TINY, OWN[domain], model, *settings))

    with working_directory(tmp_path):
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("domain", OWN)
def test_a_run_resumes_bit_by_bit_and_is_tested(
    command: Command, domain: str, algorithm: str
) -> None:
    command("fit", domain, algorithm, {"trainer.max_epochs": 2, "name": "whole"})
    command("fit", domain, algorithm, {"trainer.max_epochs": 1})
    before = checkpoint("run")["state_dict"]
    command("fit", domain, algorithm, {"trainer.max_epochs": 2, "ckpt_path": LAST})
    whole, resumed = checkpoint("whole"), checkpoint("run")
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key])
    assert any((resumed["state_dict"][name] != before[name]).any() for name in before)
    command("test", domain, algorithm, {"ckpt_path": LAST})
    assert report()["cost"]["denoiser_calls"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["p_graft", "ddpo", "nft"])
@pytest.mark.parametrize("domain", OWN)
def test_two_processes_train_like_one(command: Command, domain: str, algorithm: str) -> None:
    once = {"trainer.max_epochs": 1}
    command("fit", domain, algorithm, once, {"name": "one"})
    command("fit", domain, algorithm, once, TWO_FORKS, {"name": "two"})
    one, two = checkpoint("one")["state_dict"], checkpoint("two")["state_dict"]
    assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["p_graft", "ddpo"])
@pytest.mark.parametrize("domain", OWN)
def test_bfloat16(command: Command, domain: str, algorithm: str) -> None:
    command("fit", domain, algorithm, {"trainer.precision": "bf16-mixed", "trainer.max_epochs": 1})
    assert all(value.isfinite().all() for value in checkpoint("run")["state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["p_graft"])
@pytest.mark.parametrize("train_from", ["clean", "intermediate"])
def test_both_ways_to_train_from_accepted_samples(
    command: Command, algorithm: str, train_from: str
) -> None:
    own = {"model.init_args.train_from": train_from, "model.init_args.cut": 0.5}
    command("fit", "layout", algorithm, own, {"trainer.max_epochs": 1})
    assert checkpoint("run")["lit_rlft"]["num_updates"] > 0
