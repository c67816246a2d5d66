"""Best-of-n baselines: spending reward calls when sampling, instead of when training.

*Samples*: the best of n samples of a condition. *Noise*: the best x_1 of n, judged by one sample of
each; what is reported is a fresh sample from it. With a deterministic sampler the two coincide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.state import State, batch_size, cat, index, leaves, split
from lit_rlft.core.streams import Stream

if TYPE_CHECKING:
    from lit_rlft.algorithms.base import RewardFineTuner

__all__ = ["best_of"]


def best_of(
    tuner: RewardFineTuner, condition: Condition, seeds: Sequence[int], num: int
) -> dict[str, State]:
    """Draw the baselines from the reference.

    Args:
        tuner: Whose reference, sampler and reward are used.
        condition: B rows.
        seeds: B integers; the first candidate of a row is the reference's own sample of that seed.
        num: n, candidates and reward calls per row.

    Returns:
        x_0 [B, ...] of `best_of_<n>_samples` and `best_of_<n>_noise`.
    """
    candidates = condition.repeat(num)
    own = [
        s if not j else seed_from(s, Stream.BEST_OF_CANDIDATES, j)
        for s in seeds
        for j in range(num)
    ]
    ends = (0, tuner.sampler.num_steps)
    x_1, x_0 = tuner.draw_states(
        candidates,
        own,
        keep=ends,
        relay=tuner.reference_relay(),
        prior=tuner.reference_prior,
        label=f"Sampling (best of {num})",
    )
    rewards, _ = tuner.score(x_0, candidates)
    best = rewards.cpu().view(-1, num).argmax(dim=1) + num * torch.arange(len(condition))
    best = best.to(leaves(x_0)[0].device)
    samples = index(x_0, best)
    deterministic = tuner.sampler.eta == 0 and tuner.pipeline.process.differentiable
    noise = samples if deterministic else _again(tuner, index(x_1, best), condition, seeds)
    return {f"best_of_{num}_samples": samples, f"best_of_{num}_noise": noise}


def _again(tuner: RewardFineTuner, x_1: State, condition: Condition, seeds: Sequence[int]) -> State:
    """Walk from x_1 once more, with other noise on the way."""
    parts, first = [], 0
    for start in split(x_1, tuner.sampling_batch_size):
        chunk = slice(first, first := first + batch_size(start))
        noise = generators([seed_from(seed, Stream.BEST_OF_AGAIN) for seed in seeds[chunk]])
        process, part = tuner.pipeline.process, condition.index(chunk)
        parts.append(tuner.sampler.sample(tuner.reference_policy, process, start, part, noise))
    return cat(parts)
