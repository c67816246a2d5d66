"""Whole trajectories: sampled once, each state held once, replayed as (step, sample) pairs.

Step i of a sampler leads from x at `times[i]` to x at `times[i + 1]`. A state is rounded to the
type it is stored in *before* its log-probability is taken and before the walk goes on from it:
replay then sees exactly what the sampler saw, and the first ratio is 1.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from lit_rlft.core.distribution import Distribution, Reduction
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import Noise, Process, of_step
from lit_rlft.core.process.base import Step
from lit_rlft.core.randomness import Generators, next_step, step_noise
from lit_rlft.core.sampling import Denoiser
from lit_rlft.core.state import State, batch_size, index, leaves, tensor_of, tree_map

__all__ = ["Trajectories", "law_of", "rounded", "single", "walk_with_log_probs"]


def law_of(
    denoiser: Denoiser,
    process: Process,
    x_t: State,
    t: Tensor,
    coefficients: State,
    condition: Condition,
    step: Step | None = None,
) -> Distribution:
    """Return p(x_s | x_t), computed in single precision at least; sampler and replay share it.

    Args:
        denoiser: Called once.
        process: Gives the transition.
        x_t: [B, ...].
        t: Levels of x_t, [B].
        coefficients: Those of the steps, [B, C] of each field, or [C] of one step for all.
        condition: One row per sample.
        step: `process.step`, or what a walk has of `process.stepper`.
    """
    prediction = denoiser(x_t, t, condition)
    return (step or process.step)(single(prediction), single(x_t), coefficients)


def walk_with_log_probs(
    denoiser: Denoiser,
    process: Process,
    x_1: State,
    condition: Condition,
    times: Tensor,
    eta: Noise,
    noise: Generators = None,
    *,
    dtype: torch.dtype | None = None,
    reduction: Reduction = "mean",
    ends: Tensor | None = None,
    seen: Callable[[int, Distribution], None] | None = None,
) -> Iterator[tuple[State, Tensor | None]]:
    """Iterate over (x, log-probability [B] of the step that led to it), from x_1 with None.

    Args:
        denoiser: Called once per step with x_t, t [B] and the condition.
        process: Gives each reverse transition.
        x_1: State at `times[0]`; its types are those the denoiser is called with.
        condition: One row per sample.
        times: [num_steps + 1], decreasing.
        eta: Noise of the transitions; log-probabilities of those without any are 0.
        noise: One generator per sample, or None for torch's global one.
        dtype: Floating type that every state is rounded to; None takes x_1's own.
        reduction: Over the dimensions of a state.
        ends: [num_steps], where each step leads (`Process.ends`); None is the grid's next.
        seen: Called with the number of each step and the distribution that it draws from.
    """
    x, size = rounded(x_1, x_1, dtype), batch_size(x_1)
    steps, step = process.steps(times, ends, eta, single(x_1)), process.stepper(single(x_1))
    ahead = step_noise(noise, len(steps))
    yield x, None
    for i in range(len(steps)):
        t = steps.levels(i, size)
        transition = law_of(denoiser, process, x, t, steps.row(i), condition, step)
        if seen is not None:
            seen(i, transition)
        still = process.differentiable and of_step(eta, i) == 0
        x = transition.mean if still else transition.rsample(next_step(ahead))
        x = rounded(x, x_1, dtype)
        yield x, transition.log_prob(x, reduction)


class Trajectories:
    """N trajectories, of which only the states that the trained steps touch are kept, once each.

    Args:
        num: N.
        times: [T + 1], the sampler's grid.
        steps: The S trained steps, numbers in [0, T).
        coefficients: [T, C] of each field, of all steps (`Process.steps`).
        dtype: Floating type of the kept states; None takes that of the states given.
        keeps_means: Whether the means of the trained steps' Gaussians are kept too, in the
            precision they are computed in.

    Attributes:
        steps: The trained steps in order.
    """

    def __init__(
        self,
        num: int,
        times: Tensor,
        steps: Iterable[int],
        coefficients: State,
        dtype: torch.dtype | None = None,
        *,
        keeps_means: bool = False,
    ) -> None:
        self.keeps_means = keeps_means
        self._means: Tensor | None = None
        self.num, self.times, self.dtype = num, times, dtype
        self.steps = sorted(set(steps))
        self._coefficients = coefficients
        needed = sorted({i + end for i in self.steps for end in (0, 1)})
        self._slots = {i: slot for slot, i in enumerate(needed)}
        self._states: State | None = None
        self._types: State | None = None
        self._log_probs: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the trained steps under the policy that sampled, [S, N]."""
        assert self._log_probs is not None
        return self._log_probs

    def record(self, first: int, walk: Iterable[tuple[State, Tensor | None]]) -> State:
        """Keep the needed states of the trajectories from number `first` on; return their x_0."""
        for i, (x, log_prob) in enumerate(walk):
            rows = slice(first, first + batch_size(x))
            if i in self._slots:
                self._keep(self._slots[i], rows, x)
            if log_prob is not None and i - 1 in self.steps:
                if self._log_probs is None:
                    self._log_probs = log_prob.new_zeros(len(self.steps), self.num)
                self._log_probs[self.steps.index(i - 1), rows] = log_prob
        return x

    def means_from(self, first: int) -> Callable[[int, Distribution], None] | None:
        """Return what a walk calls with its steps' Gaussians, or None where means are not kept.

        Args:
            first: Number of the walk's first trajectory.
        """
        return partial(self._keep_mean, first) if self.keeps_means else None

    def _keep_mean(self, first: int, step: int, law: Distribution) -> None:
        if step not in self.steps:
            return
        mean = tensor_of(law.mean)
        if self._means is None:
            self._means = mean.new_zeros(len(self.steps), self.num, *mean.shape[1:])
        self._means[self.steps.index(step), first : first + len(mean)] = mean

    def pairs(self, places: Tensor, samples: Tensor) -> dict[str, State]:
        """Return the transitions of some (step, sample) pairs, gathered from the kept states.

        Args:
            places: [P] int64 on the CPU, places in `steps`.
            samples: [P] int64 on the CPU, numbers of trajectories.

        Returns:
            `x_t` and `x_s` [P, ...] in the types of the states once given, `t` [P], `log_prob` [P],
            `coefficients` [P, C] of each field, and `mean` [P, ...] where means are kept.
        """
        known = self._by_place
        places, samples = (rows.to(self._device, non_blocking=True) for rows in (places, samples))
        slots = known["slot"].index_select(0, places)
        pairs: dict[str, State] = {
            "x_t": self._read(slots, samples),
            "x_s": self._read(slots + 1, samples),  # the next state has the next slot
            "t": known["t"].index_select(0, places),
            "log_prob": self.log_probs[places, samples],
            "coefficients": index(self._trained_coefficients, places),
        }
        if self._means is not None:
            pairs["mean"] = self._means[places, samples]
        return pairs

    @property
    def _device(self) -> torch.device:
        return self.log_probs.device

    @cached_property
    def _by_place(self) -> dict[str, Tensor]:
        """Slots and levels of the trained steps, each [S], on the device."""
        steps = torch.tensor(self.steps)
        slots = torch.tensor([self._slots[i] for i in self.steps])
        own = {"slot": slots, "t": self.times[steps]}
        return {name: one.to(self._device, non_blocking=True) for name, one in own.items()}

    @cached_property
    def _trained_coefficients(self) -> State:
        """The coefficients of the trained steps, [S, C] of each field."""
        steps = torch.tensor(self.steps).to(self._device, non_blocking=True)
        return index(self._coefficients, steps)

    def replace_log_probs(
        self, places: Tensor, samples: Tensor, values: Tensor, law: Distribution
    ) -> None:
        """Set the log-probabilities of some pairs, [P], counted as in `pairs`, and kept means.

        Args:
            places: As of `pairs`.
            samples: As of `pairs`.
            values: The log-probabilities.
            law: What they are of, for as many samples or more.
        """
        places, samples = (rows.to(self._device, non_blocking=True) for rows in (places, samples))
        self.log_probs[places, samples] = values.to(self.log_probs)
        if self._means is not None:
            self._means[places, samples] = tensor_of(law.mean)[: len(places)].to(self._means)

    @property
    def num_bytes(self) -> int:
        """Bytes of the kept states."""
        assert self._states is not None
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(self._states))

    def _keep(self, slot: int, rows: slice, x: State) -> None:
        if self._states is None:
            self._states, self._types = tree_map(self._empty, x), index(x, slice(0, 0))
        for kept, leaf in zip(leaves(self._states), leaves(x), strict=True):
            kept[slot, rows] = leaf.to(kept.dtype)

    def _empty(self, leaf: Tensor) -> Tensor:
        shape = (len(self._slots), self.num, *leaf.shape[1:])
        return leaf.new_empty(shape, dtype=_stored_type(leaf, self.dtype))

    def _read(self, slots: Tensor, samples: Tensor) -> State:
        assert self._states is not None and self._types is not None
        return tree_map(
            lambda kept, own: kept[slots, samples].to(own.dtype), self._states, self._types
        )


def rounded(x: State, like: State, dtype: torch.dtype | None) -> State:
    """Return x in the types of `like`, its numbers rounded to the precision of `dtype`."""
    return tree_map(lambda leaf, own: leaf.to(_stored_type(own, dtype)).to(own.dtype), x, like)


def _stored_type(leaf: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype


def single(state: State) -> State:
    """Return a state whose numbers in half precision are in single precision."""

    def upcast(leaf: Tensor) -> Tensor:
        half = leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if half else leaf

    return tree_map(upcast, state)
