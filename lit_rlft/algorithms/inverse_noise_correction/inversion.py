"""Inverts the training data of inverse noise correction, shared out among processes, once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike, probe
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.batch_size import BatchSize, sized
from lit_rlft.core.checks import UsageError
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import Process
from lit_rlft.core.randomness import Seeded, generators, seed_from
from lit_rlft.core.sampling import Denoiser, Sampler
from lit_rlft.core.state import State, cat, flatten, tree_map
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, together
from lit_rlft.loop.rollouts import Track

__all__ = ["Inversion", "NoisyData", "noise_power"]

_NUM_PROBES = 64


def noise_power(process: Process, x_1: State) -> float:
    """Return the mean of ||x_1||^2 / d, d the free numbers of a state: about 1 for normal noise."""
    squares = flatten(x_1).double().square().sum(dim=1)
    return float((squares / process.num_dimensions(x_1)).mean())


class NoisyData:
    """The states of a data set's rows, with noise that depends on the row alone.

    Args:
        pipeline: Encodes them.
        rows: The data set; the column "index" of row i is i.
        collate: From a list of rows to a batch.
        std: Standard deviation of the noise; 0 adds none.
        seed: Of the noise.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rows: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        *,
        std: float,
        seed: int,
    ) -> None:
        self.pipeline, self.rows, self.collate = pipeline, rows, collate
        self.std, self.seed = std, seed

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def read(self, rows: Sequence[int]) -> tuple[State, Condition]:
        """Return x_0, with its noise, and the condition of some rows.

        Raises:
            UsageError: The data do not number their rows.
        """
        pipeline = self.pipeline
        batch = self.collate([self.rows[row] for row in rows])
        if batch["index"].tolist() != list(rows):
            raise UsageError(
                "InverseNoiseCorrection needs data whose column 'index' is the row's number, which "
                "lit_rlft.kit.data.Rows adds"
            )
        moves = Seeded(rows, self.seed, Stream.AUGMENT)
        condition, x_0 = pipeline.encode(batch), pipeline.states(pipeline.augmented(batch, moves))
        if not self.std:
            return x_0, condition
        keys = generators([seed_from(self.seed, Stream.DATA_NOISE, row) for row in rows])
        # From the prior, which knows which entries of a state are noisy at all.
        noise = pipeline.process.prior(pipeline.blank(condition)).sample(keys)
        noisy = tree_map(lambda x, e: x + self.std * e, x_0, noise)
        given = pipeline.given(condition)
        if given is not None:
            noisy = tree_map(lambda fixed, x, e: x.where(fixed, e), given, x_0, noisy)
        return noisy, condition

    def probe(self, rows: Sequence[int], chunk_size: BatchSize) -> list[float] | None:
        """Return a fingerprint of these rows; None where they differ each time they are read."""
        first, again = (self._probe(rows, chunk_size) for _ in range(2))
        return first if alike(first, again) else None

    def _probe(self, rows: Sequence[int], chunk_size: BatchSize) -> list[float]:
        numbers: list[float] = []
        for part in chunk_size.parts(len(rows)):
            with part:
                x_0, condition = self.read(rows[part.rows])
                features = self.pipeline.features(condition)
                numbers += probe({"x_0": flatten(x_0), "features": features.to(flatten(x_0))})
        return numbers


