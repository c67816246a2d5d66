r"""Acceptance rules of generalised rejection sampling.

Per condition, M candidates with rewards R_1..R_M get accept bits C_1..C_M. A rule with
:math:`P(C_i = 1 \mid x^{(1:M)}) = A(R_i, \hat F_R, x^{(i)})`, non-decreasing in the reward, makes
the accepted distribution :math:`p_{acc}(x) \propto p_{ref}(x)\, a(x)` with
:math:`a(x) = P(C_1 = 1 \mid x^{(1)} = x)`: the distribution that maximises a
reshaped reward under a KL penalty to the reference. F below is the CDF of the reward under the
reference.

References:
    P-GRAFT (2025), https://arxiv.org/abs/2510.02692, section on generalised rejection sampling.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import BadArgument, UsageError, at_least, finite, positive
from lit_rlft.core.randomness import Generators, rand_like
from lit_rlft.core.settings import Recorded
from lit_rlft.core.state import described

__all__ = [
    "BestOfM",
    "Classical",
    "Preference",
    "RandomK",
    "RewardWeighted",
    "Selection",
    "Threshold",
    "TopK",
    "Unique",
]

Keys = Sequence[Sequence[Hashable]]
"""Equivalence classes of the M candidates of each of G conditions, e.g. canonical SMILES."""


class Selection(Recorded, ABC):
    """A rule that accepts some of the candidates of each condition.

    Attributes:
        needs_keys: Whether the rule asks for equivalence classes.
    """

    needs_keys = False

    def check(self, num_candidates: int) -> None:
        """Raise ValueError where the rule cannot work with this many candidates."""

    def selects(self, num_candidates: int) -> bool:
        """Return whether rewards decide anything among this many candidates."""
        return True

    @abstractmethod
    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        """Return accept bits, bool [G, M], for rewards [G, M].

        Args:
            rewards: [G, M], a row per condition.
            keys: Equivalence classes of the candidates, for rules that de-duplicate.
            noise: One generator per condition for the rule's own randomness, or None for torch's.
        """

    def weights(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        """Return how much each candidate counts, [G, M]: 1 where it is accepted, or else 0."""
        accepted: Any = self(rewards, keys, noise)
        if not isinstance(accepted, Tensor) or accepted.dtype != torch.bool:
            raise UsageError(
                f"{type(self).__name__} returned {described(accepted)}; a selection returns a bool "
                "tensor, [G, M], as rewards > 0 is; one with weights overrides `weights`"
            )
        return accepted.float()


class TopK(Selection):
    r"""Accept the K best of the M candidates of each condition, ties broken at random.

    :math:`a(x) = \sum_{k<K} \binom{M-1}{k} (1-F)^k F^{M-1-k}`, so E[a] = K / M; invariant to
    monotone rescaling of the reward.

    Args:
        k: Number of candidates accepted per condition.
    """

    def __init__(self, k: int = 1) -> None:
        at_least(1, self, k=k)
        self.k = k

    def check(self, num_candidates: int) -> None:
        if num_candidates < self.k:
            problem = f"is {self.k}, more than the {num_candidates} candidates of a condition"
            raise BadArgument(self, "k", f"{problem}; lower it or raise num_candidates")

    def selects(self, num_candidates: int) -> bool:
        return num_candidates > self.k

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        self.check(rewards.shape[1])
        # Ties broken at random: with discrete rewards the closed form needs it.
        shuffle = rand_like(rewards, noise).argsort(dim=1)
        order = rewards.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
        best = shuffle.gather(1, order)[:, : self.k]
        return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, best, True)


class BestOfM(TopK):
    """Accept the best candidate of each condition.

    a(x) = F^(M-1) and KL(p_acc || p_ref) = log M - (M-1)/M.
    """

    def __init__(self) -> None:
        super().__init__(k=1)


class RandomK(TopK):
    """Accept K candidates at random for any reward: the control that must gain nothing."""

    def selects(self, num_candidates: int) -> bool:
        return True  # it is to select nothing

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        return super().__call__(torch.zeros_like(rewards), keys, noise)


class Threshold(Selection):
    """Accept every reward of at least `minimum`; on a binary reward this conditions on success.

    Args:
        minimum: Smallest accepted reward.
    """

    def __init__(self, minimum: float = 1.0) -> None:
        finite(self, minimum=minimum)
        self.minimum = minimum

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        return rewards >= self.minimum


class Classical(Selection):
    """Accept with probability min(1, exp((r - r_max) / alpha)): classical rejection sampling.

    Args:
        alpha: Temperature of the target p_ref exp(r / alpha).
        r_max: Upper bound of the reward, log B = r_max / alpha; above it the probability saturates.
    """

    def __init__(self, alpha: float = 1.0, r_max: float = 1.0) -> None:
        positive(self, alpha=alpha)
        finite(self, r_max=r_max)
        self.alpha, self.r_max = alpha, r_max

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        probability = ((rewards - self.r_max) / self.alpha).clamp(max=0).exp()
        return rand_like(rewards, noise) < probability


class RewardWeighted(Selection):
    r"""Accept every candidate, weighted by exp(r / beta) over its condition's mean of that.

    Reward-weighted regression (RWR). As M grows the weighted distribution becomes
    :math:`p_{ref} \, e^{r / \beta} / Z`: it maximises the reward less beta times the KL to the
    reference. With few candidates Z is estimated from few.

    Args:
        beta: Temperature of the target, in units of the reward.

    References:
        Aligning Text-to-Image Models using Human Feedback (Lee et al., 2023),
        https://arxiv.org/abs/2302.12192
    """

    def __init__(self, beta: float = 1.0) -> None:
        positive(self, beta=beta)
        self.beta = beta

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        return rewards > -torch.inf

    def weights(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        """Return exp(r / beta) over its mean, float32 [G, M]; 0 only where the reward is -inf.

        A candidate of weight 0 would not be trained on, and the others' mean loss be larger.
        """
        known = self(rewards)
        highest = rewards.amax(dim=1, keepdim=True)
        apart = ((rewards - highest).double() / self.beta).where(known, -torch.inf).exp()
        mean = apart.sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
        smallest = torch.finfo(torch.float32).tiny
        return (apart / mean).clamp(min=smallest).where(known, 0).float()


class Preference(Selection):
    """Accept one of each pair of candidates, the better one more often (Bradley–Terry).

    a(x) = E_Y sigmoid(r(x) - r(Y)). Candidates are paired in order (1 with 2, 3 with 4, ...); one
    of each pair is accepted.
    """

    def check(self, num_candidates: int) -> None:
        if num_candidates % 2:
            raise UsageError(
                f"num_candidates ({num_candidates}) must be even for Preference, which pairs them"
            )

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        self.check(rewards.shape[1])
        pairs = rewards.reshape(len(rewards), -1, 2)
        margin = pairs[..., 0] - pairs[..., 1]
        first = rand_like(margin, noise) < margin.sigmoid()
        return torch.stack([first, ~first], dim=-1).flatten(start_dim=1)


class Unique(Selection):
    r"""Keep one accepted candidate per equivalence class, chosen at random.

    With a binary reward: :math:`a(x) = 1[r=1]\,(1-(1-q)^M)/(Mq)` for q = p_ref([x]), which keeps
    the diversity that rejection alone would narrow.

    Args:
        inner: The rule whose accepted candidates are de-duplicated.
    """

    needs_keys = True

    def __init__(self, inner: Selection) -> None:
        self.inner = inner

    def check(self, num_candidates: int) -> None:
        self.inner.check(num_candidates)

    def __call__(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        return self.weights(rewards, keys, noise) > 0

    def weights(
        self, rewards: Tensor, keys: Keys | None = None, noise: Generators = None
    ) -> Tensor:
        """Return the inner rule's weights, 0 where a class has another candidate."""
        if keys is None:
            raise UsageError("Unique needs keys; the pipeline gives none, use the inner rule alone")
        weights = self.inner.weights(rewards, keys, noise)
        weights = weights * ~rewards.isneginf()  # a twin that could not be scored stands for none
        for group, names in enumerate(keys):
            seen: set[Hashable] = set()
            order = torch.randperm(len(names), generator=noise[group] if noise else None)
            for candidate in order.tolist():
                if weights[group, candidate] and names[candidate] in seen:
                    weights[group, candidate] = 0
                elif weights[group, candidate]:
                    seen.add(names[candidate])
        return weights
