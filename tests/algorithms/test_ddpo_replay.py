"""DDPO replays what was sampled: first ratios, kept states, chunks, windows, on every process."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import lit_rlft.core.trajectory
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Process
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import leaves, tensor_of
from tests.algorithms.ddpo_support import (
    FLOW,
    MASKED,
    MIXED,
    NUM,
    STEPS,
    Pairs,
    Toy,
    collected,
    each_process,
    pairs_of,
    replayed,
    seeded_generator,
    tuner_of,
)
from tests.test_distributed import processes


@each_process
def test_first_ratios_are_one(make: Callable[[], Pipeline]) -> None:
    """Exactly, where replay has the sampler's batch shape, and within 3e-5 in any other."""
    tuner = tuner_of(make())
    rollout = collected(tuner)
    expected = NUM * STEPS - (NUM if isinstance(tuner.pipeline.process, GaussianProcess) else 0)
    assert rollout.num_terms == expected
    assert replayed(tuner, rollout, NUM)[1] == 0
    for size in (None, 7, 1):
        assert replayed(tuner, rollout, size)[1] < 3e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_process
def test_states_kept_in_half_precision_keep_the_first_ratios(
    make: Callable[[], Pipeline], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-4, and not without the rounding before the log-probability."""
    tuner = tuner_of(make(), state_dtype=dtype)
    assert replayed(tuner, collected(tuner))[1] < 1e-4
    if isinstance(tuner.pipeline.process, MaskedProcess):
        return
    monkeypatch.setattr(lit_rlft.core.trajectory, "rounded", lambda x, like, dtype: x)
    assert replayed(tuner, collected(tuner))[1] > 1e-4


@pytest.mark.parametrize("process", [FLOW, MASKED, MIXED], ids=["flow", "masked", "product"])
def test_a_half_precision_model_is_trained_in_single_precision(process: Process) -> None:
    with pytest.warns(UserWarning, match="was loaded in bfloat16 and is trained in float32"):
        tuner = tuner_of(Toy(process).bfloat16())
    rollout = collected(tuner)
    assert replayed(tuner, rollout, NUM)[1] < 1e-4
    pairs = pairs_of(rollout)[0].states
    floating = [leaf for leaf in leaves(pairs["x_t"]) if leaf.is_floating_point()]
    assert all(leaf.dtype == torch.float32 for leaf in floating)
    assert tensor_of(pairs["log_prob"]).dtype == torch.float32


@each_process
def test_states_are_held_once(make: Callable[[], Pipeline]) -> None:
    tuner = tuner_of(make())
    rollout = collected(tuner)
    blank = leaves(tuner.pipeline.blank(rollout.condition))
    one = sum(leaf.numel() * leaf.element_size() for leaf in blank)
    assert rollout.trajectories.num_bytes == (STEPS + 1) * one
    assert rollout.index(torch.tensor([1, 0])).trajectories is rollout.trajectories
    windows = {(1, 2): 2, (0, 2): 3, (2, 4): 3}
    for window, num_states in windows.items():
        kept = collected(tuner_of(make(), window=window)).trajectories
        assert kept.num_bytes == num_states * one


@each_process
def test_trajectories_are_those_of_the_evaluation_sampler(make: Callable[[], Pipeline]) -> None:
    tuner = tuner_of(make())
    rollout = collected(tuner)
    keep, rows = [0, 2, STEPS], torch.arange(NUM)
    with torch.no_grad():
        drawn = tuner.rollouts.draw(tuner.route(), rollout.condition, rollout.seeds, keep=keep)
    for i, state in zip(keep, drawn, strict=True):
        place, end = (i, "x_t") if i < STEPS else (i - 1, "x_s")
        kept = rollout.trajectories.pairs(torch.full((NUM,), place), rows)[end]
        assert all(torch.equal(a, b) for a, b in zip(leaves(kept), leaves(state), strict=True))


def test_half_precision_halves_what_is_held() -> None:
    whole, half = (
        collected(tuner_of(state_dtype=dtype)).trajectories.num_bytes for dtype in (None, "float16")
    )
    assert 2 * half == whole


@each_process
def test_gradients_do_not_depend_on_chunks(make: Callable[[], Pipeline]) -> None:
    """Against one step and one sample at a time, for chunks that cut across steps."""
    pipeline = make().double()
    tuner = tuner_of(pipeline, kl_coef=0.1)
    rollout = collected(tuner)
    with torch.no_grad():
        for parameter in tuner.trainable().parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=seeded_generator()))
    serial, _ = replayed(tuner, rollout, 1)
    assert serial.norm() > 1e-6
    for size in (None, 7, NUM):
        torch.testing.assert_close(replayed(tuner, rollout, size)[0], serial, rtol=1e-4, atol=1e-7)
    halves = [
        rollout.index(rows) for rows in torch.randperm(NUM, generator=seeded_generator()).split(4)
    ]
    parts = sum(replayed(tuner, half)[0] for half in halves)
    torch.testing.assert_close(parts, serial, rtol=1e-4, atol=1e-7)
    pieces = tuner_of(make().double(), kl_coef=0.1, sampling_batch_size=3)
    again = collected(pieces).trajectories.log_probs
    torch.testing.assert_close(again, rollout.trajectories.log_probs, rtol=1e-5, atol=1e-5)


def calls_of(tuner: DDPO) -> dict[str, list[float]]:
    """Record the times of all rows that policy and reference are asked for."""
    assert tuner.reference is not None and tuner.reference.frozen is not None
    calls: dict[str, list[float]] = {"policy": [], "reference": []}
    modules = {"policy": tuner.pipeline.denoiser, "reference": tuner.reference.frozen}
    for who, module in modules.items():

        def record(module: Any, inputs: Any, output: Any, who: str = who) -> None:
            calls[who].extend(inputs[1].tolist())

        module.register_forward_hook(record)
    return calls


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_no_pass_is_wasted(kl_coef: float) -> None:
    """Not the reference at 0, not the step without noise, not samples without an advantage."""
    tuner = tuner_of(kl_coef=kl_coef, advantage=GroupAdvantage(), reward=Pairs())
    calls = calls_of(tuner)
    rollout = collected(tuner)
    assert len(calls["policy"]) == NUM * STEPS
    calls["policy"].clear()
    replayed(tuner, rollout)
    trained = NUM if kl_coef else NUM // 2
    assert len(calls["policy"]) == trained * (STEPS - 1)
    assert len(calls["reference"]) == (trained * (STEPS - 1) if kl_coef else 0)
    last = float(tuner.pipeline.process.times(STEPS)[-2])
    assert last not in calls["policy"]


def test_windows_and_subsets() -> None:
    tuner = tuner_of(sampler=Sampler(10, 1.0), window=(2, 9), num_train_steps=3)
    seen = set()
    for tuner.num_rounds in range(6):
        rollout = collected(tuner)
        steps = rollout.trajectories.steps
        assert len(steps) == 3 and steps == sorted(steps) and set(steps) <= set(range(2, 9))
        assert rollout.num_steps == 3 and rollout.num_terms == 3 * NUM
        seen.add(tuple(steps))
        (part,) = pairs_of(rollout)
        times = tuner.pipeline.process.times(10)
        assert set(tensor_of(part.states["t"]).tolist()) == set(times[steps].tolist())
    assert len(seen) > 1


def test_a_step_counts_that_is_random_on_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their terms would have different weights, as where masked states are all shown early."""

    def work(rank: int) -> int:
        tuner = tuner_of()
        tuner.trainer.world_size = 2  # type: ignore[misc]
        return tuner._num_random(torch.tensor([[False, rank == 0], [False, False], [True, True]]))

    assert processes(monkeypatch, 2, work) == [2, 2]


def test_a_window_keeps_the_transitions_of_the_whole() -> None:
    whole, part = (collected(tuner_of(window=window)) for window in (None, (1, 3)))
    assert torch.equal(part.trajectories.log_probs, whole.trajectories.log_probs[1:3])
    for place in range(2):
        samples = torch.arange(NUM)
        first = part.trajectories.pairs(torch.full((NUM,), place), samples)
        second = whole.trajectories.pairs(torch.full((NUM,), place + 1), samples)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor_of(first[k]), tensor_of(second[k])) for k in first)


