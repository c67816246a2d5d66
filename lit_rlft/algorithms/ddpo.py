r"""DDPO and its family: policy gradients on the transitions of whole trajectories.

Denoising is a decision process whose policy is the transition :math:`p_\theta(x_s \mid x_t, c)`.
Trajectories are drawn once with the current policy and replayed as (step, sample) pairs:

.. math::
    \nabla_\theta E[r(x_0)] = E\Big[\sum_t A\, \nabla_\theta \log p_\theta(x_s \mid x_t, c)\Big].

| method | estimator | advantages | further |
|---|---|---|---|
| DDPO-SF | score function | per condition, running | one pass over the samples |
| DDPO | importance sampling, clipped | per condition, running | |
| DPOK | importance sampling, clipped | per condition, running | KL to the reference, per step |
| GRPO | importance sampling, clipped | per group | KL |
| Flow-GRPO | importance sampling, clipped | per group | `sampler.transition` flow_sde, KL |
| Flow-CPS | importance sampling, clipped | per group | `sampler.transition` cps |
| MixGRPO | importance sampling, clipped | per group | noise inside a `sliding` window alone |
| Flow-GRPO-Fast | importance sampling, clipped | per group | a `sliding` window in random order |
| GRPO-Guard | importance sampling, clipped, `ratio_norm` | per group | |
| RLOO | either | leave one out | |

A transition without noise, as the last one of many schedules, has no log-probability: it takes part
in sampling alone, and so does any other step that left nothing to chance (a masked state that is
all shown). Works on every process, each through its own `transition(...).log_prob`.

References:
    Training Diffusion Models with Reinforcement Learning (Black et al., 2023; DDPO),
    https://arxiv.org/abs/2305.13301
    DPOK (Fan et al., 2023), https://arxiv.org/abs/2305.16381
    Flow-GRPO (Liu et al., 2025), https://arxiv.org/abs/2505.05470
    Coefficients-Preserving Sampling (Wang & Yu, 2025; Flow-CPS), https://arxiv.org/abs/2509.05952
    MixGRPO (Li et al., 2025), https://arxiv.org/abs/2507.21802
    GRPO-Guard (Wang et al., 2025), https://arxiv.org/abs/2510.22319
    DanceGRPO (Xue et al., 2025; one start for a group), https://arxiv.org/abs/2505.07818
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.advantage import (
    Advantage,
    GroupAdvantage,
    LeaveOneOutAdvantage,
    RunningAdvantage,
)
from lit_rlft.core.checks import UsageError, at_least, one_of, positive, require
from lit_rlft.core.distribution import Distribution, Gaussian, Reduction
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess, Noise, Within
from lit_rlft.core.process.steps import Steps
from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.sampling import Denoiser
from lit_rlft.core.state import State, cat, slices, tensor_of
from lit_rlft.core.streams import Stream
from lit_rlft.core.surrogate import (
    importance_sampling,
    normalized_log_ratio,
    ratio_values,
    score_function,
)
from lit_rlft.core.trajectory import (
    Trajectories,
    law_of,
    single,
    walk_with_log_probs,
)
from lit_rlft.core.window import SlidingWindow
from lit_rlft.distributed import gather
from lit_rlft.loop.advantages import check_decoupled, judge
from lit_rlft.loop.batch_sizes import rehearse
from lit_rlft.loop.checkpoint import Kept
from lit_rlft.loop.differentiable import check_guidance
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.rollouts import Chunk, Drawn
from lit_rlft.loop.route import Route
from lit_rlft.loop.scoring import Scoring
from lit_rlft.loop.strategy import passes_of

__all__ = ["DDPO", "Rollout", "rounds_by_batch"]


@dataclass(frozen=True, kw_only=True)
class Rollout(Experience):
    """Trajectories and their advantages; the loss has a term per trained (step, sample) pair.

    Selecting samples moves no state: only the pairs of one microbatch are ever gathered.

    Attributes:
        trajectories: N of them, shared by all selections.
        trained: [S, N] bool, which pairs have a term.
        advantages: [N] float64.
        rows: [n] int64, which trajectories are selected.
        num_steps: Steps over which a sample's terms are averaged.
        balance: [S], weight of each trained step in the surrogate; None weighs all alike.
    """

    trajectories: Trajectories
    trained: Tensor
    advantages: Tensor
    rows: Tensor
    num_steps: int
    balance: Tensor | None = None

    @property
    def num_terms(self) -> int:
        return len(self._pairs[0])

    @property
    def terms_per_sample(self) -> Tensor:
        return self.trained[:, self.rows].sum(dim=0)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair the place of its step, its row here and its trajectory, [P] each."""
        # Step by step: pairs of one step then meet in a batch, as they did in the sampler.
        places, chosen = self.trained[:, self.rows].nonzero().T.contiguous()
        return places, chosen, self.rows[chosen]

    @cached_property
    def _advantages(self) -> Tensor:
        """The advantages as losses take them."""
        return self.advantages.to(self.trajectories.log_probs, non_blocking=True)

    def index(self, rows: Tensor) -> "Rollout":
        return replace(
            self,
            rows=self.rows[rows],
            condition=self.condition.index(rows),
            seeds=[self.seeds[row] for row in rows.tolist()],
        )

    def terms(self, rows: Tensor) -> Experience:
        """Gather pairs: their states, and their weights in the loss."""
        places, chosen, samples = (numbers[rows] for numbers in self._pairs)
        samples = samples.to(self._advantages.device, non_blocking=True)
        states = self.trajectories.pairs(places, samples)
        old = tensor_of(states["log_prob"])
        states["advantage"] = self._advantages[samples]
        states["weight"] = torch.full_like(old, 1 / self.num_steps)
        if self.balance is not None:
            states["balance"] = self.balance[places].to(old, non_blocking=True)
        seeds = [self.seeds[i] for i in chosen.tolist()]
        return Experience(states, self.condition.index(chosen), seeds)

    def replace_log_probs(self, rows: Tensor, values: Tensor, law: Distribution) -> None:
        """Set the old log-probabilities of some terms, [P], which are those of `law`."""
        places, _, samples = self._pairs
        self.trajectories.replace_log_probs(places[rows], samples[rows], values, law)


