"""How far a tuned model has moved from its reference."""

import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import Process
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.sampling import Denoiser
from lit_rlft.core.state import State, leaves

__all__ = ["path_kl", "prediction_distance"]


def path_kl(
    process: Process,
    policy: Denoiser,
    reference: Denoiser,
    x_0: State,
    condition: Condition,
    times: Tensor,
    tuned: Tensor,
    noise: Generators = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Estimate the KL of the ancestral sampler's paths, policy from reference, in nats, [B].

    The KL of two Markov chains is the sum over steps of the transitions' KL. Each sample estimates
    it from one step, drawn uniformly and weighted with the number of steps, at x_t noised from
    `x_0`: two evaluations a sample for any sampler. A step without noise counts 0.

    Args:
        process: Gives the transitions (eta = 1) and their KL in closed form.
        policy: The tuned denoiser.
        reference: The pretrained one.
        x_0: Samples of the tuned model, [B, ...].
        condition: B rows.
        times: [N + 1], the sampler's grid, decreasing.
        tuned: [N] bool, which steps the policy takes; the others count 0.
        noise: One generator per sample, or None for torch's global one.
        ends: [N], where each step leads (`Process.ends`); None is the grid's next.
    """
    device = leaves(x_0)[0].device
    num_steps, size = len(times) - 1, len(condition)
    uniform = rand_like(torch.empty(size, dtype=torch.float64, device=device), noise)
    steps = (uniform * num_steps).long()
    times, tuned = times.to(device), tuned.to(device)
    ends = times[1:] if ends is None else ends.to(device)
    t, s = times[steps], ends[steps]
    x_t = process.noised(x_0, times[-1].expand(size), t, noise)
    ours, theirs = (
        process.transition(denoiser(x_t, t, condition), x_t, t, s, eta=1.0)
        for denoiser in (policy, reference)
    )
    return num_steps * ours.kl(theirs) * tuned[steps]


def prediction_distance(
    process: Process, prediction: State, reference: State, x_t: State
) -> Tensor:
    """Return the squared distance of two predictions at x_t per free dimension, float32 [B].

    Args:
        process: Knows how many numbers of a state are free; only these count.
        prediction: The tuned denoiser's, [B, ...], with its graph.
        reference: The pretrained one's.
        x_t: Where both were made.
    """
    own, other = (process.projected(each, x_t) for each in (prediction, reference))
    pairs = zip(leaves(own), leaves(other), strict=True)
    squares = torch.cat([(p - r).float().square().flatten(1) for p, r in pairs], dim=1)
    return (squares.sum(dim=1) / process.num_dimensions(x_t).clamp(min=1)).float()
