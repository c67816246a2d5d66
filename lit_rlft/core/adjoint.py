r"""Adjoint matching on a sampler's steps: the lean adjoint, and the regression that matches it.

Fine-tuning to the tilted law :math:`p(x_0)\, e^{\lambda r(x_0)}` shifts the exact denoiser by the
gradient of :math:`V_t(x_t) = \log E[e^{\lambda r(x_0)} \mid x_t]` (Tweedie's formula),

.. math:: \hat x_0^*(x_t) = \hat x_0(x_t) + \frac{\sigma_t^2}{\alpha_t} \nabla V_t(x_t) .

Along walks of the ancestral sampler, whose noise leaves nothing of :math:`x_1` in :math:`x_0`,
minus the lean adjoint :math:`a_t` has that gradient for its mean once the model is tuned. It is
the gradient of :math:`-\lambda r(x_0)` through the *pretrained* chain
:math:`x_s = F_t(x_t) + noise`, at the states that the tuned model visits:

.. math::
    a_0 = -\lambda \nabla r(x_0), \qquad a_t = \nabla F_t(x_t)^\top a_s .

So the shift is regressed on it. A sample's loss at level t is

.. math::
    \tfrac12 \Delta\, \big| \hat x_0 - \hat x_0^{base} + \tfrac{\sigma_t^2}{\alpha_t} a_t \big|^2 ,

with :math:`\Delta` the growth of :math:`\alpha^2 / \sigma^2` over the step that led to t, from 0
at the start. The squared shift then costs what the KL divergence of that step does. In small
steps this is the published loss times the length h of a step: on the rectified flow
:math:`\Delta = 2 h (1 - t) / t^3` makes it
:math:`\tfrac h2 |(2 / sig)(f_{base} - f) + sig\, a|^2` with :math:`sig^2 = 2t / (1 - t)`.

References:
    Adjoint Matching (Domingo-Enrich et al., 2024), https://arxiv.org/abs/2409.08861
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, Process, ProductProcess
from lit_rlft.core.process.steps import Steps
from lit_rlft.core.randomness import Generators
from lit_rlft.core.sampling import Denoiser, walk
from lit_rlft.core.state import (
    State,
    detach,
    expand_as,
    fields_of,
    flatten,
    leaves,
    tensor_of,
    tree_map,
)

__all__ = [
    "Match",
    "Walked",
    "adjoints",
    "drawn_steps",
    "match",
    "memoryless_steps",
    "memoryless_walk",
    "near_noise",
]

_LEAST_SIGNAL = 0.01
"""Below this alpha a state counts as pure noise: sigma^2 / alpha times its adjoint is 0 times
infinity. Stable Diffusion's tables end at 0.07, EDM's at 0.003, flows at 0."""
_NEAR = 0.05
"""The alpha of the level whose adjoint stands for that of pure noise: the shift there is too small
by alpha^2 / sigma^2 of the data's variance, and its chance grows as 1 / alpha."""
_LEVELS = 1025  # among which that one is looked for
_MEMORYLESS = 1.0
"""The eta of the ancestral sampler, whose noise leaves nothing of x_1 in x_0."""


@dataclass(frozen=True)
class Walked:
    """A walk of T steps, and what was predicted on the way.

    Attributes:
        states: T + 1 of them, from x_1 to x_0.
        predictions: T of them.
    """

    states: list[State]
    predictions: list[State]


def memoryless_steps(process: Process, num_steps: int, like: State) -> Steps:
    """Return the steps of the ancestral sampler for states like `like`."""
    times, ends = process.times(num_steps), process.ends(num_steps)
    return process.steps(times, ends, _MEMORYLESS, like)


def memoryless_walk(
    denoiser: Denoiser,
    process: Process,
    x_1: State,
    condition: Condition,
    num_steps: int,
    noise: Generators = None,
) -> Walked:
    """Walk the ancestral sampler from `x_1` and keep everything; called without gradients.

    Args:
        denoiser: Called once per step.
        process: Gives each reverse transition.
        x_1: [B, ...].
        condition: B rows.
        num_steps: T.
        noise: One generator per sample, or None for torch's global one.
    """
    predictions: list[State] = []

    def kept(x_t: State, t: Tensor, given: Condition) -> State:
        predictions.append(denoiser(x_t, t, given))
        return predictions[-1]

    grid = (process.times(num_steps), _MEMORYLESS, noise, process.ends(num_steps))
    states = [x for _, x in walk(kept, process, x_1, condition, *grid)]
    return Walked(states, predictions)


