"""The best molecules of an evaluation and how different they are, as optimisers are compared.

References:
    Sample Efficiency Matters: A Benchmark for Practical Molecular Optimization (Gao et al., 2022;
    top 1, 10 and 100, diversity of the top 100), https://arxiv.org/abs/2206.12411
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from torch import Tensor

from domains.molecule.chemistry.batch import chemistry_of
from domains.molecule.samples import check_molecules
from lit_rlft.core.checks import at_least, require
from lit_rlft.core.guard import LARGE_FALL, Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward, SetMetric, rewards_of
from lit_rlft.kit.distinct import text_number
from lit_rlft.kit.ratios import error_of_mean
from lit_rlft.kit.set_metrics import pseudo_values

__all__ = ["TopMolecules", "internal_diversity"]

_RADIUS, _NUM_BITS = 2, 2048
_ROWS = 256  # of a matrix of pairs at a time


class TopMolecules(SetMetric):
    """Mean score of the best k different molecules of an evaluation, and their diversity.

    "top_<k>" for every k, and "top_diversity": the mean Tanimoto distance of Morgan fingerprints
    (radius 2, 2,048 bits) of every two of the largest k, in [0, 1]. Molecules count that are valid
    and in one part, each graph once, with its best score; NaN where there are fewer than k. The
    numbers grow with the number of molecules: compare equally many.

    "top_<k>" have no standard errors: leaving samples out does not tell how much a maximum varies.
    That of "top_diversity" is the jackknife's over the best k. It takes them as drawn and leaves
    out that other samples have another best k, so that it is right to about a fifth.

    The benchmark's area under the curve of top 10 over oracle calls is another number: it is of a
    whole run, this one of the model at its end.

    Args:
        reward: What scores them, e.g. "${reward}" for what was trained on.
        k: How many of the best ones.

    Raises:
        BadArgument: `k` is empty or has a number below 1.
    """

    def __init__(self, reward: Reward, k: Sequence[int] = (1, 10, 100)) -> None:
        super().__init__()
        require(len(k) > 0, self, "k", "at least one number")
        at_least(1, self, k=tuple(k))
        self.reward, self.k = reward, tuple(k)

    def check(self, pipeline: Pipeline) -> None:
        self.reward.check(pipeline)

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return scores, what tells molecules apart, fingerprints uint8 [B, 256], and which count.

        Scores are float64 [B], NaN where the reward failed.
        """
        chemistry = chemistry_of(check_molecules(samples, condition))
        scores = rewards_of(self.reward, samples, condition, may_fail=True).double().cpu()
        counted = torch.from_numpy(chemistry.connected) & scores.isfinite()
        numbers = [text_number(smiles or "") for smiles in chemistry.smiles]
        prints = np.zeros((len(chemistry), _NUM_BITS // 8), np.uint8)
        for row in counted.nonzero().flatten().tolist():
            prints[row] = np.packbits(_fingerprint(chemistry.fragments[row][0]))
        return {
            "score": scores,
            "identity": torch.tensor(numbers),
            "fingerprint": torch.from_numpy(prints),
            "counted": counted,
        }

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return "top_<k>" for every k, and "top_diversity"."""
        rows = self._best(features)
        scores = features["score"][rows]
        values = {
            f"top_{k}": float(scores[:k].mean()) if len(scores) >= k else float("nan")
            for k in self.k
        }
        whole = len(rows) == max(self.k)
        prints = features["fingerprint"][rows].numpy()
        return values | {"top_diversity": internal_diversity(prints) if whole else float("nan")}

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        """Return that of "top_diversity", NaN where it is unknown.

        Of two models it is that of independent ones: their best molecules are no pairs.
        """
        arms = [features] if other is None else [features, other]
        return {"top_diversity": math.hypot(*(self._error(arm, rows) for arm in arms))}

    def _error(self, features: Mapping[str, Tensor], rows: Tensor | None) -> float:
        best = self._best(features)
        if len(best) < max(self.k):
            return float("nan")
        means = _mean_distances(features["fingerprint"][best].numpy())
        values = pseudo_values(means, torch.zeros(len(best), dtype=torch.int64))
        return error_of_mean(values, groups=None if rows is None else rows[best])

    def _best(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of the best molecules, as many as the largest k at most."""
        return _best_of_each(features)[: max(self.k)]

    def guards(self) -> dict[str, Guard]:
        """Return {"top_diversity"}, of which a fall by a fifth is a sign."""
        return {"top_diversity": LARGE_FALL}


def internal_diversity(prints: NDArray[np.uint8]) -> float:
    """Return the mean Tanimoto distance of every two of n packed fingerprints, [n, bytes].

    In [0, 1]; NaN for fewer than two.
    """
    return float(_mean_distances(prints).mean())


def _mean_distances(prints: NDArray[np.uint8]) -> Tensor:
    """Return each fingerprint's mean Tanimoto distance to the others, float64 [n]; NaN for one."""
    num = len(prints)
    bits = torch.from_numpy(np.unpackbits(prints, axis=1)).float()
    sizes, totals = bits.sum(dim=1), torch.zeros(num, dtype=torch.float64)
    for start in range(0, num, _ROWS):
        part = slice(start, start + _ROWS)
        common = bits[part] @ bits.T
        union = sizes[part].unsqueeze(1) + sizes - common
        distances = 1 - common / union.clamp(min=1)
        distances[:, start:].fill_diagonal_(0)
        totals[part] = distances.double().sum(dim=1)
    return totals / (num - 1)


def _best_of_each(features: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of the best score of every different molecule, best first."""
    rows = features["counted"].nonzero().flatten()
    order = rows[features["score"][rows].argsort(descending=True, stable=True)]
    _, first = np.unique(features["identity"][order].numpy(), return_index=True)
    return order[np.sort(first)]


def _fingerprint(mol: Chem.Mol) -> NDArray[np.uint8]:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_NUM_BITS)
    return generator.GetFingerprintAsNumPy(mol).astype(np.uint8)
