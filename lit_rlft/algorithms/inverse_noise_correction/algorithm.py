r"""Inverse noise correction: a small flow learns the noise that a frozen flow turns into data.

The deterministic sampler of a flow is an invertible map T from noise to data. T takes the
distribution of :math:`T^{-1}(x_0)` over the data to the data's own, for a wrong model too, and

.. math::
    KL(p_{data} \,\|\, T(q)) = KL(T^{-1}(p_{data}) \,\|\, q),

so all that is left to learn is q: a corrector, trained by the denoising loss on inverted data.
Sampling runs N(0, I) -> corrector -> T. A corrector belongs to T: to the base's weights, guidance
and number of steps.

References:
    P-GRAFT (2025; its part on flow models), https://arxiv.org/abs/2510.02692
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike, probe
from lit_rlft.algorithms.inverse_noise_correction.inversion import Inversion, NoisyData, noise_power
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.checks import UsageError, at_least, loading, require
from lit_rlft.core.corrector import Flow, FlowMLP, FlowPrior
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, generators, own_rng, rand_like, seed_from
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, leaves, tree_map
from lit_rlft.core.streams import Stream
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.route import Route
from lit_rlft.runs.folder import run_folder, summary_writer

__all__ = ["InverseNoiseCorrection"]

_NUM_PROBES = 4
_CARD = "corrector.json"


class InverseNoiseCorrection(RewardFineTuner):
    """Learns the noise that a frozen flow turns into the data, which are inverted once; no reward.

    The corrector belongs to the base and its number of steps. Checkpoints and exported correctors
    name both and refuse others; the corrector's own number of steps is free. The reward only
    evaluates.

    Args:
        *args: Pipeline and reward.
        corrector: The second flow, a pipeline that makes states of the same shape under the same
            conditions (the domain's own, smaller and with new weights); None takes an MLP.
        corrector_steps: Steps of the corrector when sampling.
        width: Units of the MLP's hidden layers.
        depth: Number of the MLP's hidden layers.
        solver: How each step of the sampler is inverted.
        data_noise: Standard deviation of noise added to x_0 before it is inverted (1e-3 for
            pictures), for data on a manifold, to which no noise leads. Values given by the
            condition stay as they are.
        shard_size: Rows of data inverted and stored at a time.
        noise_folder: Where inverted noise is stored, seen by all processes; None takes the run's.
        force_num_steps: Sample with another base than the corrector's, such as one with another
            number of steps.
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
        self._held: dict[str, Any] | None = None
        self._base_probe: list[float] | None = None

    def check(self) -> None:
        process = self.pipeline.process
        if not process.invertible:
            raise UsageError(
                f"{self.algorithm} inverts the sampler, but the {type(process).__name__} of "
                f"{type(self.pipeline).__name__} is not invertible; use configs/algorithms/"
                "pretrain.yaml to learn more from data, or p_graft.yaml to learn from a reward"
            )
        self.pipeline.check_states()
        require(
            self.sampler.eta == 0,
            self,
            "sampler.eta",
            f"0 for {self.algorithm}: a sampler that draws noise has no inverse",
        )
        require(
            self.lora is None, self, "lora", f"null: {self.algorithm} leaves the denoiser as it is"
        )
        at_least(1, self, "corrector_steps", "width", "depth", "shard_size")
        at_least(0, self, "data_noise")

    def build(self) -> None:
        """Freeze the pipeline; make the corrector, or check that the given one fits."""
        self.pipeline.requires_grad_(False)
        example = self.pipeline.example()
        blank = self.pipeline.blank(example)
        if not hasattr(self, "corrector"):
            process, num_features = self.pipeline.process, self._features(example).shape[1]
            sizes = {"width": self.width, "depth": self.depth}
            with own_rng(self.seed):
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
        """Return the distribution of the corrector's samples from its own noise."""
        start = self.corrector.process.prior(self.pipeline.blank(condition))
        return FlowPrior(self.corrector, start, condition, Sampler(self.corrector_steps))

    def route(self) -> Route:
        return replace(self.reference_route(), prior=self.prior)

    def base_probe(self) -> list[float]:
        """Return a fingerprint of the base sampler: that of its samples from fixed noise."""
        if self._base_probe is None:
            condition = self.pipeline.example().repeat(_NUM_PROBES)
            noise = generators([seed_from(Stream.BASE_PROBE, i) for i in range(_NUM_PROBES)])
            self.pipeline.eval()
            with torch.no_grad(), self.meter.unbilled():
                x_1 = self.reference_prior(condition).sample(noise)
                x_0 = self.sampler.sample(self.reference, self.pipeline.process, x_1, condition)
            self._base_probe = probe(x_0)
        return self._base_probe

    def on_fit_start(self) -> None:
        """Check that the corrector belongs to this base; the model is on its device by now."""
        super().on_fit_start()
        self._check_base()

    def on_train_start(self) -> None:
        """Invert the training data that are not inverted yet."""
        super().on_train_start()
        self.eval()
        loader = self.trainer.train_dataloader
        assert loader is not None
        inversion = self.inversion(loader.dataset, loader.collate_fn)
        ranks = (self.trainer.global_rank, self.trainer.world_size)
        with self.audience.phase("invert"), torch.no_grad():
            base = self._identity()
            self._noise = inversion.run(base, *ranks, self.rollouts.track)
        numbers = inversion.tell()
        if (writer := summary_writer(self)) is not None:
            for name, value in numbers.items():
                writer.add_scalar(f"inversion/{name}", value, self.num_updates)

    def inversion(self, rows: Dataset[Any], collate: Callable[[list[Any]], Any]) -> Inversion:
        """Return the inversion of a data set's rows; the column "index" of row i is i."""
        data = NoisyData(self.pipeline, rows, collate, std=self.data_noise, seed=self.seed)
        folder = Path(self.noise_folder or run_folder(self.trainer) / "inverted_noise")
        store = InvertedNoise(folder, len(data), self.shard_size)
        size = self.sizes.sampling
        return Inversion(data, store, self.reference, self.sampler, self.solver, size)

    def on_validation_start(self) -> None:
        """Check that the corrector belongs to this base."""
        self._check_base()

    on_test_start = on_predict_start = on_validation_start

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Return the inverted noise of the batch's data as experience."""
        assert self._noise is not None
        like = self.pipeline.blank(condition)
        x_1 = tree_map(lambda held, own: held.to(own), self._noise.read(batch["index"].cpu()), like)
        seeds = self.rollouts.seeds(batch, 1, Stream.DATA, self.num_rounds)
        self.num_samples += len(seeds) * self.trainer.world_size
        power = noise_power(self.pipeline.process, x_1)
        return Experience({"x_1": x_1}, condition, seeds, {"noise_power": power})

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the corrector's denoising loss, with the inverted noise as its data, [n]."""
        flow, x_1 = self.corrector, experience.states["x_1"]
        uniform = rand_like(torch.empty(len(experience), device=leaves(x_1)[0].device), noise)
        t = flow.process.draw_times(uniform)
        s = torch.zeros_like(t)
        x_t = flow.process.noised(x_1, s, t, noise)
        return flow.process.loss(flow.predict(x_t, t, experience.condition), x_1, x_t, s, t), {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep, beside the rest, the base that the corrector belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_rlft"] |= self._base()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore; the base is compared with the corrector's at the start, on the device."""
        super().on_load_checkpoint(checkpoint)
        self._held = checkpoint["lit_rlft"]

    def export(self, folder: Path) -> list[Path]:
        """Write the corrector in the domain's format, and beside it the base that it belongs to.

        An MLP is in the checkpoint alone.
        """
        if not isinstance(self.corrector, Pipeline):
            return []
        written = self.corrector.save(folder)
        (folder / _CARD).write_text(json.dumps(self._base(), indent=2) + "\n", encoding="utf-8")
        return [*written, folder / _CARD]

    def _identity(self) -> dict[str, Any]:
        """Return what identifies the frozen sampler, for noise on disk."""
        steps, probes = self.sampler.num_steps, self.base_probe()
        return {"pretrained": self.pretrained, "num_steps": steps, "sampler": probes}

    def _base(self) -> dict[str, Any]:
        """Return the same for checkpoints and exported correctors."""
        return {"base_steps": self.sampler.num_steps, "base_probe": self.base_probe()}

    def _features(self, condition: Condition) -> Tensor:
        return self.pipeline.features(condition)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def _check_base(self) -> None:
        """Raise UsageError where the corrector in use was trained for another base.

        One that was loaded from a folder may be the start of training for this base.
        """
        held, where = self._held, "the checkpoint"
        if held is None and not self._fitting and not self.num_updates:
            held, where = self._card(), "model.init_args.corrector.init_args.pretrained"
        self._held = None
        if held is None or (self.force_num_steps and not self._fitting):
            return
        steps, own = held.get("base_steps"), self.sampler.num_steps
        remedy = "or train another corrector (force_num_steps samples nevertheless)"
        if steps != own:
            raise UsageError(
                f"{where} holds a corrector for {steps} base steps, not {own}; set "
                f"model.init_args.sampler.num_steps to {steps} {remedy}"
            )
        if not alike(held.get("base_probe", []), self.base_probe()):
            raise UsageError(
                f"{where} holds a corrector for another base, which makes other samples of the "
                "same noise; set pipeline.init_args, such as guidance_scale, to what it was "
                f"trained for {remedy}"
            )

    def _card(self) -> dict[str, Any] | None:
        """Return the notes beside a corrector that was loaded from a run's folder."""
        source = self.corrector.pretrained if isinstance(self.corrector, Pipeline) else None
        path = Path(source or "") / _CARD
        if source is None or not path.is_file():
            return None
        with loading(f"{path} cannot be read; delete it to use the corrector unchecked"):
            held = json.loads(path.read_text(encoding="utf-8"))
            return {name: held[name] for name in ("base_steps", "base_probe")}


def _shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape[1:]) for leaf in leaves(state)]
