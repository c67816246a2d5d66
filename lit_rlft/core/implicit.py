r"""The implicit policies of contrastive fine-tuning on the forward process.

A policy f is seen from another one, f_old, along the line through both:

.. math:: f_+ = f_{old} + \beta (f - f_{old}), \qquad f_- = f_{old} - \beta (f - f_{old}).

Good samples are to be explained by f_+, bad ones by its mirror image f_-.

References:
    DiffusionNFT (Zheng et al., 2025), https://arxiv.org/abs/2509.16117
"""

import torch
from torch import Tensor

from lit_rlft.core.state import State, expand_as, tree_map

__all__ = ["centred", "group_probabilities", "implicit"]


def implicit(prediction: State, old: State, share: Tensor) -> State:
    """Return old + share (prediction - old), the policy at `share` on the line through both.

    Predictions of categorical parts are logits, on which the line is drawn. Infinite ones, of what
    a condition gives, are the same in both and stay.

    Args:
        prediction: The trained policy's, [B, ...].
        old: The other one's.
        share: [B], beta for f_+ and -beta for f_-.
    """

    def between(f_old: Tensor, f: Tensor) -> Tensor:
        return f_old.where(f_old.isinf(), f_old.lerp(f, expand_as(share, f)))

    return tree_map(between, old, prediction)


def centred(rewards: Tensor) -> Tensor:
    """Return how far each reward is from its row's mean, float64 [G, M], NaN where it is NaN.

    Exactly 0 where all of a row are equal: rounding is no difference.

    Args:
        rewards: [G, M], a row per condition.
    """
    rewards = rewards.double()
    largest = rewards.where(rewards.isfinite(), -torch.inf).amax(dim=1, keepdim=True)
    below = rewards - largest
    return below - below.nanmean(dim=1, keepdim=True)


def group_probabilities(rewards: Tensor, scale: float, clip: float) -> Tensor:
    """Return how likely each sample counts as good, 1/2 + clip((R - mean) / scale) / (2 clip).

    Args:
        rewards: [G, M], a row per condition; NaN where a sample could not be scored.
        scale: What a difference from the row's mean is divided by; 0 where no rewards differ.
        clip: Differences count up to so many scales.

    Returns:
        Float64 [G, M] in [0, 1]; NaN where the reward is.
    """
    apart = centred(rewards)
    if scale == 0:
        return torch.full_like(apart, 0.5).where(apart.isfinite(), torch.nan)
    return 0.5 + (apart / scale).clamp(-clip, clip) / (2 * clip)
