"""Pretraining: the denoising loss on data."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import UsageError, positive, within
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.process.gaussian import GaussianProcess
from lit_rlft.core.randomness import Generators, Seeded, rand_like
from lit_rlft.core.state import State, cat, index, leaves, to
from lit_rlft.core.streams import Stream
from lit_rlft.loop.experience import Experience

__all__ = ["Pretrain"]


class Pretrain(RewardFineTuner):
    """Trains all of the denoiser on data with the model's native loss; the reward only evaluates.

    Args:
        *args: Pipeline and reward.
        condition_dropout: Probability of training a sample on the null condition, which
            classifier-free guidance needs.
        snr_gamma: Bound of min-SNR weighting, 5 in its paper; None leaves the native loss. Fewer
            updates are spent on the last details. Gaussian processes only.
        train_encoder: Train the condition encoder along with the denoiser.
        cache_states: Keep each data sample's x_0 in memory once it was encoded; needs `index` in
            the batches and data without augmentation.
        **base: Arguments of `RewardFineTuner`; `lora` must be None.
    """

    def __init__(
        self,
        *args: Any,
        condition_dropout: float = 0.1,
        snr_gamma: float | None = None,
        train_encoder: bool = False,
        cache_states: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.condition_dropout = condition_dropout
        self.snr_gamma = snr_gamma
        self.train_encoder = train_encoder
        self.cache_states = cache_states
        self._cache: dict[int, State] = {}

    def check(self) -> None:
        within(0, 1, self, "condition_dropout")
        if self.lora is not None:
            raise UsageError("Pretrain trains the whole denoiser; set model.init_args.lora to null")
        if self.snr_gamma is not None:
            positive(self, "snr_gamma")
            if not isinstance(self.pipeline.process, GaussianProcess):
                raise UsageError(
                    f"{type(self.pipeline.process).__name__} has no signal-to-noise ratio; set "
                    "model.init_args.snr_gamma to null"
                )
        if self.cache_states and self.pipeline.augments:
            raise UsageError(
                f"{self.pipeline.name} learns from data that are moved at random, anew each time "
                "they are seen; set model.init_args.cache_states to false"
            )
        self.pipeline.check_states()
        encoder = self.pipeline.encoder
        if self.train_encoder and encoder is None:
            raise UsageError(
                f"{type(self.pipeline).__name__} has no condition encoder; "
                "set model.init_args.train_encoder to false"
            )
        if self.train_encoder and encoder is not None:
            encoder.requires_grad_(True)

    def trainable(self) -> nn.Module:
        if not self.train_encoder or self.pipeline.encoder is None:
            return self.pipeline.denoiser
        return nn.ModuleList([self.pipeline.denoiser, self.pipeline.encoder])

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Return the data of the batch as experience."""
        seeds = self.rollouts.seeds(batch, 1, Stream.DATA, self.num_rounds)
        self.num_samples += len(seeds) * self.trainer.world_size
        batch = self.pipeline.augmented(batch, Seeded(seeds, Stream.AUGMENT))
        return Experience({"x_0": self._states(batch)}, condition, seeds)

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the native denoising loss, [n]."""
        process, x_0 = self.pipeline.process, experience.states["x_0"]
        uniform = rand_like(torch.empty(len(experience), device=leaves(x_0)[0].device), noise)
        t = process.draw_times(uniform)
        s = torch.zeros_like(t)
        x_t = process.noised(x_0, s, t, noise)
        condition = experience.condition
        if self.train_encoder:
            condition = self.pipeline.encode(_columns(condition))
        if self.condition_dropout:
            dropped = rand_like(torch.empty(len(experience)), noise) < self.condition_dropout
            condition = condition.dropped(dropped)
        loss = process.loss(self.pipeline.predict(x_t, t, condition), x_0, x_t, s, t)
        if self.snr_gamma is not None and isinstance(process, GaussianProcess):
            loss = loss * process.min_snr_weight(t, self.snr_gamma).to(loss.dtype)
        return loss, {}

    def _states(self, batch: Batch) -> State:
        if not self.cache_states:
            return self.pipeline.states(batch)
        rows = batch["index"].tolist()
        if any(row not in self._cache for row in rows):
            states = self.pipeline.states(batch)
            for i, row in enumerate(rows):
                self._cache[row] = to(index(states, slice(i, i + 1)), "cpu")
        return to(cat([self._cache[row] for row in rows]), self.device)


def _columns(condition: Condition) -> Batch:
    records = condition.each()
    return {name: [record[name] for record in records] for name in records[0]}
