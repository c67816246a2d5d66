"""Inverts the training data of inverse noise correction, shared out among processes, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike, probe
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.state import State, cat, flatten, tree_map
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, together
from lit_rlft.runs.folder import run_folder, summary_writer

if TYPE_CHECKING:
    from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection

__all__ = ["Inversion"]

_NUM_PROBES = 64


class Inversion:
    """From the rows of a data set to stored noise that the frozen sampler makes them of.

    Noise on disk is used again where it belongs to the same sampler and the same data, and was made
    by the same solver or is as exact as the present one asks for.

    Data are recognised by their number and by projections of x_0, with its condition's features, of
    64 rows spread evenly, or of one row in each shard where there are more shards: another order,
    flips and another scale are noticed, a change of a few rows between these is not. Data that
    differ when they are read again are not compared at all.

    Args:
        tuner: Whose sampler and settings.
        rows: The data set; the column "index" of row i is i.
        collate: From a list of rows to a batch.
    """

    def __init__(
        self,
        tuner: InverseNoiseCorrection,
        rows: Dataset[Any],
        collate: Callable[[list[Any]], Any],
    ) -> None:
        self.tuner, self.rows, self.collate = tuner, rows, collate
        self.num_rows = len(rows)  # type: ignore[arg-type]
        folder = Path(tuner.noise_folder or run_folder(tuner.trainer) / "inverted_noise")
        self.store = InvertedNoise(folder, self.num_rows, tuner.shard_size)

    def run(self) -> InvertedNoise:
        """Invert what is missing; wait for the other processes' shards, or stop with them."""
        store, tuner = self.store, self.tuner
        world, rank = tuner.trainer.world_size, tuner.trainer.global_rank
        with together(world):
            if rank == 0:
                store.claim(self.identity())
        with together(world):
            own = range(rank, store.num_shards, world)
            lacking = [shard for shard in own if not self._usable(shard)]
        missing = sorted(chain.from_iterable(gather(lacking, world)))
        with together(world):
            # Shared out only now: whoever has many finished shards has no less to do.
            for i, shard in enumerate(tuner.track(missing[rank::world], "Inverting")):
                x_1, notes = self.invert(store.rows(shard))
                store.write(shard, x_1, notes, store.num_shards - len(missing) + i)
        return store

    def identity(self) -> dict[str, Any]:
        """Return what inverted noise depends on, and numbers by which sampler and data are known.

        The solver is not part of it: how exact noise is, is known shard by shard.
        """
        tuner = self.tuner
        number = min(self.num_rows, max(_NUM_PROBES, self.store.num_shards))
        chosen = [i * (self.num_rows - 1) // max(1, number - 1) for i in range(number)]
        first, again = self._probe(chosen), self._probe(chosen)
        return {
            "pretrained": tuner.pretrained,
            "num_steps": tuner.sampler.num_steps,
            "data_noise": tuner.data_noise,
            "sampler": tuner.base_probe(),
            "data": first if alike(first, again) else None,
        }

    def invert(self, rows: range) -> tuple[State, dict[str, Any]]:
        """Return the inverted noise of some rows of the data, and how well it inverts them."""
        tuner, parts = self.tuner, []
        for first in range(rows.start, rows.stop, tuner.sampling_batch_size):
            x_0, condition = self.data(rows[first - rows.start :][: tuner.sampling_batch_size])
            args = (tuner.reference_policy, tuner.pipeline.process, x_0, condition, tuner.solver)
            parts.append(tuner.sampler.invert(*args))
        x_1 = cat([part.x_1 for part in parts])
        residuals = torch.cat([part.residuals for part in parts])
        if not flatten(x_1).isfinite().all():
            raise UsageError(
                f"the inversion of rows {rows.start} to {rows.stop - 1} of the data overflows; "
                "raise model.init_args.sampler.num_steps, or look for numbers in the data that "
                "are not finite"
            )
        iterations = torch.cat([part.iterations for part in parts]).double()
        return x_1, {
            "num_rows": len(rows),
            "solver": asdict(tuner.solver),
            "residual": float(residuals.max()),
            "iterations": float(iterations.mean()) / tuner.sampler.num_steps,
            "unconverged": int((residuals > tuner.solver.tolerance).sum()),
            "noise_power": float(flatten(x_1).double().square().mean()),
        }

    def data(self, rows: Sequence[int]) -> tuple[State, Condition]:
        """Return x_0, with its noise, and the condition of some rows."""
        tuner, pipeline = self.tuner, self.tuner.pipeline
        batch = self.collate([self.rows[row] for row in rows])
        if batch["index"].tolist() != list(rows):
            raise UsageError(
                f"{tuner.algorithm} needs data whose column 'index' is the row's number, which "
                "lit_rlft.kit.data.Rows adds"
            )
        condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
        if not tuner.data_noise:
            return x_0, condition
        keys = generators([seed_from(tuner.seed, Stream.DATA_NOISE, row) for row in rows])
        # From the prior, which knows what of a state is noisy at all.
        noise = tuner.reference_prior(condition).sample(keys)
        noisy = tree_map(lambda x, e: x + tuner.data_noise * e, x_0, noise)
        given = pipeline.given(condition)
        if given is not None:
            noisy = tree_map(lambda fixed, x, e: x.where(fixed, e), given, x_0, noisy)
        return noisy, condition

    def tell(self) -> None:
        """Report how well the data are inverted; warn where the iterations do not contract."""
        store, tolerance = self.store, self.tuner.solver.tolerance
        notes, total = list(store.all_notes()), store.num_rows
        means = {
            name: sum(note[name] * note["num_rows"] for note in notes) / total
            for name in ("iterations", "noise_power")
        }
        worst = max(note["residual"] for note in notes)
        # What another solver made is within the tolerance, or it would have been made anew.
        failed = sum(note["unconverged"] for note in notes if note["residual"] > tolerance)
        rank_zero_info(
            f"inverted noise of {total} rows in {store.folder}: residual at most {worst:.2g}, "
            f"{means['iterations']:.1f} iterations a step, mean square {means['noise_power']:.3f}"
        )
        writer = summary_writer(self.tuner)
        if writer is not None:
            values = {**means, "residual": worst, "unconverged": failed / total}
            for name, value in values.items():
                writer.add_scalar(f"inversion/{name}", value, self.tuner.num_updates)
        if failed:
            rank_zero_warn(
                f"the inversion of {failed / total:.1%} of the data does not converge (residual "
                f"{worst:.2g} after {self.tuner.solver.max_iterations} iterations, tolerance "
                f"{tolerance:.2g}): steps are too long for the model there; raise "
                "model.init_args.sampler.num_steps, or data_noise where data lie on a manifold, "
                "or solver.tolerance where the model computes in half precision"
            )

    def _usable(self, shard: int) -> bool:
        """Return whether a shard is there and as exact as the present solver would make it."""
        if not self.store.finished(shard):
            return False
        notes, solver = self.store.notes(shard), self.tuner.solver
        return notes["solver"] == asdict(solver) or notes["residual"] <= solver.tolerance

    def _probe(self, rows: Sequence[int]) -> list[float]:
        numbers = []
        for first in range(0, len(rows), self.tuner.sampling_batch_size):
            x_0, condition = self.data(rows[first : first + self.tuner.sampling_batch_size])
            features = self.tuner.pipeline.features(condition)
            numbers += probe({"x_0": flatten(x_0), "features": features.to(flatten(x_0))})
        return numbers
