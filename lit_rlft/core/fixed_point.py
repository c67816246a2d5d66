r"""Fixed points u = g(u), for a batch of samples each of which stops by itself.

Plain iteration converges where g contracts, :math:`|g(u) - g(w)| \le q\,|u - w|` with q < 1, and
gains a factor q each time. Anderson's acceleration looks back on the last few iterates: with
:math:`f_i = g(u_i) - u_i` it goes on from

.. math::
    u_{k+1} = g(u_k) - \sum_j \gamma_j\, (g(u_{j+1}) - g(u_j)), \qquad
    \gamma = \operatorname{argmin} \| f_k - \sum_j \gamma_j\, (f_{j+1} - f_j) \|,

which for linear g is GMRES and does not need q < 1.

References:
    Anderson acceleration for fixed-point iterations (Walker & Ni, 2011, SIAM J. Numer. Anal. 49)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_rlft.core.checks import at_least
from lit_rlft.core.state import State, batch_size, flatten, unflatten

__all__ = ["FixedPoint", "Solution"]

_RIDGE = 1e-10
"""Relative to the Gram matrix: where differences are nearly parallel, their weights stay small."""


@dataclass(frozen=True)
class Solution:
    """Where the iterations of a batch ended.

    Attributes:
        state: [B, ...]; of each sample the iterate u with the smallest residual. Plain iteration,
            `memory` 0, gives that iterate's g(u): nearer where g contracts, farther where not.
        residuals: Largest entry of |g(u) - u|, [B]; infinite where g is never finite.
        iterations: Evaluations of g, int64 [B].
    """

    state: State
    residuals: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class FixedPoint:
    """How to search for a fixed point.

    Attributes:
        tolerance: A sample is done when no entry of g(u) differs from u by more than this.
        max_iterations: Evaluations of g, at most.
        memory: Iterates that Anderson's acceleration looks back on; 0 is plain iteration.
    """

    tolerance: float = 1e-5
    max_iterations: int = 100
    memory: int = 5

    def __post_init__(self) -> None:
        at_least(0, self, "tolerance", "memory")
        at_least(1, self, "max_iterations")

    def solve(self, function: Callable[[State, Tensor], State], start: State) -> Solution:
        """Iterate from `start` until every sample is done or out of iterations.

        Args:
            function: g; called with the states of the samples that are not done, and with their
                numbers [b] in the batch.
            start: [B, ...], floating-point.
        """
        u, size = flatten(start), batch_size(start)
        best, active = u.clone(), torch.arange(size, device=u.device)
        residuals = u.new_full((size,), torch.inf)
        iterations = torch.zeros_like(active)
        past: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.max_iterations):
            g = flatten(function(unflatten(u, start), active))
            f = g - u
            iterations[active] += 1
            now = f.abs().amax(dim=1).nan_to_num(nan=torch.inf)
            better = now < residuals[active]
            kept = u if self.memory else g
            best[active[better]], residuals[active[better]] = kept[better], now[better]
            going = (now > self.tolerance) & now.isfinite()
            if not going.any():
                break
            past = [(a[going], b[going]) for a, b in (*past, (f, g))][-1 - self.memory :]
            active, u = active[going], _next(past)
        return Solution(unflatten(best, start), residuals, iterations)


def _next(past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the next iterate [b, d] from pairs (f, g) [b, d], the newest last."""
    f, g = past[-1]
    if len(past) == 1:
        return g
    of_f, of_g = (
        torch.stack([after[i] - before[i] for before, after in pairwise(past)], 1) for i in (0, 1)
    )
    wide = of_f.double()
    gram = wide @ wide.mT
    scale = gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=torch.finfo(gram.dtype).tiny)
    ridge = _RIDGE * scale[:, None, None] * torch.eye(len(past) - 1, dtype=gram.dtype).to(gram)
    weights = torch.linalg.solve(gram + ridge, wide @ f.double().unsqueeze(-1))
    return g - (weights.to(g.dtype) * of_g).sum(dim=1)
