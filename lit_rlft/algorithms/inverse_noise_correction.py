r"""Inverse noise correction: a small flow learns the noise that a frozen flow makes the data of.

The deterministic sampler of a flow is an invertible map T from noise to data. The law of
:math:`T^{-1}(x_0)` over the data is the one that T takes to the data's own, whatever is wrong with
the model, and

.. math::
    KL(p_{data} \,\|\, T(q)) = KL(T^{-1}(p_{data}) \,\|\, q),

so all that is left to learn is q: a corrector, trained by the denoising loss on inverted data.
Sampling runs N(0, I) -> corrector -> T. A corrector belongs to T, and so to a number of steps.

References:
    P-GRAFT (2025; its part on flow models), https://arxiv.org/abs/2510.02692
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_rlft.algorithms.base import Experience, Relay, RewardFineTuner
from lit_rlft.core.checks import UsageError, require
from lit_rlft.core.corrector import Flow, FlowMLP, FlowPrior
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, generators, rand_like, seed_from
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, cat, flatten, leaves, tree_map
from lit_rlft.inverted_noise import InvertedNoise
from lit_rlft.processes import gather
from lit_rlft.runs import run_folder, summary_writer

__all__ = ["InverseNoiseCorrection"]

_DATA_NOISE, _PROBE = 20, 21
_NUM_PROBES = 4
"""Rows by which inverted noise on disk is recognised."""


class InverseNoiseCorrection(RewardFineTuner):
    """Inverts the training data through the frozen sampler once, then learns the law of that noise.

    What is learned belongs to the sampler's number of steps; that of the corrector is free. The
    reward only evaluates.

    Args:
        *args: Pipeline and reward.
        corrector: The second flow, a pipeline that makes states of the same shape under the same
            conditions (the domain's own, smaller and with new weights); None takes an MLP.
        corrector_steps: Steps of the corrector when sampling.
        width: Units of the MLP's hidden layers.
        depth: Number of the MLP's hidden layers.
        solver: How each step of the sampler is inverted.
        data_noise: Standard deviation of noise added to x_0 before it is inverted, for data on a
            manifold, near which no noise leads (1e-3 for pictures); what conditions give is spared.
        shard_size: Rows of data inverted and stored at a time.
        noise_folder: Where inverted noise is stored, seen by all processes; None takes the run's.
        force_num_steps: Sample with another number of base steps than the corrector's.
        **base: Arguments of `RewardFineTuner`; `lora` must be None.
    """

    corrector: Flow

    def __init__(
        self,
        *args: Any,
        corrector: Pipeline | None = None,
        corrector_steps: int = 8,
        width: int = 256,
        depth: int = 3,
        solver: FixedPoint | None = None,
        data_noise: float = 0.0,
        shard_size: int = 512,
        noise_folder: str | None = None,
        force_num_steps: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        if corrector is not None:
            self.corrector = corrector
        self.corrector_steps, self.width, self.depth = corrector_steps, width, depth
        self.solver, self.data_noise = solver or FixedPoint(), data_noise
        self.shard_size, self.noise_folder = shard_size, noise_folder
        self.force_num_steps = force_num_steps
        self._noise: InvertedNoise | None = None

    def check(self) -> None:
        process = self.pipeline.process
        if not process.invertible:
            raise UsageError(
                f"{self.algorithm} inverts the sampler, but the {type(process).__name__} of "
                f"{type(self.pipeline).__name__} is not invertible; use configs/algorithms/"
                "pretrain.yaml to learn more from data, or p_graft.yaml to learn from a reward"
            )
        require(
            self.sampler.eta == 0,
            "sampler.eta",
            f"0 for {self.algorithm}: a sampler that draws noise has no inverse",
        )
        require(self.lora is None, "lora", f"null: {self.algorithm} leaves the denoiser as it is")
        require(self.corrector_steps >= 1, "corrector_steps", "at least 1")
        require(self.data_noise >= 0, "data_noise", "0 or more")
        require(self.shard_size >= 1, "shard_size", "at least 1")

    def build(self) -> None:
        """Freeze the pipeline; make the corrector, or check that the given one fits."""
        self.pipeline.requires_grad_(False)
        example = self.pipeline.example()
        blank = self.pipeline.blank(example)
        if not hasattr(self, "corrector"):
            process, num_features = self.pipeline.process, self._features(example).shape[1]
            sizes = {"width": self.width, "depth": self.depth}
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.corrector = FlowMLP(process, blank, self._features, num_features, **sizes)
            return
        assert isinstance(self.corrector, Pipeline)
        own = self.corrector.blank(example)
        if not self.corrector.process.differentiable or _shapes(own) != _shapes(blank):
            raise UsageError(
                f"model.init_args.corrector makes states {_shapes(own)} under a "
                f"{type(self.corrector.process).__name__}, but {type(self.pipeline).__name__} "
                f"starts from {_shapes(blank)}; give it a continuous process and the same sizes"
            )
        self.corrector.requires_grad_(False)
        self.corrector.denoiser.requires_grad_(True)

    def trainable(self) -> nn.Module:
        return self.corrector.denoiser

    def prior(self, condition: Condition) -> FlowPrior:
        """Return the law of what the corrector makes of the process's own noise."""
        start = self.reference_prior(condition)
        return FlowPrior(self.corrector, start, condition, Sampler(self.corrector_steps))

    def relay(self) -> Relay:
        return self.reference_relay()

    def on_train_start(self) -> None:
        """Invert what of the training data is not inverted yet."""
        super().on_train_start()
        self.eval()
        loader = self.trainer.train_dataloader
        assert loader is not None
        with self.phase("invert"), torch.no_grad():
            self._noise = self._inverted(loader.dataset, loader.collate_fn)
        self._tell(self._noise)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Return the inverted noise of the batch's data as experience."""
        assert self._noise is not None
        like = self.pipeline.blank(condition)
        x_1 = tree_map(lambda held, own: held.to(own), self._noise.read(batch["index"].cpu()), like)
        seeds = self.sample_seeds(batch, 1, 0, self.num_rounds)
        self.num_samples += len(seeds) * self.trainer.world_size
        power = float(flatten(x_1).double().square().mean())
        return Experience({"x_1": x_1}, condition, seeds, {"noise_power": power})

    def loss(self, experience: Experience, rows: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the corrector's denoising loss, with the inverted noise as its data, [n]."""
        flow, x_1 = self.corrector, experience.states["x_1"]
        uniform = rand_like(torch.empty(len(experience), device=leaves(x_1)[0].device), rows)
        t = flow.process.draw_times(uniform)
        s = torch.zeros_like(t)
        x_t = flow.process.noised(x_1, s, t, rows)
        return flow.process.loss(flow.predict(x_t, t, experience.condition), x_1, x_t, s, t), {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep, beside the rest, the number of steps that the corrector is for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_rlft"]["base_steps"] = self.sampler.num_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore; raise UsageError for a corrector of another number of base steps."""
        super().on_load_checkpoint(checkpoint)
        held, own = checkpoint["lit_rlft"].get("base_steps"), self.sampler.num_steps
        fits = held == own
        if not fits and (not self.force_num_steps or self.trainer.state.fn == TrainerFn.FITTING):
            raise UsageError(
                f"--ckpt_path holds a corrector for {held} base steps, not {own}; set "
                f"model.init_args.sampler.num_steps to {held} or train another corrector "
                "(force_num_steps samples nevertheless)"
            )

    def export(self, folder: Path) -> list[Path]:
        """Write the corrector in the domain's format; an MLP is in the checkpoint alone."""
        return self.corrector.save(folder) if isinstance(self.corrector, Pipeline) else []

    def _features(self, condition: Condition) -> Tensor:
        return self.pipeline.features(condition)

    def _inverted(self, rows: Dataset[Any], collate: Any) -> InvertedNoise:
        """Invert the shards of this process that are missing; wait for the others' shards."""
        trainer = self.trainer
        world, rank = trainer.world_size, trainer.global_rank
        folder = Path(self.noise_folder or run_folder(trainer) / "inverted_noise")
        store = InvertedNoise(folder, len(rows), self.shard_size)  # type: ignore[arg-type]
        data = _Data(self, rows, collate)
        problem = ""
        try:
            if rank == 0:
                store.claim(self._identity(data))
        except UsageError as error:
            problem = str(error)
        self._stop_together(problem)
        own = range(rank, store.num_shards, world)
        missing = [shard for shard in own if not store.finished(shard)]
        try:
            for i, shard in enumerate(self.track(missing, "Inverting")):
                x_1, notes = self._invert(data, store.rows(shard))
                store.write(shard, x_1, notes, len(own) - len(missing) + i)
        except UsageError as error:
            problem = str(error)
        self._stop_together(problem)
        return store

    def _stop_together(self, problem: str) -> None:
        """Raise the first problem of any process in all of them: none waits for another."""
        problems = list(filter(None, gather(problem, self.trainer.world_size)))
        if problems:
            raise UsageError(problems[0])

    def _identity(self, data: "_Data") -> dict[str, Any]:
        """Return what inverted noise depends on, and numbers by which sampler and data are known.

        The numbers are means of samples from fixed noise and of data. Data that are not the same
        when they are read again are left out.
        """
        x_0, condition = data[range(min(_NUM_PROBES, len(data)))]
        again, _ = data[range(min(_NUM_PROBES, len(data)))]
        rows = generators([seed_from(_PROBE, i) for i in range(len(condition))])
        x_1 = self.reference_prior(condition).sample(rows)
        drawn = self.sampler.sample(self.reference_policy, self.pipeline.process, x_1, condition)
        fixed = torch.equal(flatten(x_0), flatten(again))
        return {
            "pretrained": self.pretrained,
            "num_steps": self.sampler.num_steps,
            "data_noise": self.data_noise,
            "sampler": flatten(drawn).double().mean(dim=1).tolist(),
            "data": flatten(x_0).double().mean(dim=1).tolist() if fixed else None,
        }

    def _invert(self, data: "_Data", rows: range) -> tuple[State, dict[str, Any]]:
        """Return the inverted noise of some rows of the data, and how well it inverts them."""
        size, process = self.sampling_batch_size, self.pipeline.process
        parts = []
        for first in range(rows.start, rows.stop, size):
            x_0, condition = data[range(first, min(first + size, rows.stop))]
            args = (self.reference_policy, process, x_0, condition, self.solver)
            parts.append(self.sampler.invert(*args))
        x_1 = cat([part.x_1 for part in parts])
        residuals = torch.cat([part.residuals for part in parts])
        finite = flatten(x_1).isfinite().all()
        if not finite:
            raise UsageError(
                f"the inversion of rows {rows.start} to {rows.stop - 1} of the data overflows; "
                "raise model.init_args.sampler.num_steps, or look for numbers in the data that "
                "are not finite"
            )
        iterations = torch.cat([part.iterations for part in parts]).double()
        return x_1, {
            "num_rows": len(rows),
            "residual": float(residuals.max()),
            "iterations": float(iterations.mean()) / self.sampler.num_steps,
            "unconverged": int((residuals > self.solver.tolerance).sum()),
            "noise_power": float(flatten(x_1).double().square().mean()),
        }

    def _tell(self, store: InvertedNoise) -> None:
        """Report how well the data were inverted; warn where the iterations do not contract."""
        notes, total = list(store.all_notes()), store.num_rows
        means = {
            name: sum(note[name] * note["num_rows"] for note in notes) / total
            for name in ("iterations", "noise_power")
        }
        worst = max(note["residual"] for note in notes)
        failed = sum(note["unconverged"] for note in notes)
        rank_zero_info(
            f"inverted noise of {total} rows in {store.folder}: residual at most {worst:.2g}, "
            f"{means['iterations']:.1f} iterations a step, mean square {means['noise_power']:.3f}"
        )
        writer = summary_writer(self)
        if writer is not None:
            values = {**means, "residual": worst, "unconverged": failed / total}
            for name, value in values.items():
                writer.add_scalar(f"inversion/{name}", value, self.num_updates)
        if failed:
            rank_zero_warn(
                f"the inversion of {failed / total:.1%} of the data does not converge (residual "
                f"{worst:.2g} after {self.solver.max_iterations} iterations, tolerance "
                f"{self.solver.tolerance:.2g}): steps are too long for the model there; raise "
                "model.init_args.sampler.num_steps, or data_noise where data lie on a manifold, "
                "or solver.tolerance where the model computes in half precision"
            )


class _Data:
    """The rows of a data set as states, with noise, and their conditions."""

    def __init__(self, tuner: InverseNoiseCorrection, rows: Dataset[Any], collate: Any) -> None:
        self.tuner, self.rows, self.collate = tuner, rows, collate

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, rows: range) -> tuple[State, Condition]:
        """Return x_0 and the condition of some rows."""
        tuner, pipeline = self.tuner, self.tuner.pipeline
        batch = self.collate([self.rows[row] for row in rows])
        if batch["index"].tolist() != list(rows):
            raise UsageError(
                f"{tuner.algorithm} needs data whose column 'index' is the row's number, which "
                "lit_rlft.data.Rows adds"
            )
        condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
        if not tuner.data_noise:
            return x_0, condition
        keys = generators([seed_from(tuner.seed, _DATA_NOISE, row) for row in rows])
        # From the prior, which knows what of a state is noisy at all.
        noise = tuner.reference_prior(condition).sample(keys)
        noisy = tree_map(lambda x, e: x + tuner.data_noise * e, x_0, noise)
        given = pipeline.given(condition)
        if given is not None:
            noisy = tree_map(lambda fixed, x, e: x.where(fixed, e), given, x_0, noisy)
        return noisy, condition


def _shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape[1:]) for leaf in leaves(state)]
