r"""Reward gradients through the sampler: DRTune, DRaFT-K, DRaFT-LV, AlignProp and ReFL as one loop.

The loss of a sample is minus its reward, differentiated through the decoder and the sampler's
steps. The methods differ in which steps carry gradient, in whether the denoiser's input is
detached there, in where the walk stops, and in re-noised copies (`core.gradient_plan`). With
detached inputs each step is linear in x_t, so the gradient is a plain sum,

.. math::
    \nabla_\theta r = \sum_{t \in T_{train}} c_t \,
        \frac{\partial f_\theta(x_t, t)}{\partial \theta}^\top \nabla_{x_0} r,

with one scalar :math:`c_t` per step, the product of the sampler's coefficients after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import at_least, finite
from lit_rlft.core.divergence import prediction_distance
from lit_rlft.core.gradient_plan import DRTune, GradientMethod, GradientPlan, check_plan
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.sampling import Denoiser, Sampler, walk
from lit_rlft.core.state import State, batch_size, cat, detach, index, leaves
from lit_rlft.core.streams import Stream
from lit_rlft.loop.differentiable import check_differentiable
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.relay import Relay
from lit_rlft.loop.route import Leg, Route

__all__ = ["GradientWalk", "RewardGradient"]

_STILL = 1e-9
"""Difference of two levels, in [0, 1], of a step that moves nothing."""


class RewardGradient(RewardFineTuner):
    """DRTune, DRaFT, AlignProp, ReFL: ascends a differentiable reward through the sampler.

    Each condition of a batch is sampled once per epoch, inside the loss. Memory grows with the
    number of trained steps, not with the sampler's: the others never build a graph.

    Args:
        *args: Pipeline and reward.
        method: Which steps carry gradient; DRTune unless given.
        kl_coef: Weight of the squared distance of prediction and reference prediction, per free
            dimension and averaged over the trained steps, whose states it takes as given; 0 never
            runs the reference. Methods that follow the states predict twice for it.
        reward_ceiling: lambda of the hinge max(0, lambda - r): samples above it are left alone;
            None maximises without bound.
        gradient_checkpointing: "steps" keeps only the inputs of trained steps and runs the
            denoiser again in the backward pass, "blocks" does so for each block of a denoiser that
            can; None keeps all activations, which is fastest.
        start: Share of the sampler's steps that the reference runs first, without gradient, in
            [0, 1): ImageReFL's combined generation, in training too.
        log_depth: Log how strongly each step's prediction is pulled, the norm of the reward's
            gradient there (`train/grad_norm_at_step/...`).
        **base: Arguments of `RewardFineTuner`.
    """

    checkpointing = ("steps", "blocks", None)

    def __init__(
        self,
        *args: Any,
        method: GradientMethod | None = None,
        kl_coef: float = 0.0,
        reward_ceiling: float | None = None,
        gradient_checkpointing: Literal["steps", "blocks"] | None = None,
        start: float = 0.0,
        log_depth: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.method = method or DRTune()
        self.kl_coef = kl_coef
        self.reward_ceiling = reward_ceiling
        self.gradient_checkpointing = gradient_checkpointing
        self.start, self.log_depth = start, log_depth

    @property
    def algorithm(self) -> str:
        return type(self.method).__name__

    @property
    def relay(self) -> Relay:
        """Who runs which of the sampler's steps, as `start` has it."""
        return Relay(self.start)

    def check(self) -> None:
        followed = (self.pipeline, self.reward, self.reward_workers)
        check_differentiable(self, self.algorithm, *followed)
        self.relay.check(self, self.sampler.num_steps)
        self.method.check(self._num_moving)
        at_least(0, self, "kl_coef")
        finite(self, "reward_ceiling")

    @property
    def _num_early(self) -> int:
        """Number of steps that the reference runs first."""
        return self.relay.steps(self.sampler.num_steps)[0]

    @property
    def _ends_still(self) -> bool:
        """Whether the last step moves nothing, as under schedulers without an offset."""
        process, num_steps = self.pipeline.process, self.sampler.num_steps
        return bool(process.times(num_steps)[-2] - process.ends(num_steps)[-1] < _STILL)

    @property
    def _num_moving(self) -> int:
        """Number of the steps that can be trained."""
        return self.sampler.num_steps - self._num_early - self._ends_still

    def route(self) -> Route:
        return self.relay.of(super().route(), self.reference)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Return the conditions and the seeds; samples are drawn inside the loss."""
        seeds = self.rollouts.seeds(batch, 1, Stream.ROLLOUT, self.num_rounds)
        self.num_samples += len(condition) * self.num_epochs * self.trainer.world_size
        return Experience(states={}, condition=condition, seeds=seeds)

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return minus the reward of fresh samples, or its hinge, plus the penalty, [n]."""
        size, walked = len(experience), self._gradient_walk(experience.condition)
        x_0 = walked.run(self.prior(experience.condition).sample(noise), noise)
        condition = experience.condition.repeat(walked.num_copies)
        rewards = self.rollouts.reward_of(self.pipeline.decode(x_0, condition), condition)
        losses = -rewards
        if self.reward_ceiling is not None:
            losses = (self.reward_ceiling - rewards).clamp(min=0)
        losses, rewards = losses.view(size, -1).mean(dim=1), rewards.view(size, -1).mean(dim=1)
        values = {"reward": rewards.detach()}
        if self.log_depth:
            values |= walked.watch(losses)
        if walked.distances:
            distance = torch.stack(walked.distances).mean(dim=0)
            losses = losses + self.kl_coef * distance
            values["reference_distance"] = distance.detach()
        return losses, values

    def draw_plan(self) -> GradientPlan:
        """Draw the plan of the current update, the same on every process and microbatch."""
        (generator,) = generators([seed_from(self.seed, Stream.PLAN, self.num_updates)])
        plan: Any = self.method.draw(self._num_moving, generator)
        check_plan(plan, self._num_moving, type(self.method).__name__)
        return plan.before(int(self._ends_still))

    def _gradient_walk(self, condition: Condition) -> "GradientWalk":
        return GradientWalk(
            self.draw_plan(),
            condition,
            self.pipeline,
            self.sampler,
            reference=self.reference if self.kl_coef else None,
            detach_input=self.method.detach_input,
            recompute=self.gradient_checkpointing == "steps",
            early=Leg(self.reference, self._num_early, tuned=False),
            ends_still=self._ends_still,
        )


