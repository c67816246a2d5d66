"""Pairs of a preference file as states of the model, each encoded once."""

from collections.abc import Sequence
from pathlib import Path

from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.randomness import Seeded
from lit_rlft.core.state import State, cat, index, to, tree_map
from lit_rlft.core.streams import Stream
from lit_rlft.kit.data import collate
from lit_rlft.kit.preferences import Pair

__all__ = ["PairStates"]


class PairStates:
    """Keeps the states of pairs, two each, in the processor's memory.

    A pair is encoded alone, so that its states depend neither on the batch that it is first seen in
    nor on the number of processes.

    Args:
        pipeline: Reads and encodes samples.
        seed: Seed of what the pipeline draws on the way, such as a molecule's rotation.
    """

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self.pipeline, self.seed = pipeline, seed
        self._known: dict[int, State] = {}

    def of(self, rows: Sequence[int], pairs: Sequence[Pair]) -> tuple[State, State]:
        """Return x_0 of the preferred and of the rejected samples, n rows each.

        Args:
            rows: n numbers by which pairs are known.
            pairs: n pairs.

        Raises:
            UsageError: A sample cannot be read.
        """
        for row, pair in zip(rows, pairs, strict=True):
            if row not in self._known:
                # At once: a copy that does not block may not be there when it is read.
                self._known[row] = tree_map(lambda leaf: leaf.cpu(), self._encoded(row, pair))
        both = [to(self._known[row], self.pipeline.device) for row in rows]
        chosen, rejected = (cat([index(one, slice(i, i + 1)) for one in both]) for i in (0, 1))
        return chosen, rejected

    def _encoded(self, row: int, pair: Pair) -> State:
        folder = Path(pair.folder)
        read = [
            self.pipeline.read_sample(sample, pair.condition, folder)
            for sample in (pair.chosen, pair.rejected)
        ]
        both = collate([{**columns, "index": 0} for columns in read])
        moves = Seeded([0, 1], self.seed, Stream.AUGMENT, row)
        return self.pipeline.states(self.pipeline.augmented(both, moves))
