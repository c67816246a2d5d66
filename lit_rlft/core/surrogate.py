r"""Policy-gradient losses on log-probabilities of transitions.

A log-probability here is one number per transition. Whether it is the **sum** or the **mean** over
the state's dimensions was decided where it was computed (`Distribution.log_prob`) and changes what
a clip range means: the one that DDPO publishes, 1e-4, belongs to the mean.

References:
    Training Diffusion Models with Reinforcement Learning (Black et al., 2023),
    https://arxiv.org/abs/2305.13301
    Proximal Policy Optimization Algorithms (Schulman et al., 2017),
    https://arxiv.org/abs/1707.06347
    GRPO-Guard (Wang et al., 2025; ratio normalisation), https://arxiv.org/abs/2510.22319
"""

from torch import Tensor

from lit_rlft.core.distribution import Gaussian, Reduction

__all__ = ["importance_sampling", "normalized_log_ratio", "ratio_values", "score_function"]


def score_function(log_probs: Tensor, advantages: Tensor) -> Tensor:
    r"""Return :math:`-A \log p_\theta`, [P].

    Its gradient is that of the expected reward only as long as the samples are the policy's own.

    Args:
        log_probs: [P], with gradient.
        advantages: [P].
    """
    return -advantages * log_probs


def importance_sampling(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    r"""Return the clipped surrogate :math:`\max(-A \rho, -A\,\mathrm{clip}(\rho))`, [P].

    :math:`\rho = p_\theta / p_{old}` is clipped to 1 ± `clip_range`. At :math:`\rho = 1` the
    gradient equals that of `score_function`.

    Args:
        log_probs: [P], with gradient.
        old_log_probs: [P], of the policy that sampled.
        advantages: [P].
        clip_range: Positive.
    """
    ratio, harm = (log_probs - old_log_probs).exp(), -advantages
    return (harm * ratio).maximum(harm * ratio.clamp(1 - clip_range, 1 + clip_range))


def normalized_log_ratio(
    log_ratio: Tensor, policy: Gaussian, old: Gaussian, reduction: Reduction
) -> Tensor:
    r"""Return GRPO-Guard's log-ratio, centred and free of the step's std, [B].

    With :math:`\Delta = \mu_\theta - \mu_{old}` and the noise z of the step,
    :math:`\log \rho = \Delta \cdot z / std - |\Delta|^2 / (2 std^2)`. Its mean is minus
    KL(old || policy). That is added and the rest multiplied by std, which leaves
    :math:`\Delta \cdot z`, reduced over dimensions like log-probabilities.

    Args:
        log_ratio: log p_theta - log p_old of the sampled states, [B].
        policy: p_theta, with one std for each sample.
        old: p_old, of the same stds.
        reduction: Over dimensions, that of `log_ratio`.
    """
    centred = log_ratio + old.kl(policy, reduction)
    return centred * policy.std.flatten()


def ratio_values(
    log_probs: Tensor, old_log_probs: Tensor, clip_range: float, *, on_policy: bool
) -> dict[str, Tensor]:
    """Return measures of how far the policy has moved since it sampled, each [P].

    Args:
        log_probs: [P].
        old_log_probs: [P], of the policy that sampled.
        clip_range: Positive.
        on_policy: Whether both are of the same policy, so that every ratio should be 1.

    Returns:
        `ratio`, `ratio_deviation` (absolute, from 1; again as `ratio_deviation_max` and, on
        policy, as `first_ratio_deviation_max`), `clip_fraction` (0 or 1), and `approx_kl`, half
        the squared log-ratio.
    """
    log_ratio = log_probs.detach() - old_log_probs
    ratio = log_ratio.exp()
    deviation = (ratio - 1).abs()
    largest = ["ratio_deviation_max", *(["first_ratio_deviation_max"] if on_policy else [])]
    return dict.fromkeys(largest, deviation) | {
        "ratio": ratio,
        "ratio_deviation": deviation,
        "clip_fraction": (deviation > clip_range).to(ratio.dtype),
        "approx_kl": 0.5 * log_ratio.square(),
    }
