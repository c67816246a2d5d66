"""The relay of tuned model and reference: who runs which of the sampler's steps.

The reference may run the last steps, which finish details (P-GRAFT), or the first ones, which
decide on the composition and keep its diversity (the combined generation of ImageReFL). The tuned
model runs those between.

References:
    P-GRAFT (2025), https://arxiv.org/abs/2510.02692
    ImageReFL (Sorokin et al., 2025), https://arxiv.org/abs/2505.22569
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lit_rlft.core.checks import below_one, require
from lit_rlft.core.process import Process
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.sampling import Denoiser, steps_of_share
from lit_rlft.core.state import State, leaves
from lit_rlft.core.watched import Watched
from lit_rlft.loop.route import Leg, Route

__all__ = ["Relay"]

_HALVINGS = 60
"""Of the interval in which an edge lies: below float64's resolution."""


@dataclass(frozen=True)
class Relay:
    """Shares of the sampler's steps that the reference runs; the tuned model runs the others.

    Attributes:
        start: Share of the first steps, in [0, 1).
        cut: Share of the last steps, in [0, 1).
    """

    start: float = 0.0
    cut: float = 0.0

    def steps(self, num_steps: int) -> tuple[int, int]:
        """Return the first step that the tuned model runs and the one after its last, from 0."""
        first, after = (steps_of_share(share, num_steps) for share in (self.start, self.cut))
        return first, num_steps - after

    def check(self, owner: object, num_steps: int) -> None:
        """Raise BadArgument of `owner` unless shares leave the tuned model a step."""
        below_one(owner, start=self.start, cut=self.cut)
        first, last = self.steps(num_steps)
        steps = f"at least one of the sampler's {num_steps} steps"
        name = "start" if last >= 1 and self.start else "cut"
        rule = f"smaller, to leave {steps} to the tuned model, got {getattr(self, name)}"
        require(first < last, owner, name, rule)

    def of(self, route: Route, reference: Denoiser) -> Route:
        """Return a route on which the reference runs its shares of the steps.

        Args:
            route: One that the tuned model runs all of.
            reference: The reference's denoiser.

        Raises:
            BadArgument: The shares leave the tuned model no step.
        """
        self.check(self, route.num_steps)
        first, last = self.steps(route.num_steps)
        tuned = next(leg.denoiser for leg in route.legs if leg.tuned)
        legs = [
            Leg(reference, first, tuned=False),
            Leg(tuned, last - first, tuned=True),
            Leg(reference, route.num_steps - last, tuned=False),
        ]
        return replace(route, legs=[leg for leg in legs if leg.num_steps])

    def levels(self, process: Process, num_steps: int) -> tuple[float, float]:
        """Return the levels between which the tuned model runs, the lower one first."""
        first, last = self.steps(num_steps)
        if (first, last) == (0, num_steps):  # asked in each update: the grid need not be laid
            return 0.0, 1.0
        times = process.times(num_steps)
        low = float(process.ends(num_steps)[last - 1]) if last < num_steps else 0.0
        return low, float(times[first]) if first else 1.0

    def random_times(
        self, process: Process, num_steps: int, x: State, noise: Generators = None
    ) -> Tensor:
        """Draw a training level for each row of a state, [B], with its own generator."""
        like = leaves(x)[0]
        uniform = rand_like(torch.empty(len(like), device=like.device), noise)
        return self.draw_times(process, num_steps, uniform)

    def draw_times(self, process: Process, num_steps: int, uniform: Tensor) -> Tensor:
        """Map uniform numbers to training levels at which the tuned model runs.

        Their distribution is the process's own (`Process.draw_times`), given that they lie there.

        Args:
            process: The noising process.
            num_steps: The sampler's steps.
            uniform: [B] in [0, 1).
        """
        low, high = self.levels(process, num_steps)
        if high >= 1:
            return process.draw_times(uniform, low=low)
        first, last = _preimage(process, low, high, Watched.num_changes)
        return process.draw_times(first + (last - first) * uniform.double(), low=low)


@lru_cache(maxsize=32)
def _preimage(process: Process, low: float, high: float, num_changes: int) -> tuple[float, float]:
    """Return the interval of uniform numbers whose level is at most `high`.

    Processes map uniform numbers to levels monotonically, some of them downwards. The number of
    changes (`Watched`) has it found again for a process that was changed.
    """

    def below(uniform: float) -> bool:
        return (
            float(process.draw_times(torch.tensor([uniform], dtype=torch.float64), low=low)) <= high
        )

    begin, end = 0.0, 1.0 - 2.0**-53
    falling = not below(begin)
    for _ in range(_HALVINGS):
        middle = (begin + end) / 2
        if below(middle) == falling:
            end = middle
        else:
            begin = middle
    return (end, 1.0 - 2.0**-53) if falling else (0.0, begin)
