r"""GRAFT and P-GRAFT: fine-tuning on what rejection sampling accepts.

GRAFT draws M candidates per condition from the reference, accepts some by their reward and fits
the model to the accepted samples with its own denoising loss. P-GRAFT attaches the accept bits to
the trajectories' states at an intermediate noise level :math:`\tau` and fits the distribution
:math:`\propto p_{ref,\tau}(x_\tau)\, E[a(x_0) \mid x_\tau]`: the tuned model runs the steps above
:math:`\tau`, the reference the rest.

References:
    P-GRAFT (2025), https://arxiv.org/abs/2510.02692
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import at_least, below_one, require
from lit_rlft.core.implicit import implicit
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.randomness import Generators, generators, rand_like, seed_from
from lit_rlft.core.reward import all_failed
from lit_rlft.core.selection import Selection, TopK
from lit_rlft.core.state import State, index, leaves, tensor_of
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import mean_of_all
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.route import Leg, Route
from lit_rlft.loop.scoring import Scoring

__all__ = ["GRAFT", "PGRAFT"]


class PGRAFT(RewardFineTuner):
    """P-GRAFT: fits the noisier steps to accepted candidates; the reference runs the last steps.

    Args:
        *args: Pipeline and reward.
        cut: f in [0, 1); the reference runs the last f of the sampler's steps. 0 is GRAFT.
        selection: The acceptance rule; the 1 best of M unless given.
        num_candidates: M, samples drawn per condition.
        train_from: What is noised for training: the accepted x_tau ("intermediate", exact for any
            sampler) or the accepted x_0 ("clean", exact only for an exact stochastic sampler).
        iterative: Draw each round from the model tuned so far instead of from the reference.
        guided_loss: Fit the prediction that is sampled from, guidance included, so that the
            distribution being fitted is the one being drawn. False fits the conditional prediction
            alone, as plain supervised fine-tuning does; guidance then acts on top of samples that
            were guided already, and saturates within a few rounds.
        contrast: Also train on the rejected candidates of each condition; 0 leaves them out. A
            choice of ours, not GRAFT's: fitting only accepted samples also fits the errors that a
            coarse sampler makes in every candidate; the difference cancels them. With f_ref the
            frozen reference's prediction, accepted candidates fit f_ref + (f - f_ref) / contrast
            and rejected ones its mirror image in f_ref, each with weight |a_i - mean(a)|. Then f
            moves from f_ref by contrast / 2 times the difference of the two fits. The loss is
            bounded below, unlike one with negative weights, but has the same direction at the
            reference. After the implicit negative policy of DiffusionNFT (Zheng et al., 2025),
            https://arxiv.org/abs/2509.16117. The candidates of a condition are noised alike in
            training, so that noise cancels in the difference too.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        cut: float = 0.25,
        selection: Selection | None = None,
        num_candidates: int = 4,
        train_from: Literal["intermediate", "clean"] = "intermediate",
        iterative: bool = False,
        guided_loss: bool = True,
        contrast: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.cut = cut
        self.selection = selection or TopK(1)
        self.num_candidates = num_candidates
        self.train_from = train_from
        self.iterative = iterative
        self.guided_loss = guided_loss
        self.contrast = contrast

    def check(self) -> None:
        at_least(1, self, "num_candidates")
        at_least(0, self, "contrast")
        below_one(self, "cut")
        steps = f"at least one of the sampler's {self.sampler.num_steps} steps"
        rule = f"smaller, to leave {steps} to the tuned model, got {self.cut}"
        require(self.cut_step >= 1, self, "cut", rule)
        self.selection.check(self.num_candidates)

    @property
    def cut_step(self) -> int:
        """Number of steps run by the tuned model; the state after them is x_tau."""
        return self.sampler.num_steps - round(self.cut * self.sampler.num_steps)

    @property
    def tau(self) -> float:
        """The noise level of the cut; 0 where there is none."""
        if self.cut_step == self.sampler.num_steps:
            return 0.0
        return float(self.pipeline.process.times(self.sampler.num_steps)[self.cut_step])

    def route(self) -> Route:
        last = self.sampler.num_steps - self.cut_step
        legs = [
            Leg(self.pipeline, self.cut_step, tuned=True),
            Leg(self.reference, last, tuned=False),
        ]
        return replace(super().route(), legs=legs)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M candidates per condition and keep x_tau (or x_0) of the accepted ones."""
        candidates = condition.repeat(self.num_candidates)
        stream = (Stream.ROLLOUT, self.num_rounds)
        seeds = self.rollouts.seeds(batch, self.num_candidates, *stream)
        route = self.route() if self.iterative else self.reference_route()
        keep = (self.cut_step, self.sampler.num_steps)
        scoring = Scoring(self.rollouts)
        x_tau, x_0 = self.rollouts.draw(route, candidates, seeds, keep=keep, drawn=scoring.drawn)
        self.num_samples += len(candidates) * (world_size := self.trainer.world_size)
        rewards, keys = scoring.finish(x_0, candidates, seeds, world_size)
        known = rewards[rewards.isfinite()]
        if math.isnan(reward := mean_of_all(known, world_size)) and not self.reward.asks:
            raise all_failed(self.reward.name, len(candidates) * world_size)
        groups = rewards.cpu().view(-1, self.num_candidates)
        accepted = self._accept(groups, keys, seeds)
        chosen = accepted.flatten().nonzero().flatten()
        weights = self._weights(accepted.float(), groups.isfinite())
        trained = weights.flatten().nonzero().flatten()
        source = x_tau if self.train_from == "intermediate" else x_0
        return Experience(
            states={
                "x_s": index(source, trained.to(leaves(source)[0].device)),
                "weight": weights.flatten()[trained].to(rewards.device),
            },
            condition=candidates.index(trained),
            seeds=[seeds[i - i % self._noised_alike] for i in trained.tolist()],
            metrics={
                "reward": reward,
                "failed_rewards": mean_of_all(1 - rewards.isfinite().float(), world_size),
                "accepted_reward": mean_of_all(rewards[chosen.to(rewards.device)], world_size),
                "acceptance_rate": mean_of_all(accepted.float(), world_size),
            },
            histograms={"reward": known, "accepted_reward": groups.flatten()[chosen]},
            counts=weights.count_nonzero(dim=1).tolist(),
        )

    def _accept(
        self, groups: Tensor, keys: Sequence[Hashable] | None, seeds: Sequence[int]
    ) -> Tensor:
        """Return accept bits for rewards, [G, M]; what could not be scored is never accepted."""
        starts = range(0, len(seeds), self.num_candidates)
        grouped = [keys[i : i + self.num_candidates] for i in starts] if keys else None
        noise = generators([seed_from(seeds[i], Stream.SELECT) for i in starts])
        known = groups.isfinite()
        return self.selection(groups.where(known, -math.inf), grouped, noise) & known

    @property
    def _noised_alike(self) -> int:
        """Number of neighbouring candidates that share the times and noise of training."""
        return self.num_candidates if self.contrast else 1

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted denoising loss of the samples at levels above tau, [n]."""
        process, x_s = self.pipeline.process, experience.states["x_s"]
        uniform = rand_like(torch.empty(len(experience), device=leaves(x_s)[0].device), noise)
        t = process.draw_times(uniform, low=self.tau)
        s = torch.full_like(t, self.tau if self.train_from == "intermediate" else 0.0)
        x_t = process.noised(x_s, s, t, noise)
        predict = self.pipeline if self.guided_loss else self.pipeline.predict
        prediction = predict(x_t, t, experience.condition)
        weight = tensor_of(experience.states["weight"])
        if self.contrast:
            prediction = self._mirrored(prediction, x_t, t, experience.condition, weight.sign())
        return weight.abs() * process.loss(prediction, x_s, x_t, s, t), {}

    def _weights(self, accepted: Tensor, known: Tensor) -> Tensor:
        """Return each candidate's weight, [G, M], negative for rejected; 0 costs nothing."""
        if not self.contrast:
            return accepted
        mean = accepted.sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
        return (accepted - mean).where(known, 0)

    def _mirrored(
        self, prediction: State, x_t: State, t: Tensor, condition: Condition, sign: Tensor
    ) -> State:
        """Return f_ref + sign (f - f_ref) / contrast; `sign` [n] is -1 for the rejected."""
        predict = self.pipeline if self.guided_loss else self.pipeline.predict
        with torch.no_grad(), self.reference.active():
            reference = predict(x_t, t, condition)
        return implicit(prediction, reference, sign / self.contrast)


class GRAFT(PGRAFT):
    """GRAFT: fits all steps to the candidates that rejection sampling accepts (P-GRAFT, tau = 0).

    Args:
        *args: Pipeline and reward.
        **p_graft: Arguments of `PGRAFT` other than `cut`.
    """

    def __init__(self, *args: Any, **p_graft: Any) -> None:
        super().__init__(*args, cut=0.0, **p_graft)