def adjoints(
    denoiser: Denoiser,
    process: Process,
    steps: Steps,
    states: Sequence[State],
    condition: Condition,
    adjoint: State,
    near: Tensor | None,
    noise: Generators = None,
) -> Iterator[tuple[int, State, State]]:
    """Iterate over (i, adjoint of `states[i]`, pretrained prediction there), from i = T - 1 to 0.

    One vector-Jacobian product per step. The adjoint of pure noise vanishes with alpha and tells
    nothing: where walks start from it, `states[1]` is noised to a level near it, and the adjoint
    there takes its place. It is drawn from the law of the walk, which has no memory.

    Args:
        denoiser: The pretrained one; it must stay so until the end, for parts of it may be computed
            again in the backward pass.
        process: Gives the transitions.
        steps: T of them.
        states: T + 1, from x_1 to x_0.
        condition: One row per sample.
        adjoint: Of x_0.
        near: `near_noise`.
        noise: One generator per sample, or None for torch's global one.
    """
    size = len(condition)
    for i in reversed(range(int(near is not None), len(steps))):
        x_t, t, row = states[i], steps.levels(i, size), steps.row(i)
        adjoint, prediction = _pulled(denoiser, process, x_t, t, row, condition, adjoint)
        yield i, adjoint, prediction
    if near is None:
        return
    grid = torch.stack([near.to(steps.s), steps.s[0]])
    if grid[0] > grid[1]:
        t, s = (level.expand(size) for level in grid)
        x_t, row = process.noised(states[1], s, t, noise), _ancestral(process, grid, states[1])
        adjoint, _ = _pulled(denoiser, process, x_t, t, row, condition, adjoint)
    yield 0, adjoint, detach(denoiser(states[0], steps.levels(0, size), condition))


def _ancestral(process: Process, grid: Tensor, like: State) -> State:
    """Return the coefficients of the ancestral sampler's step from one level to another, [2]."""
    return process.steps(grid, None, _MEMORYLESS, like).row(0)


def near_noise(process: Process, start: Tensor, after: Tensor) -> Tensor | None:
    """Return the level whose adjoint stands for that of the start, []; None if it has its own.

    That is the level of `states[1]` where this is near enough to noise itself.

    Args:
        process: Of Gaussian fields.
        start: The level at which walks start, [], on the process's device; it waits for that.
        after: The level to which the first step leads, [].
    """
    if float(_signal(process, start.view(1))) >= _LEAST_SIGNAL:
        return None
    parts = torch.linspace(0, 1, _LEVELS, dtype=start.dtype, device=start.device)
    levels = after + (start - after) * parts
    enough = _signal(process, levels) >= _NEAR
    return levels[max(int(enough.sum()) - 1, 0)]


def _signal(process: Process, levels: Tensor) -> Tensor:
    """Return alpha at some levels, of the field that has least."""
    if isinstance(process, ProductProcess):
        fields = [_signal(process.field(name), levels) for name in process.names]
        return torch.stack(fields).amin(dim=0)
    if not isinstance(process, GaussianProcess):
        raise TypeError(f"no adjoint through a {type(process).__name__}")
    return process.schedule.alpha(levels)


def _pulled(
    denoiser: Denoiser,
    process: Process,
    x_t: State,
    t: Tensor,
    coefficients: State,
    condition: Condition,
    adjoint: State,
) -> tuple[State, State]:
    """Return the adjoint of x_t, given that of x_s, and the prediction at x_t."""
    size = _size(adjoint)
    given = tree_map(lambda leaf: leaf / expand_as(size, leaf), adjoint)
    with torch.enable_grad():
        x = tree_map(lambda leaf: leaf.detach().requires_grad_(), x_t)
        prediction = denoiser(x, t, condition)
        mean = process.step(prediction, x, coefficients).mean
        pulls = iter(torch.autograd.grad(leaves(mean), leaves(x), leaves(given)))
    pulled = tree_map(lambda leaf: next(pulls) * expand_as(size, leaf), x_t)
    return pulled, detach(prediction)


def _size(adjoint: State) -> Tensor:
    """Return the power of two next above each sample's numbers, [B].

    Divided by it they keep all their digits, and in float16 they do not vanish on their way.
    """
    largest = flatten(adjoint).abs().amax(dim=1)
    return torch.ldexp(torch.ones_like(largest), largest.frexp().exponent)