def rounds_by_batch(dtype: torch.dtype, device: str) -> bool:
    """Return whether products round so coarsely that a result depends on the size of its batch.

    Args:
        dtype: Of a network's weights.
        device: The type of their device.
    """
    half = dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device)
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return half or (device == "cuda" and (matmul != "highest" or convolutions))


Estimator = Literal["importance_sampling", "score_function"]
StateDtype = Literal["float32", "float16", "bfloat16"]


class DDPO(RewardFineTuner):
    """DDPO, DPOK, GRPO and its kin: policy gradients on random steps, for any reward.

    `minibatch_size` counts samples: an update trains all their trained steps, averaged.
    `microbatch_size` counts (step, sample) pairs and bounds the memory of the replay.

    In half precision, and under TF32, a prediction depends on the size of its batch, and ratios on
    that rounding. The old log-probabilities are then taken again, in microbatches, once a round,
    and microbatches that are not full are filled up: give `microbatch_size`, or batches have no
    one size.

    Args:
        *args: Pipeline and reward.
        num_candidates: M, samples drawn per condition, which are the groups of group advantages.
        same_start: All candidates of a condition start from one noise and differ by that of the
            steps alone, so that advantages compare what is trained (DanceGRPO).
        estimator: The clipped ratio, good for several passes over the samples, or the score
            function, for one.
        advantage: The rule that picks each sample's peers, the rewards that its own is compared
            with; running statistics per condition unless given.
        advantage_clip: Advantages are clamped to this size; None leaves them alone.
        decoupled_rewards: Compare each part of a `WeightedSum` for itself and add the advantages,
            weighted (GDPO): parts of any units then count by their weights alone.
        clip_range: Ratios count up to 1 ± this. The published 1e-4 belongs to the mean. Under
            `ratio_norm` it is some 2e-6, which is that of an independent implementation.
        ratio_norm: Clip ratios that mean the same at every noise level (GRPO-Guard): log-ratios are
            centred and freed of their step's std (`normalized_log_ratio`), and steps are weighted
            by the inverse of what a step's mean moves with the prediction, 1 on average over those
            of the sampler that have noise.
        log_prob_reduction: Log-probabilities are the "mean" over the dimensions of a state, as
            DDPO publishes, or their "sum", whose ratios grow with the number of dimensions.
        kl_coef: Weight of KL(policy || reference) of each trained transition, in closed form and
            reduced like log-probabilities; 0 never runs the reference.
        window: First trained step and the one after the last, counted from 0 at pure noise; None
            trains all.
        sliding: A window that moves over training, in place of `window`; only its steps draw noise
            (MixGRPO, Flow-GRPO-Fast), and evaluations draw none.
        num_train_steps: Train so many steps of the window that have noise, drawn again each round;
            None trains all.
        state_dtype: Type in which states are kept between sampling and replay; None takes the
            pipeline's. The sampler walks on rounded states, so ratios do not notice.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        num_candidates: int = 4,
        same_start: bool = False,
        estimator: Estimator = "importance_sampling",
        advantage: Advantage | None = None,
        advantage_clip: float | None = 5.0,
        decoupled_rewards: bool = False,
        clip_range: float = 1e-4,
        ratio_norm: bool = False,
        log_prob_reduction: Reduction = "mean",
        kl_coef: float = 0.0,
        window: tuple[int, int] | None = None,
        sliding: SlidingWindow | None = None,
        num_train_steps: int | None = None,
        state_dtype: StateDtype | None = None,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.num_candidates, self.same_start = num_candidates, same_start
        self.estimator: Estimator = estimator
        self.advantage = advantage or RunningAdvantage()
        self.advantage_clip, self.clip_range = advantage_clip, clip_range
        self.decoupled_rewards, self.ratio_norm = decoupled_rewards, ratio_norm
        self.log_prob_reduction: Reduction = log_prob_reduction
        self.kl_coef = kl_coef
        self.window, self.sliding, self.num_train_steps = window, sliding, num_train_steps
        one_of(self, "state_dtype", (*get_args(StateDtype), None), state_dtype)
        self.state_dtype = None if state_dtype is None else getattr(torch, state_dtype)

    @property
    def algorithm(self) -> str:
        """The member of the family that the settings select, as in the table above."""
        if isinstance(self.advantage, LeaveOneOutAdvantage):
            return "RLOO"
        if isinstance(self.advantage, GroupAdvantage):
            kinds = {
                "GRPO-Guard": self.ratio_norm,
                "Flow-GRPO-Fast": self.sliding is not None and self.sliding.order == "random",
                "MixGRPO": self.sliding is not None,
                "Flow-GRPO": self.sampler.transition == "flow_sde",
                "Flow-CPS": self.sampler.transition == "cps",
            }
            return next((name for name, holds in kinds.items() if holds), "GRPO")
        if self.estimator == "score_function":
            return "DDPO-SF"
        return "DPOK" if self.kl_coef else "DDPO"

    def check(self) -> None:
        one_of(self, "estimator", get_args(Estimator))
        one_of(self, "log_prob_reduction", get_args(Reduction))
        num_steps = self.sampler.num_steps
        check_guidance(self.pipeline, self.algorithm)
        self._check_sliding()
        first, last = self._trained_window
        require(
            self.sampler.eta > 0,
            self,
            "sampler.eta",
            f"above 0 for {self.algorithm}: steps without noise have no log-probability; set it "
            "to 1",
        )
        at_least(1, self, "num_candidates", "num_train_steps")
        positive(self, "clip_range", "advantage_clip")
        at_least(0, self, "kl_coef", "window")
        require(
            0 <= first < last <= num_steps,
            self,
            "window",
            f"[first, last] with 0 <= first < last <= {num_steps}, the sampler's num_steps",
        )
        require(
            1 <= (1 if self.num_train_steps is None else self.num_train_steps) <= last - first,
            self,
            "num_train_steps",
            f"from 1 to the window's {last - first} steps, or null for all of them",
        )
        require(
            self.estimator == "importance_sampling" or self.num_epochs == 1,
            self,
            "num_epochs",
            "1 for the score function, which holds for fresh samples only; or set "
            "model.init_args.estimator to importance_sampling",
        )
        self._check_ratio_norm()
        self._check_same_start()
        self.advantage.check(self.num_candidates)
        if self.decoupled_rewards:
            check_decoupled(self.reward, self.advantage, self)

    def _warn_of_updates(self, num_samples: int) -> None:
        """Warn, once, if a round of the score function is several updates."""
        once = self.num_rounds == 0 and self.estimator == "score_function"
        if once and num_samples > self.minibatch_size:
            rank_zero_warn(
                f"the score function holds for the weights that drew the samples, but a round's "
                f"{num_samples} are {-(-num_samples // self.minibatch_size)} updates: set "
                f"model.init_args.minibatch_size to {num_samples} or more, or "
                "model.init_args.estimator to importance_sampling"
            )

    def _check_sliding(self) -> None:
        if self.sliding is None:
            return
        require(self.window is None, self, "window", "null beside sliding, which moves it")
        num_steps, process = self.sampler.num_steps, self.pipeline.process
        rule = "at least 2 beside sliding: the last step has no noise"
        require(num_steps > 1, self.sampler, "num_steps", rule)
        self.sliding.check(num_steps)
        require(
            process.differentiable,
            self,
            "sliding",
            f"null for a {type(process).__name__}, whose steps all leave something to chance; take "
            "the config flow_grpo for mixed states, grpo for masked ones, or train a fixed window",
        )

    def _check_ratio_norm(self) -> None:
        if not self.ratio_norm:
            return
        process = self.pipeline.process
        rule = f"false for a {type(process).__name__}: steps of other states have no std"
        require(isinstance(process, GaussianProcess), self, "ratio_norm", rule)
        rule = "false where steps clip their estimate of x_0 (clip_sample, thresholding)"
        require(getattr(process, "bound", None) is None, self, "ratio_norm", rule)
        rule = "importance_sampling with ratio_norm: the score function has no ratios"
        require(self.estimator == "importance_sampling", self, "estimator", rule)

    def _check_same_start(self) -> None:
        if not self.same_start:
            return
        rule = "false with one candidate of a condition; or raise num_candidates"
        require(self.num_candidates > 1, self, "same_start", rule)
        masked = isinstance(self.pipeline.process, MaskedProcess)
        rule = "false for masked states, which all start from masks"
        require(not masked, self, "same_start", rule)

    @property
    def _trained_window(self) -> tuple[int, int]:
        """The first step of this round's window, and the one after its last."""
        num_steps = self.sampler.num_steps
        if self.sliding is not None:
            return self.sliding.at(self.num_rounds, num_steps, self.seed)
        return self.window or (0, num_steps)

    @property
    def _noise(self) -> Noise:
        """The noise of this round's trajectories."""
        noise = self.sampler.noise
        return noise if self.sliding is None else Within(noise, *self._trained_window)

    def route(self) -> Route:
        return self._evaluated(super().route())

    def reference_route(self) -> Route:
        return self._evaluated(super().reference_route())

    def _evaluated(self, route: Route) -> Route:
        """Return a route that does not depend on where the window is."""
        return route if self.sliding is None else replace(route, eta=0.0)

    def collect(self, batch: Batch, condition: Condition) -> Rollout:
        """Draw M trajectories per condition with the current policy and compare their rewards.

        Raises:
            UsageError: All rewards failed, or no trained step left anything to chance.
        """
        candidates = condition.repeat(self.num_candidates)
        self._warn_of_updates(len(candidates) * self.trainer.world_size)
        stream = (Stream.ROLLOUT, self.num_rounds)
        seeds = self.rollouts.seeds(batch, self.num_candidates, *stream)
        scoring = Scoring(self.rollouts, by_part=self.decoupled_rewards)
        trajectories, x_0 = self._sample(candidates, seeds, scoring.drawn)
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
        random = trajectories.log_probs.cpu() != 0
        rollout = Rollout(
            states={},
            condition=candidates,
            seeds=seeds,
            metrics=judged.metrics | self._place,
            histograms=judged.histograms,
            trajectories=trajectories,
            # Without a KL term a pair without advantage has no gradient either.
            trained=random if self.kl_coef else random & (judged.advantages != 0),
            advantages=judged.advantages,
            rows=torch.arange(len(candidates)),
            num_steps=self._num_random(random),
            balance=self._balance(candidates, trajectories.steps),
        )
        if self._rounds_by_batch:
            self._replay(rollout)
        return rollout

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the surrogate of some pairs, plus the KL to the reference, [P]."""
        pairs = experience.states
        old, advantages, weight = (
            tensor_of(pairs[name]) for name in ("log_prob", "advantage", "weight")
        )
        filled, size = self._filled(experience), len(experience)
        with self.meter.billing(size, len(filled)):
            policy = self._transition(self.pipeline, filled)
        new = policy.log_prob(filled.states["x_s"], self.log_prob_reduction)
        if self.ratio_norm:
            new, old = self._normalized(new, policy, filled.states), torch.zeros_like(old)
        new = new[:size]
        if self.estimator == "score_function":
            losses = score_function(new, advantages)
        else:
            losses = importance_sampling(new, old, advantages, self.clip_range)
        values = ratio_values(new, old, self.clip_range, on_policy=self.on_policy)
        if "balance" in pairs:
            losses = losses * tensor_of(pairs["balance"])
        if self.kl_coef:
            with torch.no_grad(), self.meter.billing(size, len(filled)):
                reference = self._transition(self.reference, filled)
            kl = policy.kl(reference, self.log_prob_reduction)[:size]
            losses = losses + self.kl_coef * kl
            values["reference_kl"] = kl.detach()
        return losses * weight, values

    def statistics(self) -> Mapping[str, Kept]:
        return {"advantage": self.advantage}

    def _sample(
        self, condition: Condition, seeds: Sequence[int], drawn: Drawn
    ) -> tuple[Trajectories, State]:
        """Draw trajectories in chunks; return what is kept of them, and x_0."""
        process, num_steps = self.pipeline.process, self.sampler.num_steps
        times, ends = process.times(num_steps), process.ends(num_steps)
        table = self._steps(condition.index(slice(0, 1)), self._noise).coefficients
        trained = self._draw_steps(process.noisy(table))
        grid = (times, trained, table, self.state_dtype)
        kept = Trajectories(len(condition), *grid, keeps_means=self.ratio_norm)
        x_0 = []
        for chunk in self.rollouts.chunks(condition, seeds, "Sampling"):
            with chunk.part:
                walk = walk_with_log_probs(
                    self.pipeline,
                    process,
                    self._start(chunk, seeds),
                    chunk.condition,
                    times,
                    self._noise,
                    chunk.noise,
                    dtype=self.state_dtype,
                    reduction=self.log_prob_reduction,
                    ends=ends,
                    seen=kept.means_from(chunk.rows.start),
                )
                last = kept.record(chunk.rows.start, walk)
                drawn(chunk, last)
                x_0.append(last)
        return kept, cat(x_0)

    def _start(self, chunk: Chunk, seeds: Sequence[int]) -> State:
        """Return x_1 of a chunk's trajectories; the noise of their steps is each one's own."""
        prior = self.prior(chunk.condition)
        own = prior.sample(chunk.noise)
        if not self.same_start:
            return own
        numbers = range(chunk.rows.start, chunk.rows.stop)
        return prior.sample(generators([seeds[i - i % self.num_candidates] for i in numbers]))

    @property
    def _rounds_by_batch(self) -> bool:
        """Whether the denoiser computes with factors of fewer bits than float32 has."""
        weight = next(self.pipeline.denoiser.parameters())
        return rounds_by_batch(weight.dtype, weight.device.type)

    def _replay(self, rollout: Rollout) -> None:
        """Take the old log-probabilities as the updates will take the new ones."""
        self._rehearse(rollout)
        pairs_of_update = rollout.num_terms * self.minibatch_size // max(len(rollout), 1)
        size = self.sizes.microbatch.rows or max(pairs_of_update, 1)
        for part in slices(rollout.num_terms, size):
            rows = torch.arange(part.start, part.stop)
            pairs = self._filled(rollout.terms(rows))
            with self.meter.billing(len(rows), len(pairs)):
                policy = self._transition(self.pipeline, pairs)
            old = policy.log_prob(pairs.states["x_s"], self.log_prob_reduction)
            rollout.replace_log_probs(rows, old[: len(rows)], policy)

    def _rehearse(self, rollout: Rollout) -> None:
        """Find the automatic number of pairs, on which the old log-probabilities depend."""
        trainer = self.trainer
        share = -(-self.minibatch_size // trainer.world_size)
        minibatch = rollout.index(torch.arange(min(share, len(rollout))))
        passes = passes_of(trainer, self.manual_backward, list(self._trained().values()))
        self.train()
        rehearse(minibatch, self.loss, passes, self.sizes, self.meter)
        self.eval()

    def _filled(self, pairs: Experience) -> Experience:
        """Repeat the first pair up to a whole microbatch where rounding depends on its size.

        Nobody is billed for repeated pairs: their number depends on that of processes.
        """
        missing = (self.sizes.microbatch.rows or 0) - len(pairs)
        if missing <= 0 or not self._rounds_by_batch:
            return pairs
        return pairs.index(torch.cat([torch.arange(len(pairs)), torch.zeros(missing).long()]))

    def _draw_steps(self, noisy: Tensor) -> list[int]:
        """Draw the trained steps of a round, the same on every process.

        Args:
            noisy: Which steps of the sampler may leave something to chance, bool [T].
        """
        first, last = self._trained_window
        steps, noisy = torch.arange(first, last), noisy.cpu()[first:last]
        if self.num_train_steps is not None and noisy.any():
            steps = steps[noisy]  # a draw of one without would train nothing
        (generator,) = generators([seed_from(self.seed, Stream.STEPS, self.num_rounds)])
        order = torch.randperm(len(steps), generator=generator)
        return steps[order[: self.num_train_steps]].tolist()

    def _num_random(self, random: Tensor) -> int:
        """Return in how many trained steps something was left to chance, on any process."""
        parts = gather(random.any(dim=1).tolist(), self.trainer.world_size)
        num = sum(any(step) for step in zip(*parts, strict=True))
        if not num:
            raise UsageError(
                "none of the trained steps has noise, so there is nothing to learn from; raise "
                "model.init_args.sampler.num_steps or widen model.init_args.window"
            )
        return num

    def _transition(self, denoiser: Denoiser, pairs: Experience) -> Distribution:
        states, process = pairs.states, self.pipeline.process
        given = (states["x_t"], tensor_of(states["t"]), states["coefficients"])
        return law_of(denoiser, process, *given, pairs.condition)

    def _steps(self, condition: Condition, noise: Noise) -> Steps:
        """Return the steps of the sampler's grid, for states of some conditions."""
        process, num_steps = self.pipeline.process, self.sampler.num_steps
        grid = (process.times(num_steps), process.ends(num_steps))
        return process.steps(*grid, noise, single(self.pipeline.blank(condition)))

    @property
    def _place(self) -> dict[str, float]:
        """The number of the sliding window's first step, to log."""
        return {} if self.sliding is None else {"window": float(self._trained_window[0])}

    def _balance(self, condition: Condition, steps: Sequence[int]) -> Tensor | None:
        """Return the weights of trained steps in the surrogate, [S], or None for equal ones."""
        if not self.ratio_norm:
            return None
        process = self.pipeline.process
        assert isinstance(process, GaussianProcess)
        # Over all steps of the sampler: a step's weight is then the same in every round.
        whole = self._steps(condition.index(slice(0, 1)), self.sampler.noise)
        return process.balance(tensor_of(whole.coefficients))[list(steps)].cpu()

    def _normalized(
        self, log_probs: Tensor, policy: Distribution, pairs: Mapping[str, State]
    ) -> Tensor:
        """Return the log-ratios of pairs, [P], as GRPO-Guard clips them."""
        assert isinstance(policy, Gaussian)
        log_ratio = log_probs - tensor_of(pairs["log_prob"])
        old = policy.like(tensor_of(pairs["mean"]), policy.std)
        return normalized_log_ratio(log_ratio, policy, old, self.log_prob_reduction)
