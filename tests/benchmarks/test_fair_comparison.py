"""The fair comparison: the trial taken, what a file of finished runs spares, what a row says."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlft.cli import main
from lit_rlft.runs.lines import read_lines
from tests.support import ROOT

RATES = {"1e-4": 0.1, "3e-4": 0.4, "1e-3": 0.2, "3e-3": 0.3, "1e-2": -1.0, "3e-2": -2.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, whose runs give these gains: by learning rate, and 0.01 a seed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("fair_comparison")
    module.started = []

    def pretended(root: Path, name: str, options: Sequence[str]) -> dict[str, Any]:
        module.started.append(name)
        rate = options[options.index("--model.optimizer.init_args.lr") + 1]
        seed = int(options[options.index("--model.seed") + 1])
        gain = RATES[rate] + 0.01 * seed
        metrics = {"WeightedSum": 1.0, "fid": 20.0, "diversity": 0.6, "kl": 0.0}
        tuned = {name: {"mean": mean + gain} for name, mean in metrics.items()}
        cost = {"reward_calls": 512, "denoiser_calls": 2048, "seconds": 3.4, "flops": 7}
        return {
            "reference": {name: {"mean": mean} for name, mean in metrics.items()},
            "tuned": tuned,
            "gain": {"WeightedSum": {"mean": gain, "sem": 0.1}},
            "cost": cost,
            "samples": 1024,
        }

    monkeypatch.setattr(module, "fit_and_test", pretended)
    return module


def test_trials_have_a_seed_of_their_own(script: Any, tmp_path: Path) -> None:
    compared = script.Comparison("layout", tmp_path, tmp_path / "runs.jsonl", ["--limit", "1"])
    trials = compared.search(["GRAFT", "RWR"], workers=1)
    assert len(script.started) == 12 and all(name.endswith(" 100") for name in script.started)
    assert {arm: compared.best(held) for arm, held in trials.items()} == {
        "GRAFT": "3e-4",
        "RWR": "3e-4",
    }
    row = compared.trial_row("RWR", trials["RWR"])
    assert row[:2] == ["RWR", "1e-4: +1.100, +1.1, +1.1, +1.1"]


def test_every_second_trial_of_each_arm(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    trials = script.Comparison("molecule", tmp_path, file, [], trials=3).search(["GRAFT"], 1)
    assert list(trials["GRAFT"]) == ["1e-4", "1e-3", "1e-2"]
    tried = [list(arm.trials(script.DOMAINS["layout"]))[::2] for arm in script.ARMS.values()]
    assert {len(names) for names in tried} == {3}
    rates = [{name.split()[0] for name in names} for names in tried]
    assert {len(names) for names in rates} == {3}  # no arm loses one of its learning rates


@pytest.mark.parametrize(
    ("domain", "guard", "moves", "taken"),
    [
        # FID may rise by 5, diversity fall by 0.05, uniqueness by 0.1.
        ("layout", "fid", {"mild": 4.9, "exploited": 5.1}, "mild"),
        ("layout", "fid", {"mild": -60.0, "exploited": 4.0}, "exploited"),
        ("layout", "diversity", {"mild": -0.04, "exploited": -0.06}, "mild"),
        ("molecule", "uniqueness", {"mild": -0.09, "exploited": -0.11}, "mild"),
        ("molecule", "uniqueness", {"mild": 0.5, "exploited": -0.05}, "exploited"),
        # Where none is within the bounds, the nearest.
        ("layout", "fid", {"mild": 6.0, "exploited": 40.0}, "mild"),
        ("molecule", "uniqueness", {"mild": -0.6, "exploited": -0.3}, "exploited"),
    ],
)
def test_the_largest_gain_within_the_bounds_is_taken(
    script: Any, tmp_path: Path, domain: str, guard: str, moves: dict[str, float], taken: str
) -> None:
    compared = script.Comparison(domain, tmp_path, tmp_path / "runs.jsonl", [])
    reward, gains = compared.domain.metrics[0], {"mild": 0.1, "exploited": 0.9}
    before = {metric: {"mean": 20.0} for metric in compared.domain.bounds}
    trials = {
        trial: {
            "reference": before,
            "tuned": {**before, guard: {"mean": 20.0 + move}},
            "gain": {reward: {"mean": gains[trial]}},
        }
        for trial, move in moves.items()
    }
    assert compared.best(trials) == taken
    assert compared.best(trials, reward_alone=True) == "exploited"


def test_all_arms_have_as_many_trials(script: Any) -> None:
    for domain in script.DOMAINS.values():
        for num in (3,) if domain.dear else (3, 6):
            assert {
                len(script.spaced(arm.trials(domain), num)) for arm in script.ARMS.values()
            } == {num}
    rates = [script.ARMS[arm].trials(script.DOMAINS["shapes"]) for arm in ("GRAFT", "DRTune")]
    assert [*map(list, rates)] == [["3e-4", "1e-3", "3e-3"], ["1e-4", "3e-4", "1e-3"]]


def test_a_trial_is_a_rate_alone_or_with_a_second_setting(script: Any) -> None:
    rate, domains = "--model.optimizer.init_args.lr", script.DOMAINS
    assert script.ARMS["GRAFT"].trials(domains["layout"])["3e-2"] == [rate, "3e-2"]
    trial = script.ARMS["DDPO"].trials(domains["layout"])["1e-3 1e-4"]
    assert trial == [rate, "1e-3", "--model.clip_range", "1e-4"]
    # What a unit of reward is worth differs by domain.
    for domain, scale in (("layout", "30"), ("shapes", "1.2")):
        trial = script.ARMS["Adjoint matching"].trials(domains[domain])[f"3e-4 {scale}"]
        assert trial == [rate, "3e-4", "--model.reward_scale", scale]


@pytest.mark.parametrize("domain", ["layout", "molecule", "shapes"])
@pytest.mark.parametrize("arm", ["GRAFT", "DRTune", "Adjoint matching"])
def test_whatever_is_trained_for_the_domains_reward_judges(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], domain: str, arm: str
) -> None:
    compared = script.Comparison(domain, tmp_path, tmp_path / "runs.jsonl", [])
    trial = next(iter(script.ARMS[arm].trials(compared.domain)))
    with pytest.raises(SystemExit) as raised:
        main(["fit", *compared._options(arm, trial, 0), "--print_config"])
    assert raised.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    judges = [config["reward"], *config["metrics"]["parts"]]
    names = [judge["class_path"].rpartition(".")[2] for judge in judges]
    assert names.count(compared.domain.metrics[0]) == 1


def test_finished_runs_are_read_and_others_added(script: Any, tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    first = script.Comparison("layout", tmp_path, results, ["--limit", "1"])
    report = first.run("GRAFT", "1e-3", 0)
    (line,) = read_lines(results)
    assert line == json.loads(json.dumps(report)) and "samples" not in line
    assert line["cost"] == {"reward_calls": 512, "denoiser_calls": 2048, "seconds": 3.4}
    again = script.Comparison("layout", tmp_path, results, ["--limit", "1"])
    assert again.run("GRAFT", "1e-3", 0) == line and len(script.started) == 1
    # Another seed, trial or budget is another run.
    again.run("GRAFT", "1e-3", 1)
    again.run("GRAFT", "3e-3", 0)
    script.Comparison("layout", tmp_path, results, ["--limit", "2"]).run("GRAFT", "1e-3", 0)
    assert len(script.started) == 4 == len(list(read_lines(results)))


def test_a_row_has_the_gains_the_odds_and_the_costs(script: Any, tmp_path: Path) -> None:
    compared = script.Comparison("layout", tmp_path, tmp_path / "runs.jsonl", [])
    better = [compared.run("GRAFT", "3e-4", seed) for seed in (0, 1, 2)]
    worse = [compared.run("RAFT", "1e-3", seed) for seed in (0, 1, 2)]
    row = compared.row("GRAFT", "3e-4", better, worse)
    assert row[:3] == ["GRAFT", "3e-4", "+0.410 (+0.400 to +0.420)"]
    # Each metric moves by the gain.
    moves = ["1.000 → 1.410", "20.000 → 20.410", "0.600 → 1.010", "0.000 → 0.410"]
    assert row[3:7] == moves
    assert row[7:] == ["1.00 (1.00 to 1.00)", "512", "2,048", "3"]


def test_committed_runs_are_those_that_the_script_would_start(script: Any) -> None:
    """So the printed command draws the published table without a run."""
    files = sorted((ROOT / "benchmarks/comparisons").glob("*.jsonl"))
    assert files
    for path in files:
        compared = script.Comparison(path.stem, path.parent, path, [])
        for line in read_lines(path):
            *own, _, _, _, _ = compared._options(line["arm"], line["trial"], line["seed"])
            seed = str(line["seed"])
            assert line["options"][: len(own)] == own
            assert line["options"][-4:] == ["--model.seed", seed, "--data.seed", seed]
            limit = line["options"][len(own) : -4]
            assert limit[:2] == ["--trainer.callbacks+", "lit_rlft.callbacks.budget.Budget"]


def test_a_run_of_just_the_other_budget_is_the_same_run(script: Any, tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    first = script.Comparison("layout", tmp_path, results, ["--reward-calls", "512"])
    report = first.run("GRAFT", "1e-3", 0)
    for spent, runs in ((2047, 2), (2048, 1)):
        other = script.Comparison("layout", tmp_path, results, ["--denoiser-calls", str(spent)])
        other.take(first, "denoiser_calls", spent)
        script.started[1:] = []
        assert other.run("GRAFT", "1e-3", 0)["gain"] == report["gain"]
        assert len(script.started) == runs
