"""Best-of-n baselines: spending reward calls when sampling, instead of when training.

*Samples*: the best of n samples of a condition. *Noise*: a fresh sample from the best x_1 of n,
judged by one sample of each. With a deterministic sampler the two coincide.
"""

from collections.abc import Sequence

import torch

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import seed_from
from lit_rlft.core.state import State, index, leaves
from lit_rlft.core.streams import Stream
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["best_of"]


def best_of(
    rollouts: Rollouts, route: Route, condition: Condition, seeds: Sequence[int], num: int
) -> dict[str, State]:
    """Draw the baselines.

    Args:
        rollouts: Draws and scores the candidates.
        route: The reference's route.
        condition: B rows.
        seeds: B integers; the first candidate of a row is the route's own sample of that seed.
        num: n, candidates and reward calls per row.

    Returns:
        x_0 [B, ...] of `best_of_<n>_samples` and `best_of_<n>_noise`.
    """
    candidates = condition.repeat(num)
    further = Stream.BEST_OF_CANDIDATES
    own = [seed_from(s, further, j) if j else s for s in seeds for j in range(num)]
    scoring, ends = Scoring(rollouts, training=False), (0, route.num_steps)
    x_1, x_0 = rollouts.draw(
        route,
        candidates,
        own,
        keep=ends,
        label=f"Sampling (best of {num})",
        drawn=scoring.drawn,
    )
    rewards = scoring.finish(x_0, candidates, own, world_size=1).rewards
    known = rewards.cpu().nan_to_num(nan=-torch.inf)  # what could not be scored is not chosen
    best = known.view(-1, num).argmax(dim=1) + num * torch.arange(len(condition))
    best = best.to(leaves(x_0)[0].device)
    samples = index(x_0, best)
    noise = samples
    if not route.deterministic:
        again = [seed_from(s, Stream.BEST_OF_AGAIN) for s in seeds]
        noise = rollouts.complete(route, condition, again, index(x_1, best))
    return {f"best_of_{num}_samples": samples, f"best_of_{num}_noise": noise}
