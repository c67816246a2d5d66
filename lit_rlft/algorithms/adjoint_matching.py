r"""Adjoint matching: reward gradients whose optimum is the tilted law, exactly.

The tuned model's law of :math:`x_0` becomes :math:`p_{base}(x_0)\, e^{\lambda r(x_0)}`, normalised.
Samples are drawn with the noise of the ancestral sampler (eta = 1), which makes them independent of
the noise that they start from. With any other the start keeps a say, and the law is another one.
The lean adjoint runs back along each walk from the reward's gradient, through the *frozen* model by
one vector-Jacobian product per step. The control of a few steps is regressed on it
(`core.adjoint`), so no graph reaches through the tuned model's steps.

Under guidance the base is what the pretrained model samples from, guidance included, in walk,
adjoint and regression alike: x_0 is tilted from the law of the *guided* ancestral sampler.

References:
    Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless Stochastic
    Optimal Control (Domingo-Enrich et al., 2024), https://arxiv.org/abs/2409.08861
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.adjoint import (
    Match,
    adjoints,
    drawn_steps,
    match,
    memoryless_steps,
    memoryless_walk,
    near_noise,
)
from lit_rlft.core.checks import UsageError, at_least, finite, positive, require
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.process.base import Process
from lit_rlft.core.process.product import ProductProcess
from lit_rlft.core.process.steps import Steps
from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.state import State, cat, flatten, leaves, tensor_of, tree_map
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, mean_of_all
from lit_rlft.loop.differentiable import check_differentiable, check_guidance
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.rollouts import Chunk
from lit_rlft.loop.strategy import FSDP2Strategy

__all__ = ["AdjointMatching", "Matches"]

_SCALE = 2.0**8
"""Of a reward's gradient on its way through the decoder: in float16 that of a mean over pixels
would vanish. A power of two, it changes no other digit."""
_WEAK_TILT = 0.3
"""Standard deviations by which the optimum moves the mean reward, below which a user is warned."""


@dataclass(frozen=True)
class Matches(Experience):
    """Samples with K matched steps each; the loss has a term per (sample, step) pair.

    The states have n rows of K steps, [n, K, ...].
    """

    @property
    def num_matched(self) -> int:
        """K."""
        return int(tensor_of(self.states["step"]).shape[1])

    @property
    def num_terms(self) -> int:
        return len(self) * self.num_matched

    @property
    def terms_per_sample(self) -> Tensor:
        return torch.full((len(self),), self.num_matched, dtype=torch.int64)

    def index(self, rows: Tensor) -> "Matches":
        chosen = super().index(rows)
        return Matches(chosen.states, chosen.condition, chosen.seeds)

    def terms(self, rows: Tensor) -> Experience:
        """Gather pairs, counted sample by sample."""
        samples = rows // self.num_matched
        states = {
            name: tree_map(lambda leaf: leaf.flatten(0, 1)[rows.to(leaf.device)], state)
            for name, state in self.states.items()
        }
        seeds = [self.seeds[i] for i in samples.tolist()]
        return Experience(states, self.condition.index(samples), seeds)


class AdjointMatching(RewardFineTuner):
    """Adjoint matching: a differentiable reward, continuous states, the tilted law as its optimum.

    Training always draws with the ancestral sampler of `sampler.num_steps` steps. `sampler.eta`
    belongs to evaluation: the tuned model may be drawn from with any, 0 included.

    `minibatch_size` counts samples, `microbatch_size` (sample, step) pairs, and
    `sampling_batch_size` bounds the memory of the reward's gradient and of the adjoint, too.

    Args:
        *args: Pipeline and reward.
        reward_scale: lambda, in nats per unit of reward: 1 makes a sample e times as likely whose
            reward is higher by 1. The distance to the pretrained model follows from it alone.
        num_candidates: M, samples drawn per condition and round.
        num_matched: K, steps matched of each sample, drawn at random, half of them from the last
            quarter of the sampler's; all of them where it has fewer.
        loss_quantile: Pairs whose loss lies above this quantile of the round's are left out, a
            guard against single large gradients that costs the exact optimum; None keeps all.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        reward_scale: float = 1.0,
        num_candidates: int = 4,
        num_matched: int = 4,
        loss_quantile: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.reward_scale, self.num_candidates = reward_scale, num_candidates
        self.num_matched, self.loss_quantile = num_matched, loss_quantile

    def check(self) -> None:
        followed = (self.pipeline, self.reward, self.reward_workers)
        check_differentiable(self, self.algorithm, *followed)
        self._check_process(self.pipeline.process)
        if isinstance(getattr(self._trainer, "strategy", None), FSDP2Strategy):
            raise UsageError(
                "trainer.strategy fsdp2 lets go of weights in every backward pass, also in those "
                f"that {self.algorithm} makes while it samples; use ddp"
            )
        finite(self, "reward_scale")
        positive(self, "reward_scale", "loss_quantile")
        at_least(1, self, "num_candidates", "num_matched")
        require(
            self.sampler.num_steps >= 2,
            self,
            "sampler.num_steps",
            "2 or more: a single step has no noise, and so nothing to steer",
        )
        require(
            self.loss_quantile is None or self.loss_quantile <= 1,
            self,
            "loss_quantile",
            f"in (0, 1], or null to keep all pairs, got {self.loss_quantile}",
        )
        check_guidance(self.pipeline, self.algorithm)

    def _check_process(self, process: Process) -> None:
        if isinstance(process, ProductProcess):
            for name in process.names:
                self._check_process(process.field(name))
        elif getattr(process, "bound", None) is not None:
            raise UsageError(
                f"{self.algorithm} regresses on steps that clip nothing, but {process.one_way}; or "
                "use configs/algorithms/p_graft.yaml"
            )

    def collect(self, batch: Batch, condition: Condition) -> Matches:
        """Draw M samples per condition with the current policy; keep K steps of each.

        Raises:
            UsageError: The gradient of the reward is not finite.
        """
        candidates = condition.repeat(self.num_candidates)
        seeds = self.rollouts.seeds(batch, self.num_candidates, Stream.ROLLOUT, self.num_rounds)
        own = generators([seed_from(seed, Stream.STEPS) for seed in seeds])
        num_steps = self.sampler.num_steps
        drawn = drawn_steps(num_steps, self._num_matched, own, len(seeds))
        found = _Found()
        for chunk in self.rollouts.chunks(candidates, seeds, "Sampling"):
            with chunk.part:
                found.add(*self._matched(chunk, drawn[chunk.rows]))
        self.num_samples += len(candidates) * (world_size := self.trainer.world_size)
        states = {name: cat(parts) for name, parts in found.states.items()}
        states["weight"] = self._weights(tensor_of(states.pop("loss")), world_size)
        values = {name: torch.cat(parts).double().cpu() for name, parts in found.values.items()}
        metrics = {name: mean_of_all(each, world_size) for name, each in values.items()}
        return Matches(
            states=states,
            condition=candidates,
            seeds=seeds,
            metrics=metrics | {"tilt": self._tilt(values["reward"], world_size)},
            histograms=values,
        )

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the regression's losses of some pairs, [P]."""
        pairs = experience.states
        numbers, x_t = tensor_of(pairs["step"]), pairs["x_t"]
        prediction = self.pipeline(x_t, self._steps(x_t).t[numbers], experience.condition)
        own = self._match(numbers, prediction, pairs["base"], x_t, pairs["adjoint"])
        weight = tensor_of(pairs["weight"]).to(own.loss)
        counted = weight * self._num_matched  # 1, or 0 for a pair that is left out
        return own.loss * weight, {"reference_loss": own.start * counted}

    @property
    def _num_matched(self) -> int:
        """K, of a sampler that has as many steps."""
        return min(self.num_matched, self.sampler.num_steps)

    def _steps(self, like: State) -> Steps:
        return memoryless_steps(self.pipeline.process, self.sampler.num_steps, like)

    @cached_property
    def _near(self) -> Tensor | None:
        process, num_steps = self.pipeline.process, self.sampler.num_steps
        levels = process.times(num_steps)[0], process.ends(num_steps)[0]
        return near_noise(process, *(level.to(self.pipeline.device) for level in levels))

    def _matched(self, chunk: Chunk, drawn: Tensor) -> tuple[dict[str, State], dict[str, Tensor]]:
        """Draw a chunk of samples; return the states of its matched steps, and values to log."""
        process, condition = self.pipeline.process, chunk.condition
        x_1 = self.prior(condition).sample(chunk.noise)
        steps = self._steps(x_1)
        walked = memoryless_walk(self.pipeline, process, x_1, condition, len(steps), chunk.noise)
        rewards, adjoint = self._from_reward(walked.states[-1], condition)
        kept = _Kept(drawn.to(rewards.device))
        costs, norms = torch.zeros_like(rewards), torch.zeros_like(rewards)
        with self.reference.active():
            args = (self.pipeline, process, steps, walked.states, condition, adjoint)
            for i, adjoint, base in adjoints(*args, self._near, chunk.noise):
                x_t, row = walked.states[i], steps.row(i)
                prediction, numbers = walked.predictions[i], torch.full_like(kept.steps[:, 0], i)
                loss = self._match(numbers, prediction, base, x_t, adjoint).loss
                kept.keep(i, x_t=x_t, adjoint=adjoint, base=base, loss=loss)
                policy = process.step(prediction, x_t, row)
                costs += policy.kl(process.step(base, x_t, row))
                norms += flatten(adjoint).norm(dim=1) / len(steps)
        values = {"reward": rewards, "control_cost": costs, "adjoint_norm": norms}
        return kept.states, values

    def _from_reward(self, x_0: State, condition: Condition) -> tuple[Tensor, State]:
        """Return the rewards of samples, and the adjoint of x_0, -lambda times their gradient."""
        with torch.enable_grad():
            x = tree_map(lambda leaf: leaf.detach().requires_grad_(), x_0)
            rewards = self.rollouts.reward_of(self.pipeline.decode(x, condition), condition)
            total = _SCALE * rewards.sum()
            of_all = torch.autograd.grad(total, leaves(x), materialize_grads=True)
        if not all(bool(part.isfinite().all()) for part in of_all):
            raise UsageError(
                f"the gradient of {self.reward.name} is not finite for some samples of round "
                f"{self.num_rounds + 1}, so no update was made of them; bound the reward where it "
                "is steep, or use configs/algorithms/p_graft.yaml, which needs no gradient"
            )
        parts, scale = iter(of_all), -self.reward_scale / _SCALE
        return rewards.detach(), tree_map(lambda leaf: scale * next(parts), x_0)

    def _tilt(self, rewards: Tensor, world_size: int) -> float:
        """Return the standard deviation of lambda r, in nats; warn at the start if it is small.

        Of rewards with a normal law the optimum moves the mean by lambda times their variance.
        """
        rewards = torch.cat(gather(rewards, world_size))
        deviation = float(rewards.std(correction=0))
        tilt = self.reward_scale * deviation
        if 0 < tilt < _WEAK_TILT and self.num_rounds == 0:
            rank_zero_warn(
                f"reward_scale is {self.reward_scale:g} and {self.reward.name} of samples has the "
                f"standard deviation {deviation:.3g}: the law that {self.algorithm} ends at has a "
                f"mean reward higher by about {tilt * deviation:.2g}; with --model.reward_scale "
                f"{1 / deviation:.2g} it would be about {deviation:.2g}"
            )
        return tilt

    def _match(
        self, numbers: Tensor, prediction: State, base: State, x_t: State, adjoint: State
    ) -> Match:
        """Compare predictions at some steps with what the adjoints ask for."""
        steps = self._steps(x_t)
        args = (steps, numbers, prediction, base, x_t, adjoint)
        return match(self.pipeline.process, *args, self._near)

    def _weights(self, losses: Tensor, world_size: int) -> Tensor:
        """Return the weights of pairs in the loss, like `losses` [n, K]; 0 leaves a pair out."""
        weights = torch.full_like(losses, 1 / losses.shape[1])
        if self.loss_quantile is None:
            return weights
        everyone = torch.cat(gather(losses.flatten().cpu(), world_size)).double()
        most = everyone.sort().values[round(self.loss_quantile * (len(everyone) - 1))]
        return weights * (losses <= most.to(losses))


