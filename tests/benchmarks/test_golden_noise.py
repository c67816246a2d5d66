"""What the benchmarks of initial noise compute of their own."""

import importlib
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch

from domains.text_to_image.shapes.world import TASKS, parse, split_prompts
from lit_rlft.core.prior import LowResolution, NoisePolicy
from tests.algorithms.noise_ppo_support import disturb

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def golden_noise() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("golden_noise")


@pytest.fixture(scope="module")
def noise_ppo_steps() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("noise_ppo_steps")


def test_best_of_is_the_average_over_all_draws(golden_noise: ModuleType) -> None:
    rewards = torch.randn(2, 7, dtype=torch.float64)
    best = [max(draw) for row in rewards.tolist() for draw in combinations(row, 3)]
    expected = sum(best) / len(best) - float(rewards.mean())
    assert golden_noise.best_of(rewards, 3)["mean"] == pytest.approx(expected)
    assert golden_noise.best_of(rewards, 1)["mean"] == pytest.approx(0)


def test_the_maps_are_those_of_the_policy(golden_noise: ModuleType) -> None:
    """What the policy can say has its whole length along the maps, other noise has not."""
    policy = NoisePolicy(3, (4, 8, 8), LowResolution(4))
    disturb(policy)
    mean = policy(torch.randn(5, 3)).loc.detach()
    along = golden_noise.along_maps(mean)
    assert along.shape == (5, 64)
    torch.testing.assert_close(along.norm(dim=1), mean.flatten(1).norm(dim=1))
    # A quarter of all directions.
    share = golden_noise.along_maps(torch.randn(200, 4, 8, 8)).square().mean() * 64 / 256
    assert float(share) == pytest.approx(0.25, abs=0.02)


def test_prompts_are_different_ones_of_their_task(golden_noise: ModuleType) -> None:
    for task in TASKS:
        texts = golden_noise.prompts_of(task, 0)
        assert len(set(texts)) == len(texts) == (6 if task == "single_object" else 8)
        assert {parse(text).task for text in texts} == {task}


def test_structured_prompts_take_turns_and_stay_in_their_split(
    noise_ppo_steps: ModuleType, tmp_path: Path
) -> None:
    options = noise_ppo_steps.data(tmp_path, "structured")
    for split in ("train", "test"):
        texts = (tmp_path / f"structured_{split}.txt").read_text().splitlines()
        assert [parse(text).task for text in texts[:4]] == ["position", "counting"] * 2
        own = {p.text for p in split_prompts(split) if p.task in noise_ppo_steps.STRUCTURED}
        assert set(texts) == own
        assert str(tmp_path / f"structured_{split}.txt") in options


@pytest.mark.slow
def test_it_measures_the_embedded_model(
    golden_noise: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = golden_noise.tuner_of(1)
    found = golden_noise.measure(tuner, 0, 2, 5)
    assert len(found["rewards"]) == 12 and len(found["rewards"][0]) == 5
    condition = tuner.pipeline.encode({"prompt": found["prompts"][:1]}).repeat(5)
    seeds = [golden_noise.seed_from(0, i) for i in range(5)]
    (x_1,) = tuner.rollouts.draw(tuner.reference_route(), condition, seeds, keep=[0])
    assert torch.equal(x_1, golden_noise.initial_noise(0, 5))
    out = tmp_path / "lines.jsonl"
    out.write_text(json.dumps({"steps": 1, "seed": 0, **found}) + "\n")
    golden_noise.table(out)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + len(TASKS) and lines[0].count("|") == lines[2].count("|")