@dataclass(frozen=True)
class Match:
    """How far the tuned model is from what the adjoint asks for, and how far the pretrained one is.

    Both are averaged over the free dimensions of a state.

    Attributes:
        loss: [B], the loss of the regression.
        start: [B], the same without any shift. What a shift can explain of it is learned, the rest
            is chance.
    """

    loss: Tensor
    start: Tensor


def match(
    process: Process,
    steps: Steps,
    numbers: Tensor,
    prediction: State,
    base: State,
    x_t: State,
    adjoint: State,
    near: Tensor | None,
) -> Match:
    """Compare the tuned model's shift with what the adjoint asks for.

    Args:
        process: Of Gaussian fields.
        steps: T of them.
        numbers: At which of them each sample is, int64 [B] on the device.
        prediction: The tuned model's at x_t, [B, ...].
        base: The pretrained model's.
        x_t: Where both predict.
        adjoint: As `adjoints` gives it.
        near: `near_noise`.
    """
    own = pulled = steps.t[numbers]
    after = numbers
    if near is not None:  # the first step then has the weight of the second
        pulled = near.to(own).where(numbers == 0, own)
        after = numbers.clamp(min=1)
    before = steps.t[(after - 1).clamp(min=0)]
    levels, led = torch.stack([own, pulled, steps.t[after], before]), after > 0
    residual, start, size = _squares(process, levels, led, prediction, base, x_t, adjoint)
    per_dimension = 0.5 / size.clamp(min=1).to(residual)
    return Match(per_dimension * residual, per_dimension * start)


def _squares(
    process: Process,
    levels: Tensor,
    led: Tensor,
    prediction: State,
    base: State,
    x_t: State,
    adjoint: State,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared residuals, what they are without a shift, and free dimensions, each [B].

    Args:
        process: As of `match`, like the states.
        levels: Of x_t, of the adjoint, and two from whose signal the weight is, [4, B].
        led: Whether the last of them counts, bool [B].
        prediction: The tuned model's.
        base: The pretrained model's.
        x_t: Where both predict.
        adjoint: Of a state on the walk.
    """
    if isinstance(process, ProductProcess):
        states = [fields_of(state) for state in (prediction, base, x_t, adjoint)]
        parts = [
            _squares(process.field(name), levels, led, *(state[name] for state in states))
            for name in process.names
        ]
        residual, start, size = (torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True))
        return residual, start, size
    assert isinstance(process, GaussianProcess)
    x, pull, t = tensor_of(x_t), tensor_of(adjoint), levels[0]
    shift = process.denoised(prediction, x, t) - process.denoised(base, x, t)
    alpha, sigma = process.schedule.levels(levels[1:])
    growth, growth_before = (alpha[1:] / sigma[1:]).square()
    rate = (growth - growth_before * led).clamp(min=0).sqrt()
    if process.subspace is not None:  # noise, and so a shift, lies in there alone
        pull = process.subspace.project(pull, x)
    pull = expand_as(rate * sigma[0].square() / alpha[0], x) * pull
    return _total(expand_as(rate, x) * shift + pull), _total(pull), process.num_dimensions(x)


def _total(values: Tensor) -> Tensor:
    return values.square().flatten(start_dim=1).sum(dim=1)


def drawn_steps(num_steps: int, num_drawn: int, noise: Generators, size: int) -> Tensor:
    """Draw different steps for each sample, half of them from the last quarter, int64 [size, K].

    A coin decides for the odd one of an odd K.

    Args:
        num_steps: T.
        num_drawn: K, at most T.
        noise: One generator per sample, or None for torch's global one.
        size: Number of samples.
    """
    late = -(-num_steps // 4)
    half, odd = divmod(num_drawn, 2)
    drawn = []
    for i in range(size):
        own = None if noise is None else noise[i]
        coin = int(torch.randint(2, (1,), generator=own)) if odd else 0
        num_late = min(late, max(half + coin, num_drawn - (num_steps - late)))
        early = torch.randperm(num_steps - late, generator=own)[: num_drawn - num_late]
        last = num_steps - late + torch.randperm(late, generator=own)[:num_late]
        drawn.append(torch.cat([early, last]).sort().values)
    return torch.stack(drawn) if drawn else torch.empty(0, num_drawn, dtype=torch.int64)
