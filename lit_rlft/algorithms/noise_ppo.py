r"""Noise PPO: the denoiser stays as it is, the distribution of its initial noise is learned.

A contextual bandit: with the deterministic sampler, x_0 = G(x_1, c), and the prior
:math:`\pi(x_1 \mid c) = N(\mu(c), \sigma(c)^2)` maximises

.. math::
    E_{x_1 \sim \pi(\cdot \mid c)}[r(G(x_1, c), c)] - \beta\, KL(\pi(\cdot \mid c) \,\|\, N(0, I))

by clipped importance sampling. Of a trajectory, x_1 alone is kept; no gradient passes the reward
or the denoiser. Architecture and hyper-parameters are our choices: none are published.

References:
    Noise PPO (Miao et al., 2025), https://arxiv.org/abs/2506.12036
    FIND (2024; policy optimisation of the initial noise), https://arxiv.org/abs/2407.19453
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.advantage import Advantage, GroupAdvantage
from lit_rlft.core.checks import UsageError, at_least, one_of, positive, require
from lit_rlft.core.distribution import Gaussian, Reduction
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.prior import LowResolution, Maps, NoisePolicy
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import Generators, own_rng
from lit_rlft.core.state import tensor_of
from lit_rlft.core.streams import Stream
from lit_rlft.core.surrogate import importance_sampling, ratio_values
from lit_rlft.inference import NoiseGenerator
from lit_rlft.loop.advantages import check_decoupled, judge
from lit_rlft.loop.checkpoint import Kept
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["NoisePPO"]


class NoisePPO(RewardFineTuner):
    """Noise PPO: learns which initial noise earns rewards; the denoiser stays frozen.

    The learned prior depends on the condition and belongs to the sampler's number of steps: train
    with as many as are used later.

    Args:
        *args: Pipeline and reward.
        num_candidates: M, samples drawn per condition, which are the groups of group advantages.
        advantage: The rule that picks each sample's peers, the rewards that its own is compared
            with; its group's unless given.
        advantage_clip: Advantages are clamped to this size; None leaves them alone.
        decoupled_rewards: Compare each part of a `WeightedSum` for itself and add the advantages,
            weighted (GDPO): parts of any units then count by their weights alone.
        clip_range: Ratios count up to 1 ± this; for the "mean" about 1 / d of what suits the "sum".
        log_prob_reduction: Log-probabilities and KL are the "sum" over the d dimensions of x_1, or
            their "mean".
        beta: Weight of KL(prior || N(0, I)), in closed form, beside advantages of unit size;
            reduced like log-probabilities, so that the optimum does not depend on the reduction.
        maps: How mu and log sigma are made; small maps, interpolated, unless given.
        width: Units of the policy's two hidden layers.
        attention_heads: Weighted averages of a text's tokens that the policy reads, each with
            weights that are learned; 0 reads their plain average, as do domains without tokens.
        condition_free: Learn one prior for all conditions: the control that shows what the
            condition brings.
        **base: Arguments of `RewardFineTuner`; `lora` must be None.
    """

    def __init__(
        self,
        *args: Any,
        num_candidates: int = 8,
        advantage: Advantage | None = None,
        advantage_clip: float | None = 5.0,
        decoupled_rewards: bool = False,
        clip_range: float = 0.2,
        log_prob_reduction: Reduction = "sum",
        beta: float = 0.05,
        maps: Maps | None = None,
        width: int = 256,
        attention_heads: int = 0,
        condition_free: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.num_candidates = num_candidates
        self.advantage = advantage or GroupAdvantage()
        self.advantage_clip, self.clip_range = advantage_clip, clip_range
        self.decoupled_rewards = decoupled_rewards
        self.log_prob_reduction: Reduction = log_prob_reduction
        self.beta = beta
        self.maps, self.width, self.condition_free = maps or LowResolution(), width, condition_free
        self.attention_heads = attention_heads
        self.noise_policy: NoisePolicy | None = None

    def check(self) -> None:
        process = self.pipeline.process
        if not isinstance(process, GaussianProcess):
            raise UsageError(
                f"{self.algorithm} learns a Gaussian prior, but {type(self.pipeline).__name__} "
                f"starts from that of a {type(process).__name__}; use configs/algorithms/ddpo.yaml "
                "or p_graft.yaml"
            )
        require(
            self.sampler.eta == 0,
            self,
            "sampler.eta",
            f"0 for {self.algorithm}, which credits the initial noise with all of the reward; to "
            "train a stochastic sampler use configs/algorithms/ddpo.yaml",
        )
        require(
            self.lora is None, self, "lora", f"null: {self.algorithm} leaves the denoiser as it is"
        )
        one_of(self, "log_prob_reduction", get_args(Reduction))
        at_least(1, self, "num_candidates", "width")
        positive(self, "clip_range", "advantage_clip")
        at_least(0, self, "beta", "attention_heads")
        self.advantage.check(self.num_candidates)
        if self.decoupled_rewards:
            check_decoupled(self.reward, self.advantage, self)

    def build(self) -> None:
        """Freeze the pipeline and size the policy for its states and features."""
        self.pipeline.requires_grad_(False)
        example = self.pipeline.example()
        shape = tensor_of(self.pipeline.blank(example)).shape[1:]
        _, length, num_features = self.pipeline.tokens(example).shape
        reads_tokens = length > 1 and not self.condition_free
        with own_rng(self.seed):
            self.noise_policy = NoisePolicy(
                num_features,
                shape,
                self.maps,
                width=self.width,
                conditional=not self.condition_free,
                heads=self.attention_heads if reads_tokens else 0,
            ).to(self.pipeline.device)

    def trainable(self) -> NoisePolicy:
        assert self.noise_policy is not None
        return self.noise_policy

    def prior(self, condition: Condition) -> Gaussian:
        """Return N(mu(c), sigma(c)^2) in units of the process's own prior."""
        policy = self.trainable()
        if policy.heads:  # tokens are large: those of each condition once
            rows, places = torch.unique(condition.rows, return_inverse=True)
            z = policy(self.pipeline.tokens(replace(condition, rows=rows)))
            places = places.to(z.loc.device)
            z = Gaussian(z.loc[places], z.std[places])
        else:
            z = policy(self.pipeline.features(condition))
        base = self.reference_prior(condition)
        if z.loc.shape != base.loc.shape:
            raise UsageError(
                f"{self.algorithm} needs states of one size, but {type(self.pipeline).__name__} "
                f"has {tuple(z.loc.shape[1:])} and {tuple(base.loc.shape[1:])}; use "
                "configs/algorithms/p_graft.yaml"
            )
        return base.like(base.loc + base.std * z.loc.to(base.loc), base.std * z.std.to(base.loc))

    def reference_prior(self, condition: Condition) -> Gaussian:
        prior = super().reference_prior(condition)
        assert isinstance(prior, Gaussian)
        return prior

    def route(self) -> Route:
        return replace(self.reference_route(), prior=self.prior)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M samples per condition; keep x_1, its log-probability and its advantage."""
        candidates = condition.repeat(self.num_candidates)
        stream = (Stream.ROLLOUT, self.num_rounds)
        seeds = self.rollouts.seeds(batch, self.num_candidates, *stream)
        ends = (0, self.sampler.num_steps)
        scoring = Scoring(self.rollouts, by_part=self.decoupled_rewards)
        x_1, x_0 = self.rollouts.draw(
            self.route(), candidates, seeds, keep=ends, drawn=scoring.drawn
        )
        self.num_samples += len(candidates) * self.trainer.world_size
        judged = judge(
            scoring,
            x_0,
            condition,
            seeds,
            advantage=self.advantage,
            clip=self.advantage_clip,
            world_size=self.trainer.world_size,
        )
        prior = _precise(self.prior(candidates))
        old = prior.log_prob(x_1, self.log_prob_reduction)
        squares = tensor_of(x_1).double().square().flatten(start_dim=1).sum(dim=1)
        return Experience(
            states={"x_1": x_1, "log_prob": old, "advantage": judged.advantages.to(old)},
            condition=candidates,
            seeds=seeds,
            # ||x_1||^2 / d: the denoiser was trained where it is 1, give or take 3 %.
            metrics={
                **judged.metrics,
                "noise_power": float((squares / prior.num_dimensions).mean()),
            },
            histograms=judged.histograms,
        )

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped surrogate of each x_1, plus beta times the KL to N(0, I), [n]."""
        x_1, old, advantages = (
            tensor_of(experience.states[name]) for name in ("x_1", "log_prob", "advantage")
        )
        prior = _precise(self.prior(experience.condition))
        reference = _precise(self.reference_prior(experience.condition))
        new = prior.log_prob(x_1, self.log_prob_reduction)
        kl = prior.kl(reference, self.log_prob_reduction)
        losses = importance_sampling(new, old, advantages, self.clip_range) + self.beta * kl
        values = ratio_values(new, old, self.clip_range, on_policy=self.on_policy)
        nats = {"kl": prior.kl(reference).detach(), "entropy": prior.entropy("mean").detach()}
        return losses, values | nats

    def export(self, folder: Path) -> list[Path]:
        """Write the noise generator, which `NoiseGenerator.load` reads."""
        notes = {"pipeline": self.pipeline.name, "num_steps": self.sampler.num_steps}
        generator = NoiseGenerator(self.trainable(), notes)
        return [generator.save(folder / "noise_generator.safetensors")]

    def statistics(self) -> Mapping[str, Kept]:
        return {"advantage": self.advantage}


def _precise(prior: Gaussian) -> Gaussian:
    # A sum over 16,384 dimensions is about -23,000, of which single precision knows 0.002.
    return prior.like(prior.loc.double(), prior.std.double())
