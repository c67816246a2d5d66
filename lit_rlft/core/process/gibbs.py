r"""Interleaved Gibbs diffusion: the elements of a state are noised in turn, and denoised in turn.

A state has fields, and a field has elements: the slots of a layout's boxes, the atoms' types. Time
t in [0, 1] covers R rounds. A round visits every element once, field after field and slot after
slot. A visit takes its element, and no other, from level :math:`\tau` to :math:`\tau + 1/R`: a
class is replaced with the level's probability, numbers take a Gaussian step. An element visited in
the part [a, b] of each round has the clock

.. math::
    \tau(t) = \frac1R \Big(k + \mathrm{clip}\Big(\frac{t R - k - a}{b - a}, 0, 1\Big)\Big), \qquad
    k = \min(\lfloor t R \rfloor, R - 1).

Noise of different elements is independent: :math:`q(x_t | x_0)` is the product over elements of
their own process's :math:`q` at their levels. A reverse step from t to s changes the elements whose
clock moves, in the opposite order, given all others at the level that they have then. A step that
moves one class is the exact posterior under an exact denoiser. Only a step that moves several
elements draws them as if they were independent, which simultaneous noise does in every step. A step
that moves numbers has the error of its Gaussian sampler, which vanishes with the number of steps in
a visit.

What the paper leaves open to us, or what we chose otherwise:

- Masks hide classes, or uniform noise replaces them, as their own process says. The paper replaces
  them; our mixed models have masks.
- Levels rise by equal parts in each round, before `shift`.
- Visits of one field take equally long. Fields share a round equally unless `shares` says
  otherwise: a larger share gives each visit more steps, as the paper gives numbers.
- The grid is even. With R times (elements of a round) steps each step is one visit, if shares are
  in proportion to numbers of elements. With fewer steps elements move together.
- A field may be one block, which moves as a whole. Coordinates around a common centre have to.
- The denoiser predicts all elements in every call. It is trained on all that carry noise, not on
  the visited one alone, and with their own processes' weights; the minimiser is the same.
- Training times are those of the first field in sorted order, as for a product.
- Empty slots of padded classes take no time.
- Means of log-probabilities and divergences run over the numbers that a step moves.
- Left out are the paper's re-noising of finished samples (ReDeNoise), and its conditioning by a
  doubled state: pipelines here fix what is given.

References:
    Interleaved Gibbs Diffusion (Anil et al., 2025), https://arxiv.org/abs/2502.13450
    GRAFT and P-GRAFT (2025), which tune layouts and molecules on it,
    https://arxiv.org/abs/2510.02692
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError, at_least, positive
from lit_rlft.core.distribution import Categorical, Distribution, Gaussian, Product, Reduction
from lit_rlft.core.process.base import Process, Step
from lit_rlft.core.process.categorical import MaskedProcess
from lit_rlft.core.process.gaussian import GaussianProcess
from lit_rlft.core.process.product import ProductProcess
from lit_rlft.core.process.uniform import UniformProcess
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import State, fields_of, tensor_of

__all__ = ["GibbsProcess"]

_SNAP = 1e-6
"""Of a visit: a step of a grid that ends so near its end ends there."""


class GibbsProcess(ProductProcess):
    """Noising of a dict state element by element; see the module for its clocks and choices.

    Args:
        fields: The process of each field: Gaussian, masked or uniform.
        elements: L of the fields [B, L, ...] whose elements are visited one by one; the others are
            blocks.
        rounds: R, how often each element is visited.
        order: The order of the fields in a round of noising; sampling goes backwards through it.
            None is the sorted order.
        shares: How much of a round each field takes, in proportion; 1 where absent.
        shift: Levels are mapped by tau -> shift tau / (1 + (shift - 1) tau): below 1 more of the
            rounds lie near the data.
        weights: The weight of each field's loss; 1 where absent.

    Raises:
        UsageError: A name is no field, or a field cannot be split into elements.
    """

    one_way = "its elements are denoised in turn; use a pipeline with a continuous state"

    def __init__(
        self,
        fields: Mapping[str, Process],
        elements: Mapping[str, int],
        rounds: int,
        *,
        order: Sequence[str] | None = None,
        shares: Mapping[str, float] | None = None,
        shift: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(fields, weights)
        at_least(1, self, rounds=rounds, elements=elements)
        positive(self, shares=shares, shift=shift)
        order, shares = list(order or self.names), dict(shares or {})
        unknown = {*elements, *shares} - {*self.names}
        if unknown:
            raise UsageError(f"elements or shares name {sorted(unknown)}; fields: {self.names}")
        if sorted(order) != self.names:
            raise UsageError(f"order must name each of {self.names} once, got {order}")
        for name in self.names:
            _check(name, self.field(name), name in elements)
        self.elements, self.rounds, self.shift = dict(elements), rounds, shift
        self._parts = _parts(order, shares)
        self.differentiable = self.invertible = self.has_flow_steps = False

    def levels(self, x_t: State, t: Tensor) -> dict[str, Tensor]:
        """Return the level that each element has at time t, [B, L]; of a block [B].

        Args:
            x_t: Shows which slots are empty.
            t: [B].
        """
        x = fields_of(x_t)
        return {name: self._level(name, t, self._places(name, x[name])) for name in self.names}

    def prior(self, blank: State) -> Product:
        x = fields_of(blank)
        for name, num in self.elements.items():
            if x[name].shape[1] != num:
                raise UsageError(
                    f"{type(self).__name__}: field {name!r} has {x[name].shape[1]} elements, "
                    f"elements says {num}"
                )
        return super().prior(blank)

    def coefficients(self, t: Tensor, s: Tensor, eta: float) -> dict[str, Tensor]:
        """Return what a step takes from its levels, of each field.

        Of elements [B, L, 1 + C], of a block [B, 1 + C]: whether it moves, and its own process's.
        Clocks of padded classes depend on the state: of these t and s, [B, 2].
        """
        own = {}
        for name in self.names:
            if self._is_padded(name):
                own[name] = torch.stack([t, s], dim=-1)
                continue
            span = self._span(name, s, t, self._places(name))
            columns = tensor_of(self.field(name).coefficients(span.t, span.s, eta))
            own[name] = torch.cat([span.moves.to(columns).unsqueeze(-1), columns], dim=-1)
        return own

    def noisy(self, coefficients: State) -> Tensor:
        return Process.noisy(self, coefficients)

    def stepper(self, x_1: State) -> Step:
        return self.step  # its fields are given elements at a time, not whole states

    def step(self, prediction: State, x_t: State, coefficients: State) -> Product:
        p, x, own = fields_of(prediction), fields_of(x_t), fields_of(coefficients)
        return Product({name: self._step(name, p[name], x[name], own[name]) for name in self.names})

    def denoised(self, prediction: State, x_t: State, t: Tensor) -> State:
        p, x, levels = fields_of(prediction), fields_of(x_t), self.levels(x_t, t)
        denoised = {}
        for name in self.names:
            x_0 = tensor_of(self.field(name).denoised(p[name], x[name], levels[name]))
            denoised[name] = x_0.where(_against(x_0, levels[name] > 0), x[name])
        return denoised

    def noised(self, x_s: State, s: Tensor, t: Tensor, noise: Generators = None) -> State:
        x, noised = fields_of(x_s), {}
        for name in self.names:
            span = self._span(name, s, t, self._places(name, x[name]))
            moved = tensor_of(self.field(name).noised(x[name], span.s, span.t, noise))
            noised[name] = moved.where(_against(moved, span.moves), x[name])
        return noised

    def loss(self, prediction: State, x_s: State, x_t: State, s: Tensor, t: Tensor) -> Tensor:
        """Return the fields' weighted losses, each the mean over elements of their own, [B].

        An element that carries no more noise at t than at s counts 0.
        """
        p, source, x = fields_of(prediction), fields_of(x_s), fields_of(x_t)
        total = torch.zeros(len(t), device=t.device)
        for name in self.names:
            parts = p[name], source[name], x[name]
            total = total + self.weights[name] * self._loss(name, *parts, s, t)
        return total

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def ends(self, num_steps: int) -> Tensor:
        return self.times(num_steps)[1:]

    def _step(self, name: str, p: Tensor, x: Tensor, own: Tensor) -> Distribution:
        process, by_elements, full = self.field(name), name in self.elements, None
        if self._is_padded(name):
            t, s = own.expand(len(x), 2).unbind(dim=-1)
            places = self._places(name, x)
            span, full = self._span(name, s, t, places), places.full
            moves, columns = span.moves, tensor_of(process.coefficients(span.t, span.s, 0.0))
        else:
            own = own.expand(len(x), -1, -1) if by_elements else own
            moves, columns = own[..., 0] > 0, own[..., 1:]
        law = process.step(p, x, columns)
        if isinstance(law, Gaussian):
            moving = _against(x, moves)
            loc, std = law.loc.where(moving, x), law.std.where(moving, 0)
            return _Elements(loc, std) if by_elements else law.like(loc, std)
        assert isinstance(law, Categorical)
        log_probs = law.log_probs
        here = x.unsqueeze(-1) == torch.arange(log_probs.shape[-1], device=x.device)
        certain = torch.full((), -torch.inf, device=x.device).masked_fill(here, 0)
        log_probs = log_probs.where(_against(here, moves), certain)
        if not by_elements:
            return Categorical(log_probs, law.num_dimensions)
        return Categorical(log_probs, (moves if full is None else moves & full).sum(dim=1))

    def _loss(self, name: str, p: Tensor, x_s: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        process, places = self.field(name), self._places(name, x_s)
        span = self._span(name, s, t, places)
        if name not in self.elements:
            return process.loss(p, x_s, x_t, span.s, span.t).where(span.moves, 0)
        one_by_one = (part.flatten(0, 1) for part in (p, x_s, x_t, span.s, span.t))
        each = process.loss(*one_by_one).view(x_s.shape[:2]).where(span.moves, 0)
        return each.sum(dim=1) / places.num.clamp(min=1)

    def _is_padded(self, name: str) -> bool:
        """Return whether samples have different numbers of elements of a field."""
        process = self.field(name)
        return name in self.elements and isinstance(process, MaskedProcess) and process.padded

    def _places(self, name: str, x: Tensor | None = None) -> "_Places":
        """Return where the elements of a field stand in its part of a round."""
        if name not in self.elements:
            return _Places(torch.zeros(()), torch.ones(()), torch.ones((), dtype=torch.bool))
        if not self._is_padded(name):
            num = self.elements[name]
            return _Places(torch.arange(num), torch.tensor(num), torch.ones(num, dtype=torch.bool))
        process = self.field(name)
        assert x is not None and isinstance(process, MaskedProcess)
        full = x != process.empty
        return _Places((full.cumsum(dim=1) - 1).clamp(min=0), full.sum(dim=1), full)

    def _level(self, name: str, t: Tensor, places: "_Places") -> Tensor:
        """Return the levels at times t [B], [B, L] or [B]."""
        start, end = self._parts[name]
        visit = (end - start) / places.num.clamp(min=1).double()
        turns = t.double() * self.rounds
        done = turns.floor().clamp(max=self.rounds - 1)
        within = turns - done - start
        if name in self.elements:
            done, within = done.unsqueeze(1), within.unsqueeze(1)
            visit = visit.unsqueeze(-1)
        within = within / visit.to(t.device) - places.place.to(t.device)
        within = within.where((within - within.round()).abs() > _SNAP, within.round())
        level = (done + within.clamp(0, 1)) / self.rounds
        return self.shift * level / (1 + (self.shift - 1) * level)

    def _span(self, name: str, s: Tensor, t: Tensor, places: "_Places") -> "_Span":
        """Return the levels between s and t; those of what does not move are harmless ones."""
        low, high = (self._level(name, time, places) for time in (s, t))
        moves = high > low
        return _Span(low.where(moves, 0.0), high.where(moves, 1.0), moves)


class _Places(NamedTuple):
    """Where elements stand in their field's part of a round.

    `place` counts visits before an element's, [L] or [B, L]; `num` is how many there are, a number
    or [B]; `full` tells which elements exist.
    """

    place: Tensor
    num: Tensor
    full: Tensor


class _Span(NamedTuple):
    """Levels of elements, [B, L] or [B], at the two ends of a step, and whether they move."""

    s: Tensor
    t: Tensor
    moves: Tensor


class _Elements(Gaussian):
    """Independent normals, of which those with a std are counted: a mean runs over them."""

    @property
    def num_dimensions(self) -> Tensor:
        random = (self.std > 0).expand_as(self.loc)
        return random.flatten(start_dim=1).sum(dim=1).double()

    def like(self, loc: Tensor, std: Tensor) -> "_Elements":
        return _Elements(loc, std)

    def entropy(self, reduction: Reduction = "sum") -> Tensor:
        return self._shared(super().entropy(), reduction)

    def log_prob(self, state: State, reduction: Reduction = "sum") -> Tensor:
        return self._shared(super().log_prob(state), reduction)

    def kl(self, other: Distribution, reduction: Reduction = "sum") -> Tensor:
        return self._shared(super().kl(other), reduction)

    def _shared(self, total: Tensor, reduction: Reduction) -> Tensor:
        return total if reduction == "sum" else total / self.num_dimensions.clamp(min=1).to(total)


def _against(like: Tensor, values: Tensor) -> Tensor:
    """Return values of samples or elements so that they broadcast against a field."""
    return values.reshape(*values.shape, *(1,) * (like.dim() - values.dim()))


def _parts(order: Sequence[str], shares: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the part of a round in which each field is visited."""
    total, start, parts = sum(shares.get(name, 1.0) for name in order), 0.0, {}
    for name in order:
        end = start + shares.get(name, 1.0) / total
        parts[name] = (start, end)
        start = end
    return parts


def _check(name: str, process: Process, by_elements: bool) -> None:
    kinds = (GaussianProcess, MaskedProcess, UniformProcess)
    if not isinstance(process, kinds):
        raise UsageError(
            f"field {name!r} has a {type(process).__name__}; fields are Gaussian, masked or uniform"
        )
    if by_elements and isinstance(process, GaussianProcess) and process.subspace is not None:
        raise UsageError(
            f"the elements of field {name!r} depend on each other through its subspace; leave it "
            "out of elements, to move it as a block"
        )