class GradientWalk:
    """One walk from noise to x_0 in which some steps carry gradient.

    Args:
        plan: Which steps carry gradient.
        condition: n rows.
        pipeline: Its prediction is walked on.
        sampler: The grid and the noise of its steps.
        reference: Its prediction is compared with at trained steps; None compares with none.
        detach_input: Whether trained steps cut off the graph of their input.
        recompute: Whether trained steps are run again in the backward pass, to save memory.
        early: Who runs the first steps instead of the pipeline; None leaves it all of them.
        ends_still: Whether the last step moves nothing.

    Attributes:
        distances: Per trained step, the squared distance to the reference's prediction, [n].
    """

    def __init__(
        self,
        plan: GradientPlan,
        condition: Condition,
        pipeline: Pipeline,
        sampler: Sampler,
        *,
        reference: Denoiser | None,
        detach_input: bool,
        recompute: bool,
        early: Leg | None = None,
        ends_still: bool = False,
    ) -> None:
        self.plan, self.condition, self.early = plan, condition, early
        self.ends_still = ends_still
        self.pipeline, self.sampler, self.reference = pipeline, sampler, reference
        self.detach_input, self.recompute = detach_input, recompute
        self.num_copies = max(plan.num_copies, 1)
        self.distances: list[Tensor] = []
        self._predictions: dict[int, State] = {}

    def run(self, x_1: State, noise: Generators) -> State:
        """Walk from x_1, n rows, with one generator each, to x_0.

        Returns:
            n rows, or n * num_copies with the copies of a sample side by side.
        """
        process, sampler = self.pipeline.process, self.sampler
        times, ends = process.times(sampler.num_steps), process.ends(sampler.num_steps)
        steps = iter(range(sampler.num_steps, 0, -1))

        def denoise(x_t: State, t: Tensor, condition: Condition) -> State:
            step = next(steps)
            if step in self.plan.trained:
                return self._trained(x_t, t, condition, step)
            with torch.no_grad():
                return self._untrained(step)(x_t, t, condition)

        stop = sampler.num_steps - (self.plan.stop or 0)  # where the walk ends, on the grid
        grid = (times[: stop + 1], sampler.noise, noise, ends[:stop])
        *_, (_, x) = walk(denoise, process, x_1, self.condition, *grid)
        if self.plan.stop is not None:
            t = times[stop].to(leaves(x)[0].device).expand(len(self.condition))
            return process.denoised(denoise(x, t, self.condition), x, t)
        return self._last_step_again(x, times, noise) if self.plan.num_copies else x

    def _untrained(self, step: int) -> Denoiser:
        """Return who runs a step without gradient, 1 the last of all."""
        early = self.early
        is_early = early is not None and step > self.sampler.num_steps - early.num_steps
        return early.denoiser if early is not None and is_early else self.pipeline

    def watch(self, losses: Tensor) -> dict[str, Tensor]:
        """Return values [n] that the backward pass fills in: the loss's gradient at each step.

        Args:
            losses: [n], before they are scaled and summed.
        """
        scale = torch.ones_like(losses)
        if losses.requires_grad:
            _on_gradient(losses, scale.copy_)  # comes first
        values: dict[str, Tensor] = {}
        for step, prediction in self._predictions.items():
            value = values[f"grad_norm_at_step/{step:03d}"] = torch.zeros_like(scale)
            for leaf in leaves(prediction):
                _on_gradient(leaf, partial(_add_norm, value, scale=scale))
        return values

    def _trained(self, x_t: State, t: Tensor, condition: Condition, step: int) -> State:
        """Return a prediction that carries gradient to the weights."""
        x = detach(x_t) if self.detach_input else x_t
        prediction = self._predictions[step] = self._followed(x, t, condition)
        if self.reference is not None:
            given, own = detach(x), prediction
            if any(leaf.requires_grad for leaf in leaves(x)):
                # Otherwise a part alone of the distance's gradient would flow through the state.
                own = self._followed(given, t, condition)
            with torch.no_grad():
                reference = self.reference(given, t, condition)
            distance = prediction_distance(self.pipeline.process, own, reference, given)
            self.distances.append(distance.view(len(self.condition), -1).mean(dim=1))
        return prediction

    def _followed(self, x: State, t: Tensor, condition: Condition) -> State:
        """Return a prediction with its graph, or what it takes to run it again."""
        if self.recompute:
            return checkpoint(self.pipeline, x, t, condition, use_reentrant=False)
        return self.pipeline(x, t, condition)

    def _last_step_again(self, x_0: State, times: Tensor, noise: Generators) -> State:
        """Noise x_0 to the level before the last step that moves and do it again, with gradient."""
        process, size = self.pipeline.process, len(self.condition)
        device = leaves(x_0)[0].device
        last = len(times) - 1 - self.ends_still
        t, s = (level.to(device) for level in times[last - 1 : last + 1])
        copies = cat(
            [
                process.noised(x_0, s.expand(size), t.expand(size), noise)
                for _ in range(self.num_copies)
            ]
        )
        side_by_side = torch.arange(self.num_copies * size, device=device).view(-1, size).T
        x_t = index(copies, side_by_side.flatten())
        t, s = t.expand(batch_size(x_t)), s.expand(batch_size(x_t))
        condition = self.condition.repeat(self.num_copies)
        prediction = self._trained(x_t, t, condition, step=1 + self.ends_still)
        return process.transition(prediction, x_t, t, s, eta=0.0).mean


def _on_gradient(tensor: Tensor, look: Callable[[Tensor], object]) -> None:
    """Look at a tensor's gradient once it is known, without changing it."""

    def hook(grad: Tensor) -> None:
        look(grad)

    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _add_norm(value: Tensor, grad: Tensor, scale: Tensor) -> None:
    """Add the norm of a gradient [n * copies, ...] to `value` [n], per unit of the loss."""
    squares = grad.detach().float().square().reshape(len(value), -1).sum(dim=1)
    value.copy_((value.square() + squares / scale.square()).sqrt())
