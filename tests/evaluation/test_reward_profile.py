"""The profile of a reward: exact for normal rewards, and through the command line."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.cli import main
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.reward_profile import Level, Profiled, levels_of, profile, suggested
from lit_rlft.loop.relay import Relay
from lit_rlft.runs.lines import without_nan
from tests.cli.test_runs import GAUSSIAN, TINY
from tests.support import arguments, trainer_of, working_directory

STEPS, CONDITIONS, CANDIDATES, COMPLETIONS = 8, 256, 4, 3
STD = 0.7


def left_open(pipeline: GaussianMixturePipeline) -> list[float]:
    """Return Var(x_0 | x_k) / Var x_0 of the ancestral sampler, by its linear recursion.

    The data are N(0, STD^2); x_s given x_t and the denoised x_0 is the posterior of the forward
    process, by Bayes' rule for two normal laws.
    """
    schedule, times = pipeline.process.schedule, pipeline.process.times(STEPS)
    steps = []
    for t, s in pairwise(times):
        (a_t, s_t), (a_s, s_s) = ([float(x) for x in schedule.levels(u)] for u in (t, s))
        ratio = a_t / a_s
        between = s_t**2 - ratio**2 * s_s**2
        denoised = a_t * STD**2 / (a_t**2 * STD**2 + s_t**2)
        scale = ratio * s_s**2 / s_t**2 + a_s * between / s_t**2 * denoised
        steps.append((scale, s_s**2 * between / s_t**2))
    open_, factor, found = 0.0, 1.0, []
    for scale, variance in reversed(steps):
        open_ += factor**2 * variance
        factor *= scale
        found.append((open_, factor))
    whole = found[-1][0] + found[-1][1] ** 2
    return [variance / whole for variance, _ in reversed(found)]


@pytest.fixture(scope="module")
def exact() -> tuple[list[Level], list[float]]:
    """Return the measured levels of a normal reward and the true open shares."""
    pipeline = GaussianMixturePipeline(
        [1.0], [[0.0, 0.0]], [STD], schedule="cosine_vp", prediction_type="v", residual_width=0
    )
    sampler = Sampler(STEPS, 1.0)
    tuner = GRAFT(pipeline, Coordinate(), sampler=sampler, sampling_batch_size=4096)
    tuner.trainer = trainer_of()
    tuner.setup("test")
    steps = list(range(STEPS))
    condition = pipeline.encode({"index": torch.arange(CONDITIONS * CANDIDATES)})
    seeds = list(range(len(condition)))
    how = (tuner.reference_route(), condition, seeds, steps, COMPLETIONS)
    with torch.no_grad():
        scores, again = profile(tuner.rollouts, *how)
    rewards = scores.rewards.view(-1, CANDIDATES)
    accepted = rewards == rewards.max(dim=1, keepdim=True).values
    completions = {k: own.view(-1, CANDIDATES, COMPLETIONS) for k, own in again.items()}
    levels = levels_of(Profiled(rewards, accepted, completions), tuner.reference_route().times)
    return levels, left_open(pipeline)


def test_the_open_share_is_that_of_the_linear_recursion(
    exact: tuple[list[Level], list[float]],
) -> None:
    levels, truth = exact
    assert 0.9 < truth[0] <= 1 and truth[-1] < 0.1  # the whole range is met
    for level, true in zip(levels, truth, strict=True):
        assert level.open_share_sem < 0.06
        assert level.open_share == pytest.approx(true, abs=4 * level.open_share_sem + 1e-9)


def test_normal_rewards_keep_what_is_not_open(exact: tuple[list[Level], list[float]]) -> None:
    levels, truth = exact
    for level, true in zip(levels, truth, strict=True):
        assert level.kept_sem < 0.1
        assert level.kept == pytest.approx(1 - true, abs=4 * level.kept_sem + 1e-9)


def test_the_noisiest_level_that_is_decided_enough_is_suggested(
    exact: tuple[list[Level], list[float]],
) -> None:
    levels, _ = exact
    cut = suggested(levels, 0.25)
    assert cut is not None and cut.open_share <= 0.25
    assert all(level.open_share > 0.25 for level in levels if level.time > cut.time)
    assert suggested(levels[:2], 0.25) is None


def test_a_cut_that_trains_nothing_is_not_suggested(
    exact: tuple[list[Level], list[float]],
) -> None:
    """Where the noise decides all but a little, the noisiest level below it is the cut."""
    levels = [level._replace(open_share=0.1) for level in exact[0]]
    assert levels[0].cut == 1
    cut = suggested(levels, 0.25)
    assert cut is levels[1]
    Relay(cut=cut.cut).check(GaussianMixturePipeline(), 8)
    assert suggested(levels[:1], 0.25) is None


def test_a_constant_reward_has_no_shares() -> None:
    same = Profiled(torch.ones(4, 3), torch.ones(4, 3).bool(), {0: torch.ones(4, 3, 2)})
    (level,) = levels_of(same, torch.tensor([1.0, 0.0]))
    assert level.open_share != level.open_share  # NaN: there is no variance to share
    assert suggested([level], 0.25) is None


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


def command(*words: str, **settings: Any) -> None:
    main(arguments("profile", GAUSSIAN, TINY, {"name": "run"}, settings) + list(words))


@pytest.mark.usefixtures("elsewhere")
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As many conditions as asked for, over two batches; the file says what the lines say."""
    words = ("--conditions=3", "--candidates=4", "--completions=2", "--levels=2")
    command(*words, **{"model.init_args.sampler.eta": 1.0, "data.init_args.eval_batch_size": 2})
    written = json.loads(Path("runs/run/profile.json").read_text())
    assert written["conditions"] == 3 and written["candidates"] == 4
    assert written["levels"][0]["step"] == 0
    out = capsys.readouterr().out
    assert "profile: runs/run/profile.json" in out
    cut = written["suggested_cut"]
    assert ("use GRAFT" if cut is None else f"--model.cut {cut:.4g}") in out


