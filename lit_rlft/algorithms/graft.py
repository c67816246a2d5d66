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
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.core.implicit import implicit
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, Seeded
from lit_rlft.core.selection import BestOfM, RewardWeighted, Selection, TopK
from lit_rlft.core.state import State, index, leaves, tensor_of
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import mean_of_all
from lit_rlft.loop.candidates import draw_candidates
from lit_rlft.loop.differentiable import check_guidance
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.relay import Relay
from lit_rlft.loop.route import Route

__all__ = ["GRAFT", "PGRAFT"]

TrainFrom = Literal["intermediate", "clean"]


class PGRAFT(RewardFineTuner):
    """P-GRAFT: fits the noisier steps to accepted candidates; the reference runs the last steps.

    Args:
        *args: Pipeline and reward.
        cut: f in [0, 1); the reference runs the last f of the sampler's steps, above 0 one at
            least. 0 is GRAFT.
        start: Share of the sampler's steps that the reference runs first, in [0, 1).
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
            moves from f_ref by contrast / 2 times the difference of the two fits: at
            2 (1 - k / M), to first order, to the law of the k accepted of M. The loss is
            bounded below, unlike one with negative weights, but has the same direction at the
            reference. After the implicit negative policy of DiffusionNFT (Zheng et al., 2025),
            https://arxiv.org/abs/2509.16117, which mirrors in the policy that drew; `iterative`
            here takes the difference where the tuned model is, and the pull to f_ref stays. The
            candidates of a condition are noised alike in training, so that noise cancels in the
            difference too.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        cut: float = 0.25,
        start: float = 0.0,
        selection: Selection | None = None,
        num_candidates: int = 4,
        train_from: TrainFrom = "intermediate",
        iterative: bool = False,
        guided_loss: bool = True,
        contrast: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.cut, self.start = cut, start
        self.selection = selection or TopK(1)
        self.num_candidates = num_candidates
        self.train_from: TrainFrom = train_from
        self.iterative = iterative
        self.guided_loss = guided_loss
        self.contrast = contrast
        self._warned = False

    @property
    def relay(self) -> Relay:
        """Who runs which of the sampler's steps, as `start` and `cut` have it."""
        return Relay(self.start, self.cut)

    def check(self) -> None:
        one_of(self, "train_from", get_args(TrainFrom))
        at_least(1, self, "num_candidates")
        at_least(0, self, "contrast")
        self.relay.check(self, self.sampler.num_steps)
        if self.guided_loss:
            check_guidance(self.pipeline, self.algorithm)
        self.selection.check(self.num_candidates)
        if not self.selection.selects(self.num_candidates):
            rank_zero_warn(
                f"model.init_args.selection, {type(self.selection).__name__}, accepts all "
                f"{self.num_candidates} candidates of a condition for any rewards: nothing is "
                "selected; raise num_candidates"
            )
        if self.selection.needs_keys and type(self.pipeline).keys is Pipeline.keys:
            raise UsageError(
                f"model.init_args.selection: {type(self.selection).__name__} needs equivalence "
                f"classes of samples, and {type(self.pipeline).__name__} names none; take the rule "
                "within it alone"
            )

    @property
    def cut_step(self) -> int:
        """The step before which the tuned model ends; the state there is x_tau."""
        return self.relay.steps(self.sampler.num_steps)[1]

    @property
    def tau(self) -> float:
        """The noise level of the cut; 0 where there is none."""
        return self.relay.levels(self.pipeline.process, self.sampler.num_steps)[0]

    def route(self) -> Route:
        return self.relay.of(super().route(), self.reference)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M candidates per condition and keep x_tau (or x_0) of the accepted ones."""
        route = self.route() if self.iterative else self.reference_route()
        drawn = draw_candidates(
            self.rollouts,
            route,
            batch,
            condition,
            self.num_candidates,
            round_index=self.num_rounds,
            keep=(self.cut_step, self.sampler.num_steps),
            world_size=(world_size := self.trainer.world_size),
        )
        self.num_samples += len(drawn.seeds) * world_size
        x_tau, x_0 = drawn.states
        candidates, seeds, rewards = drawn.condition, drawn.seeds, drawn.rewards
        groups = rewards.cpu().view(-1, self.num_candidates)
        accepted = self._accept(groups, drawn.keys, seeds)
        chosen = accepted.flatten().nonzero().flatten()
        shares = accepted.flatten()[chosen]
        mean = mean_of_all(groups.flatten()[chosen] * shares, world_size)
        rate = mean_of_all((accepted > 0).float(), world_size)
        self._warn_of_none(rate, len(seeds) * world_size)
        weights = self._weights(accepted, groups.isfinite())
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
                "reward": drawn.reward,
                "failed_rewards": drawn.failed_rewards,
                "accepted_reward": mean / mean_of_all(shares, world_size),
                "acceptance_rate": rate,
            },
            histograms={"reward": drawn.known, "accepted_reward": groups.flatten()[chosen]},
            counts=weights.count_nonzero(dim=1).tolist(),
        )

    def _accept(
        self, groups: Tensor, keys: Sequence[Hashable] | None, seeds: Sequence[int]
    ) -> Tensor:
        """Return how much candidates count, [G, M]; what could not be scored does not."""
        starts = range(0, len(seeds), self.num_candidates)
        grouped = [keys[i : i + self.num_candidates] for i in starts] if keys else None
        noise = Seeded([seeds[i] for i in starts], Stream.SELECT)
        known = groups.isfinite()
        found: Any = self.selection.weights(groups.where(known, -math.inf), grouped, noise)
        if not isinstance(found, Tensor) or found.shape != groups.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"{type(self.selection).__name__} returned {given}; a selection returns a bool "
                f"tensor, a row per condition and a column per candidate: {tuple(groups.shape)}"
            )
        return found * known

    def _warn_of_none(self, rate: float, num_candidates: int) -> None:
        """Warn, once, where a round has nothing to train on."""
        if rate == 0 and not self._warned:
            self._warned, name = True, type(self.selection).__name__
            rank_zero_warn(
                f"{name} accepted none of the {num_candidates:,} candidates of round "
                f"{self.num_rounds + 1}, from which nothing is learnt; look at the settings of "
                "model.init_args.selection, or raise model.init_args.num_candidates"
            )

    @property
    def _noised_alike(self) -> int:
        """Number of neighbouring candidates that share the times and noise of training."""
        return self.num_candidates if self.contrast else 1

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted denoising loss of the samples at levels above tau, [n]."""
        process, x_s, tau = self.pipeline.process, experience.states["x_s"], self.tau
        t = self.relay.random_times(process, self.sampler.num_steps, x_s, noise)
        s = torch.full_like(t, tau if self.train_from == "intermediate" else 0.0)
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

    It reports the name of the method that its settings select: RWR (reward-weighted regression)
    with `RewardWeighted`; RAFT, from the model tuned so far, with `BestOfM`.

    References:
        RAFT (Dong et al., 2023), https://arxiv.org/abs/2304.06767

    Args:
        *args: Pipeline and reward.
        **p_graft: Arguments of `PGRAFT` other than `cut`.
    """

    def __init__(self, *args: Any, **p_graft: Any) -> None:
        super().__init__(*args, cut=0.0, **p_graft)

    @property
    def algorithm(self) -> str:
        """The method that the settings select."""
        if isinstance(self.selection, RewardWeighted):
            return "RWR"
        return "RAFT" if self.iterative and isinstance(self.selection, BestOfM) else "GRAFT"