def test_selected_samples_keep_their_conditions_and_seeds() -> None:
    """Through two selections, as of a minibatch and of a process, in any order."""
    rollout = collected(tuner_of(Toy(FLOW)))
    part = rollout.index(torch.tensor([6, 1, 3, 4])).index(torch.tensor([2, 0, 1]))
    terms = part.terms(torch.arange(part.num_terms).flip(0))
    places = part.num_terms // 3 - 1 - torch.arange(part.num_terms) // 3
    samples = torch.tensor([1, 6, 3]).repeat(part.num_terms // 3)
    assert torch.equal(terms.condition.rows, rollout.condition.rows[samples])
    assert list(terms.seeds) == [rollout.seeds[i] for i in samples.tolist()]
    own = rollout.trajectories.pairs(places, samples)
    assert all(torch.equal(tensor_of(own[k]), tensor_of(terms.states[k])) for k in own)
    advantages = rollout.advantages[samples].float()
    assert torch.equal(tensor_of(terms.states["advantage"]), advantages)
    # Those of a sample add up to 1: the last step, which has no noise, is none of them.
    assert len(samples) == 3 * (STEPS - 1)
    assert tensor_of(terms.states["weight"]).tolist() == pytest.approx([1 / 3] * len(samples))


def test_the_next_state_is_the_one_that_was_sampled() -> None:
    rollout = collected(tuner_of())
    samples = torch.arange(NUM)
    chain = [rollout.trajectories.pairs(torch.full((NUM,), i), samples) for i in range(STEPS)]
    for before, after in pairwise(chain):
        assert torch.equal(tensor_of(before["x_s"]), tensor_of(after["x_t"]))
    mean = float(tensor_of(chain[-1]["x_s"])[:, 0].double().mean())
    assert mean == pytest.approx(rollout.metrics["reward"], abs=1e-6)
