"""How soon training finds good molecules: the area under the best over reward calls.

References:
    Sample Efficiency Matters: A Benchmark for Practical Molecular Optimization (Gao et al., 2022),
    https://arxiv.org/abs/2206.12411
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.molecule.chemistry.batch import chemistry_of
from domains.molecule.samples import check_molecules
from lit_rlft.core.checks import at_least, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.training_metric import TrainingMetric
from lit_rlft.kit.distinct import text_number
from lit_rlft.kit.top_curve import area_under_top

__all__ = ["TopOverCalls"]


class TopOverCalls(TrainingMetric):
    """The benchmark PMO's area under the curve of the best k molecules over oracle calls.

    "auc_top_<k>" for every k, in the reward's unit, and "different_molecules", the calls so far: of
    the whole training, as if it ended now. Calls are counted as PMO's oracle does: molecules that
    are valid and in one part, each graph (canonical SMILES) once, when it is first scored. The
    reward itself is called for repeats and invalid ones too (`cost/reward_calls`). PMO's rewards
    are in [0, 1]; the curve starts at 0. Within a round the order is random and does not depend on
    rewards; a graph that the round scored several times, at several geometries, has the lowest.

    Args:
        k: How many of the best ones; of fewer molecules all.
        budget: Calls that the area is of. Later molecules do not count; after a training that ends
            earlier the curve stays where it is.
        every: Calls between two points of the curve.

    Raises:
        BadArgument: `k` is empty, or a number is below 1.
    """

    def __init__(
        self, k: Sequence[int] = (1, 10, 100), budget: int = 10_000, every: int = 100
    ) -> None:
        super().__init__()
        require(len(k) > 0, self, "k", "at least one number")
        at_least(1, self, k=tuple(k), budget=budget, every=every)
        self.k, self.budget, self.every = tuple(k), budget, every
        self._identities = torch.zeros(0, dtype=torch.int64)
        self._scores = torch.zeros(0, dtype=torch.float64)

    def features(self, samples: Any, condition: Condition, rewards: Tensor) -> dict[str, Tensor]:
        """Return the numbers of canonical SMILES, int64 [n], and the scores, float64 [n]."""
        chemistry = chemistry_of(check_molecules(samples, condition))
        scores = rewards.double().cpu()
        rows = torch.from_numpy(chemistry.connected) & scores.isfinite()
        numbers = [text_number(smiles or "") for smiles in chemistry.smiles]
        identities = torch.tensor(numbers, dtype=torch.int64)
        return {"identity": identities[rows], "score": scores[rows]}

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Append the round's molecules that are new, in the order of their numbers."""
        identities, scores = features["identity"].numpy(), features["score"].numpy()
        order = np.lexsort((scores, identities))
        kinds, firsts = np.unique(identities[order], return_index=True)
        rows = order[firsts][~np.isin(kinds, self._identities.numpy())]
        self._identities = torch.cat([self._identities, features["identity"][rows]])[: self.budget]
        self._scores = torch.cat([self._scores, features["score"][rows]])[: self.budget]

    def values(self) -> dict[str, float]:
        """Return "auc_top_<k>" for every k, and "different_molecules"."""
        if not len(self._scores):
            return {}
        areas = {
            f"auc_top_{k}": area_under_top(self._scores, k, self.budget, self.every) for k in self.k
        }
        return areas | {"different_molecules": float(len(self._scores))}

    def history(self) -> dict[str, Tensor]:
        """Return the molecules' numbers and scores, [n] each, in the order of the calls."""
        return {"identity": self._identities, "score": self._scores}

    def restore(self, history: Mapping[str, Tensor]) -> None:
        self._identities, self._scores = history["identity"], history["score"]