@pytest.mark.usefixtures("elsewhere")
def test_rules_that_weigh_candidates_gain_by_their_weights() -> None:
    """All candidates are accepted, so that nothing is gained but by the weights."""
    rule = {"class_path": "lit_rlft.core.selection.RewardWeighted", "init_args": {"beta": 0.1}}
    eta = {"model.init_args.sampler.eta": 1.0, "model.init_args.selection": rule}
    command("--conditions=24", "--completions=2", "--levels=8", **eta)
    text = Path("runs/run/profile.json").read_text()
    levels = json.loads(text, parse_constant=pytest.fail)["levels"]
    assert all(level["kept_sem"] < 0.5 for level in levels)
    assert levels[0]["kept"] < 0.9 and levels[-1]["kept"] == pytest.approx(1, abs=0.1)


def test_what_is_no_number_is_null_in_json() -> None:
    found = without_nan({"a": [math.nan, {"b": -math.inf, "c": 1.5}], "d": "nan", "e": 2})
    assert found == {"a": [None, {"b": None, "c": 1.5}], "d": "nan", "e": 2}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--candidates=1"], "--candidates must be a whole number of 2 or more, got '1'"),
        (["--levels=many"], "--levels must be a whole number of 1 or more, got 'many'"),
        (["--most_open=1.5"], "--most_open must be a number between 0 and 1, got '1.5'"),
        (["--model.init_args.sampler.eta=0"], "add --model.sampler.eta 1"),
        (["--candidates=2", "--model.init_args.selection.init_args.k=3"], "k"),
        (["--ckpt_path=last.ckpt"], "leave out --ckpt_path"),
    ],
)
def test_bad_input(words: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        command(*words)


def moved(rewards: Tensor) -> Tensor:
    return rewards + torch.arange(len(rewards)).view(-1, *[1] * (rewards.dim() - 1))


def test_differences_between_conditions_do_not_count(
    exact: tuple[list[Level], list[float]],
) -> None:
    """A condition that is easier for all of its samples decides nothing about one of them."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 4, generator=generator)
    again = {0: torch.randn(8, 4, 3, generator=generator)}
    accepted = rewards == rewards.max(dim=1, keepdim=True).values
    times = torch.tensor([1.0, 0.0])
    (plain,) = levels_of(Profiled(rewards, accepted, again), times)
    shifted = Profiled(moved(rewards), accepted, {0: moved(again[0])})
    (other,) = levels_of(shifted, times)
    assert other == pytest.approx(plain, abs=1e-5)


@pytest.mark.usefixtures("elsewhere")
def test_a_window_of_training_is_no_noise_of_the_reference() -> None:
    """MixGRPO's evaluations follow the differential equation; eta above 0 says nothing of them."""
    configs = (GAUSSIAN[0], "configs/algorithms/mix_grpo.yaml")
    with pytest.raises(SystemExit, match="this sampler draws none"):
        main(arguments("profile", configs, {"name": "run", "trainer.accelerator": "cpu"}))
