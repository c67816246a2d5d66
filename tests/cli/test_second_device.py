"""Algorithms train and are tested on a device other than the CPU, in every domain with a model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.test_configs import (
    ALGORITHMS,
    CONFIGS,
    DOMAINS,
    GIBBS,
    MIXED,
    SMALL,
    pair,
    refusal,
    run,
)
from tests.second_device import trainers_on_it
from tests.support import ROOT
from tests.test_documentation import blocks, run_python

# What runs by default: each kind of algorithm, and each kind of state, once.
DEFAULT = {
    "digits": {"noise_ppo"},
    "gaussian_mixture": {
        *("adjoint_matching", "dpo", "flow_grpo", "graft", "inverse_noise_correction", "nft"),
        *("grpo", "noise_ppo", "pretrain", "refl"),
    },
    "layout": {"p_graft"},
    "layout_gibbs": {"ddpo"},
    "layout_mixed": set(),
    "molecule_mixed": set(),
    "molecule_soft": {"drtune"},
}


def devices_of_weights(monkeypatch: pytest.MonkeyPatch) -> set[torch.device]:
    """Return a set that will hold where the weights lie that optimizers are given."""
    seen: set[torch.device] = set()
    add = torch.optim.Optimizer.add_param_group

    def add_param_group(optimizer: torch.optim.Optimizer, group: dict) -> None:
        add(optimizer, group)
        seen.update(weight.device for weight in group["params"])

    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", add_param_group)
    return seen


@pytest.fixture
def second(second: torch.device) -> Iterator[torch.device]:
    with trainers_on_it():
        yield second


@pytest.mark.parametrize(
    ("domain", "algorithm"),
    [
        pair(domain, algorithm, needed=algorithm.stem in DEFAULT[domain.stem])
        for domain in DOMAINS
        if domain.stem in (SMALL | MIXED | GIBBS) - {"molecule_gibbs"}
        for algorithm in ALGORITHMS
        if refusal(domain, algorithm) is None
    ],
)
def test_algorithms_train_there(
    domain, algorithm, tmp_path, monkeypatch: pytest.MonkeyPatch, second: torch.device
) -> None:
    seen = devices_of_weights(monkeypatch)
    run([domain, algorithm, CONFIGS / "trainer/cpu.yaml"], tmp_path, monkeypatch)
    assert seen == {second}


def test_the_smallest_domain_of_the_how_to_trains_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: torch.device
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    trained = []
    for block in blocks(ROOT / "docs/how_to/own_domain.md"):
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            trained.append(run_python(block.text)["tuner"])
    (tuner,) = trained
    assert tuner.num_rounds == 4
    pipeline = tuner.pipeline.to(second)
    assert pipeline.device == pipeline.blank(pipeline.example()).device == second
