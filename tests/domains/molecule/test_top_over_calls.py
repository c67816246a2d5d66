"""The best molecules over reward calls: by hand, against PMO's rule, through runs that resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.molecule.top_over_calls import TopOverCalls
from lit_rlft.cli import main
from lit_rlft.core.checks import BadArgument
from lit_rlft.kit.top_curve import area_under_top
from tests.domains.molecule.chemistry.test_batch import overfull
from tests.domains.molecule.known import conditions, from_atoms, geometry
from tests.support import (
    TWO_FORKS,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    working_directory,
)


def pmo(scores: list[float], k: int, budget: int, every: int) -> float:
    """Return PMO's area as its loop computes it: from sorted prefixes, each afresh."""
    area, called, previous = 0.0, 0, 0.0
    counts = [n for n in range(1, len(scores)) if n % every == 0]
    for count in [*counts, len(scores)]:
        mean = float(np.mean(sorted(scores[:count])[-k:]))
        area += 0.5 * (count - called) * (mean + previous)
        called, previous = count, mean
    return (area + (budget - len(scores)) * previous) / budget


def test_the_area_by_hand() -> None:
    scores = torch.tensor([0.2, 0.6, 0.4, 1.0, 0.0])
    # b(0) = 0, b(2) = (0.2 + 0.6) / 2, b(4) = (0.6 + 1.0) / 2 = b(5), then 5 more calls of it.
    area = (2 * (0 + 0.4) / 2 + 2 * (0.4 + 0.8) / 2 + 1 * 0.8 + 5 * 0.8) / 10
    assert area_under_top(scores, 2, budget=10, every=2) == pytest.approx(area, abs=1e-7)
    # All at once, the straight line to the best is half of it.
    assert area_under_top(torch.ones(8), 3, budget=8, every=100) == 0.5
    assert area_under_top(torch.ones(8), 3, budget=4, every=1) == 0.5 / 4 + 3 / 4
    assert np.isnan(area_under_top(torch.ones(0), 1, budget=4, every=1))


@pytest.mark.parametrize("num", [3, 10, 95, 100, 137])
def test_the_area_is_pmos(num: int) -> None:
    scores = torch.rand(num, dtype=torch.float64)
    for k, budget, every in ((1, 200, 10), (10, 137, 7), (100, 1000, 100)):
        expected = pmo(scores.tolist(), k, budget, every)
        assert area_under_top(scores, k, budget, every) == pytest.approx(expected, rel=1e-12)


def test_a_molecule_is_a_call_once() -> None:
    metric = TopOverCalls(k=[1, 2], budget=8, every=1)
    assert metric.values() == {}
    (a, first), (b, second) = geometry("CC"), geometry("O")
    pieces = (a + b, np.concatenate([first, second + 20]))
    atoms = [geometry("CCO"), geometry("CCO"), geometry("C"), pieces, overfull(), geometry("CO")]
    molecules, condition = from_atoms(atoms), conditions(6)
    rewards = torch.tensor([0.75, 0.5, 0.25, 9.0, 9.0, torch.nan])
    metric.add(metric.features(molecules, condition, rewards))
    # Ethanol with the lowest of its scores, methane; in pieces, invalid or not scored is no call.
    assert sorted(metric.history()["score"].tolist()) == [0.25, 0.5]
    metric.add(metric.features(molecules, condition, torch.ones(6)))
    values = metric.values()
    assert values["different_molecules"] == 3  # methanol is new, and the only one of score 1
    first = metric.history()["score"].tolist()[0]
    area = first / 2 + (first + 0.5) / 2 + (0.5 + 1) / 2 + 5
    assert values["auc_top_1"] == pytest.approx(area / 8)


def test_the_order_of_processes_changes_nothing() -> None:
    one, two = TopOverCalls(budget=3), TopOverCalls(budget=3)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        found = {
            "identity": torch.randint(-5, 5, (12,), generator=generator),
            "score": torch.rand(12, generator=generator, dtype=torch.float64),
        }
        one.add(found)
        two.add({name: values.roll(6) for name, values in found.items()})
    assert_equal(one.history(), two.history())
    assert one.values()["different_molecules"] == 3


@pytest.mark.parametrize("name", ["k", "budget", "every"])
def test_settings_are_checked(name: str) -> None:
    given: dict[str, Any] = {name: [0] if name == "k" else 0}
    with pytest.raises(BadArgument, match=name):
        TopOverCalls(**given)


RUN = {
    "metrics.parts+": "TopOverCalls",
    "metrics.parts.budget": 40,
    "metrics.parts.every": 5,
    "data.num_train": 16,
    "data.num_val": 2,
    "data.num_test": 2,
    "data.batch_size": 8,
    "model.sampler.num_steps": 6,
    "model.num_candidates": 2,
    "model.num_eval_samples": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
}
CONFIGS = ("molecule_heavy", "p_graft")


@pytest.mark.slow  # five commands
def test_runs_tell_how_soon_they_found_good_molecules(tmp_path: Path) -> None:
    with working_directory(tmp_path):
        whole, half, two = ({"name": name} for name in ("whole", "half", "two"))
        main(arguments("fit", CONFIGS, RUN, whole, {"trainer.max_epochs": 2}))
        main(arguments("fit", CONFIGS, RUN, half))
        last = {"ckpt_path": "runs/half/checkpoints/last.ckpt"}
        main(arguments("fit", CONFIGS, RUN, half, last, {"trainer.max_epochs": 2}))
        main(arguments("fit", CONFIGS, RUN, two, {"trainer.max_epochs": 2}, TWO_FORKS))
        histories = [
            checkpoint(n)["callbacks"]["TrainingMetrics"] for n in ("whole", "half", "two")
        ]
        assert_equal(histories[0], histories[1])
        (kept,), (shared,) = (one.values() for one in (histories[0], histories[2]))
        assert_equal(kept["identity"], shared["identity"])
        main(arguments("test", CONFIGS, RUN, half, last))
        found = report("runs/half")["training"]
        scores = kept["score"].tolist()
        assert found["different_molecules"] == len(scores) > 5
        assert found["auc_top_10"] == pytest.approx(pmo(scores, 10, 40, 5), rel=1e-12)
        assert scalars("half")["train/auc_top_10"][-1] == pytest.approx(found["auc_top_10"])