class _Kept:
    """The matched steps of a chunk.

    Args:
        steps: Which they are, int64 [n, K].

    Attributes:
        states: What was kept, by name, [n, K, ...]; "step" is `steps`.
    """

    def __init__(self, steps: Tensor) -> None:
        self.steps, self.states = steps, dict[str, State](step=steps)

    def keep(self, step: int, **states: State) -> None:
        """Keep states [n, ...] of one step, of the samples that match it."""
        rows, places = (self.steps == step).nonzero().unbind(dim=1)
        for name, state in states.items():
            if name not in self.states:
                self.states[name] = tree_map(self._empty, state)
            for kept, leaf in zip(leaves(self.states[name]), leaves(state), strict=True):
                kept[rows, places] = leaf[rows]

    def _empty(self, leaf: Tensor) -> Tensor:
        return leaf.new_empty(*self.steps.shape, *leaf.shape[1:])


class _Found:
    """What the chunks of a round come to: states of matched steps, and values to log, by name."""

    def __init__(self) -> None:
        self.states: dict[str, list[State]] = defaultdict(list)
        self.values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, states: Mapping[str, State], values: Mapping[str, Tensor]) -> None:
        """Add those of one more chunk."""
        for name, state in states.items():
            self.states[name].append(state)
        for name, value in values.items():
            self.values[name].append(value)