class Inversion:
    """Inverts the rows of a data set into stored noise that the frozen sampler turns into them.

    Noise on disk is reused where it belongs to the same sampler and the same data, and was made
    by the same solver or is as exact as the present one asks for.

    Data are recognised by their number of rows and by fingerprints: projections of x_0, with its
    condition's features, of 64 rows spread evenly, or of one row per shard where there are more
    shards. They notice another order, flips and another scale, but not a change of a few rows in
    between. Data that differ when they are read again are not compared at all.

    Args:
        data: What is inverted.
        store: Where its noise goes.
        denoiser: The frozen model.
        sampler: What is inverted.
        solver: How each step is inverted.
        chunk_size: Rows at a time, which bounds the memory.
    """

    def __init__(
        self,
        data: NoisyData,
        store: InvertedNoise,
        denoiser: Denoiser,
        sampler: Sampler,
        solver: FixedPoint,
        chunk_size: int | BatchSize,
    ) -> None:
        self.data, self.store, self.denoiser = data, store, denoiser
        self.sampler, self.solver, self.chunk_size = sampler, solver, sized(chunk_size)

    def run(
        self, base: Mapping[str, Any], rank: int, world_size: int, track: Track
    ) -> InvertedNoise:
        """Invert what is missing; wait for the other processes' shards, or stop with them.

        Args:
            base: What identifies the frozen sampler: values that JSON can hold.
            rank: This process.
            world_size: Number of processes, all of which take part.
            track: Shows the progress.
        """
        store = self.store
        with together(world_size):
            if rank == 0:
                store.claim({**base, **self.identity()})
        with together(world_size):
            own = range(rank, store.num_shards, world_size)
            lacking = [shard for shard in own if not self._usable(shard)]
        missing = sorted(chain.from_iterable(gather(lacking, world_size)))
        with together(world_size):
            # Shared out only now, so that finished shards do not make the shares uneven.
            for i, shard in enumerate(track(missing[rank::world_size], "Inverting")):
                x_1, notes = self.invert(store.rows(shard))
                store.write(shard, x_1, notes, store.num_shards - len(missing) + i)
        return store

    def identity(self) -> dict[str, Any]:
        """Return what inverted noise depends on beside the base: the data and their noise.

        The solver is not part of it: each shard notes how exact its noise is.
        """
        total = len(self.data)
        number = min(total, max(_NUM_PROBES, self.store.num_shards))
        chosen = [i * (total - 1) // max(1, number - 1) for i in range(number)]
        probes = self.data.probe(chosen, self.chunk_size)
        return {"data_noise": self.data.std, "data": probes}

    def invert(self, rows: range) -> tuple[State, dict[str, Any]]:
        """Return the inverted noise of some rows of the data, and how well it inverts them.

        Raises:
            UsageError: It is not finite.
        """
        process, done = self.data.pipeline.process, []
        for part in self.chunk_size.parts(len(rows)):
            with part:
                x_0, condition = self.data.read(rows[part.rows])
                args = (self.denoiser, process, x_0, condition, self.solver)
                done.append(self.sampler.invert(*args))
        x_1 = cat([one.x_1 for one in done])
        residuals = torch.cat([one.residuals for one in done])
        if not flatten(x_1).isfinite().all():
            raise UsageError(
                f"the inversion of rows {rows.start} to {rows.stop - 1} of the data overflows; "
                "raise model.init_args.sampler.num_steps, or look for numbers in the data that "
                "are not finite"
            )
        iterations = torch.cat([one.iterations for one in done]).double()
        return x_1, {
            "num_rows": len(rows),
            "solver": asdict(self.solver),
            "residual": float(residuals.max()),
            "iterations": float(iterations.mean()) / self.sampler.num_steps,
            "unconverged": int((residuals > self.solver.tolerance).sum()),
            "noise_power": noise_power(process, x_1),
        }

    def tell(self) -> dict[str, float]:
        """Say how well the data are inverted; warn where the iterations do not contract.

        Returns:
            Numbers to log, by name.
        """
        store, tolerance = self.store, self.solver.tolerance
        notes, total = list(store.all_notes()), store.num_rows
        means = {
            name: sum(note[name] * note["num_rows"] for note in notes) / total
            for name in ("iterations", "noise_power")
        }
        worst = max(note["residual"] for note in notes)
        # What another solver made is within the tolerance, or it would have been inverted again.
        failed = sum(note["unconverged"] for note in notes if note["residual"] > tolerance)
        rank_zero_info(
            f"inverted noise of {total} rows in {store.folder}: residual at most {worst:.2g}, "
            f"{means['iterations']:.1f} iterations a step, mean square {means['noise_power']:.3f}"
        )
        if failed:
            rank_zero_warn(
                f"the inversion of {failed / total:.1%} of the data does not converge (residual "
                f"{worst:.2g} after {self.solver.max_iterations} iterations, tolerance "
                f"{tolerance:.2g}): steps are too long for the model there; raise "
                "model.init_args.sampler.num_steps, or data_noise where data lie on a manifold, "
                "or solver.tolerance where the model computes in half precision"
            )
        return {**means, "residual": worst, "unconverged": failed / total}

    def _usable(self, shard: int) -> bool:
        """Return whether a shard is there and as exact as the present solver would make it."""
        if not self.store.finished(shard):
            return False
        notes, solver = self.store.notes(shard), self.solver
        return notes["solver"] == asdict(solver) or notes["residual"] <= solver.tolerance
