"""The loop that every algorithm shares: collect experience, train on it, evaluate."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lit_rlft.core.block_checkpointing import checkpoint_blocks
from lit_rlft.core.distribution import Distribution
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators
from lit_rlft.core.reward import Metric, Metrics, Reward, check_born, check_parts
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.meter import Meter
from lit_rlft.distributed import gather, together
from lit_rlft.evaluation.dial import Dial, dial_settings
from lit_rlft.evaluation.evaluator import Evaluator
from lit_rlft.loop.base_settings import check_settings
from lit_rlft.loop.batch_sizes import BatchSizes, Sized, finishing, fitting
from lit_rlft.loop.checkpoint import Kept, fingerprint
from lit_rlft.loop.checkpointed import Checkpointed
from lit_rlft.loop.experience import Draw, Experience
from lit_rlft.loop.hooks import Audience
from lit_rlft.loop.learning_rate import after_round, after_update, after_validation, optimizer_of
from lit_rlft.loop.lockstep import Idle, idle_of
from lit_rlft.loop.precision import check_weights, fresh_casts, loss_scale, settle, stepped
from lit_rlft.loop.reference import LoRA, adapt, completed
from lit_rlft.loop.rollouts import Rollouts, track
from lit_rlft.loop.round_log import RoundLog, round_means
from lit_rlft.loop.route import Leg, Route, steps_told
from lit_rlft.loop.side.rewards import RewardWorkers
from lit_rlft.loop.side.watch import beside
from lit_rlft.loop.strategy import admit, check_trainer, passes_of
from lit_rlft.loop.updates import Update, clip, layout, plan, settled
from lit_rlft.loop.watchers import watchers
from lit_rlft.runs.folder import summary_writer

__all__ = ["RewardFineTuner"]


class RewardFineTuner(Sized, Checkpointed, ABC):
    """Improves a pipeline under a reward; subclasses define what to collect and what to minimise.

    One training batch holds the conditions of one round: `collect` draws samples for them, then
    `num_epochs` passes of minibatch updates minimise `loss`. All randomness is a function of
    `seed`, the round and the sample, so a run does not depend on chunk sizes or on the number of
    processes, and a resumed run continues as if it had never stopped.

    Args:
        pipeline: The pretrained model.
        reward: What to improve.
        metrics: Further measurements for `validate` and `test`; no gradient or selection sees them.
        sampler: Discretisation of the sampler, in training and evaluation alike.
        lora: The adapter to train; None fine-tunes all of the denoiser.
        optimizer: From trainable parameters to an optimiser.
        lr_scheduler: From the optimiser to a learning-rate schedule, stepped once per update; a
            ReduceLROnPlateau steps when its `monitor` is logged (train/loss; train/reward for max).
        num_epochs: Passes over the experience of each round.
        minibatch_size: Samples per update over all processes, at most.
        microbatch_size: Samples per backward pass and process, which bounds the memory of training
            and changes no gradient; None takes all of the minibatch, "auto" as many as fit.
        gradient_checkpointing: "blocks" keeps the inputs of the trained network's blocks alone and
            computes the blocks again in the backward pass; None keeps all activations.
        max_grad_norm: Gradients are clipped to this norm; None leaves them alone.
        sampling_batch_size: Samples drawn at a time, for memory; "auto": 64, if they fit.
        num_eval_samples: Samples per condition in `validate`, `test` and `predict`.
        best_of: n of `test`'s baselines best of n samples and of n initial noises; 0 for none.
        dial: Settings at which `test` also draws: how strongly the model is tuned, and which steps.
        reward_workers: Score beside sampling, in other processes or threads; None scores between.
        seed: Seed of all noise.
    """

    checkpointing: tuple[str | None, ...] = ("blocks", None)  # what gradient_checkpointing may be

    def __init__(
        self,
        pipeline: Pipeline,
        reward: Reward,
        *,
        metrics: Metric | None = None,
        sampler: Sampler = Sampler(),
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        num_epochs: int = 1,
        minibatch_size: int = 32,
        microbatch_size: int | Literal["auto"] | None = None,
        gradient_checkpointing: Literal["blocks"] | None = None,
        max_grad_norm: float | None = 1.0,
        sampling_batch_size: int | Literal["auto"] = 64,
        num_eval_samples: int = 4,
        best_of: int = 0,
        dial: Dial | None = None,
        reward_workers: RewardWorkers | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_born(pipeline, reward, metrics)
        self.automatic_optimization = self.strict_loading = False
        self.pipeline, self.reward, self.metrics = pipeline, reward, metrics or Metrics()
        self.sampler, self.lora, self.reward_workers = sampler, lora, reward_workers
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.num_epochs, self.max_grad_norm, self.seed = num_epochs, max_grad_norm, seed
        self.minibatch_size, self.microbatch_size = minibatch_size, microbatch_size
        self.gradient_checkpointing: str | None = gradient_checkpointing
        self.sampling_batch_size, self.num_eval_samples = sampling_batch_size, num_eval_samples
        self.sizes = BatchSizes(microbatch_size, sampling_batch_size, pipeline.batch_sizes())
        self.best_of, self.dial, self.meter, self.pretrained = best_of, dial, Meter(), ""
        self.num_rounds = self.num_samples = self.num_updates = self._collected_at = 0

    @property
    def algorithm(self) -> str:
        """The name under which results are reported."""
        return type(self).__name__

    @property
    def on_policy(self) -> bool:
        """Whether no update has been made since the round's experience was collected."""
        return self.num_updates == self._collected_at

    @abstractmethod
    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw the experience of one round; called without gradients."""

    @abstractmethod
    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses [n] of some samples and values [n] to log; `noise` seeds what is drawn.

        Values are averaged over samples; of those whose name ends in `_max` the largest is logged.
        """

    def check(self) -> None:
        """Raise UsageError where pipeline, reward and settings cannot work together."""

    def build(self) -> None:
        """Build what is trained beside the pipeline's own networks; the settings are checked."""

    def trainable(self) -> nn.Module:
        """Return what is trained, checkpointed and exported."""
        return self.pipeline.denoiser

    def statistics(self) -> Mapping[str, Kept]:
        """Return what else has a state that a resumed run needs, by its name in the checkpoint."""
        return {}

    def export(self, folder: Path) -> list[Path]:
        """Write what was tuned into `folder`; return what was written."""
        return self.pipeline.save(folder)

    def prior(self, condition: Condition) -> Distribution:
        """Return the distribution of x_1; overridden by algorithms that learn it."""
        return self.reference_prior(condition)

    def reference_prior(self, condition: Condition) -> Distribution:
        """Return the process's own distribution of x_1."""
        return self.pipeline.process.prior(self.pipeline.blank(condition))

    def route(self) -> Route:
        """Return how the tuned model draws: unless overridden it runs all steps."""
        process, leg = self.pipeline.process, Leg(self.pipeline, self.sampler.num_steps, tuned=True)
        return Route(process, self.prior, [leg], self.sampler.noise, self.reference.adapter.merged)

    def reference_route(self) -> Route:
        """Return how the pretrained model draws."""
        leg = Leg(self.reference, self.sampler.num_steps, tuned=False)
        return Route(self.pipeline.process, self.reference_prior, [leg], self.sampler.noise)

    def setup(self, stage: str) -> None:
        """Check the settings and attach the adapter; the reference is the model as loaded."""
        if self._trainer is not None:
            admit(self._trainer)
            self.sizes.check(self._trainer)
        if not self.pretrained:
            self._build()
        self.reward = beside(self.reward, self.reward_workers, self._trainer)
        self._listen(self._trainer)

    def configure_callbacks(self) -> list[Callback]:
        """Return who watches over batches, the workers of rewards, and weights that are split."""
        return watchers(self._trainer, self.reward_workers)

    def _listen(self, trainer: Trainer | None) -> None:
        """Make what draws, measures and reports, for a trainer or for none."""
        self.audience, self.round_log = Audience(self, trainer), RoundLog(self.log, trainer)
        drawing = (self.pipeline, self.reward, self.sizes.sampling, self.seed, self.meter)
        self.rollouts = Rollouts(*drawing, partial(track, trainer=trainer))
        self.evaluator = Evaluator(self.rollouts, self.metrics, self.num_eval_samples)
        self.evaluator.phase = self.audience.phase

    def _build(self) -> None:
        check_settings(self)
        self.check()
        check_parts(self.reward, self.pipeline)
        check_parts(self.metrics, self.pipeline)
        self.build()
        self.lora = self.lora and completed(self.lora, self.pipeline)
        pretrained = fingerprint(self.pipeline.denoiser)
        self.reference = adapt(self.pipeline, self.lora, self.seed, anew=hasattr(self, "reference"))
        settle(self.pipeline, self.trainable(), self._trainer)
        checkpoint_blocks(self.trainable(), self.gradient_checkpointing)
        self.meter.watch(self.pipeline, self.trainable(), self.reference)
        self.pretrained = pretrained

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of what is trained; everything else stays in evaluation mode."""
        super().train(False)
        self.training = mode
        self.trainable().train(mode)
        return self

    def configure_optimizers(self) -> Any:
        check_trainer(self.trainer)
        makers = (self.make_optimizer, self.make_lr_scheduler)
        return optimizer_of(list(self._trained().values()), *makers, self.trainer)

    def on_train_start(self) -> None:
        """Set the modes, which Lightning leaves alone, and start the clock."""
        self.train()
        self.meter.start_training()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one round: collect, in evaluation mode, then update."""
        self.eval()
        self._collected_at = self.num_updates
        with together(world_size := self.trainer.world_size), fresh_casts(self.device):
            with self.audience.phase("collect"), torch.no_grad():
                condition = self.pipeline.encode(batch)
                experience = self.collect(batch, condition)
            self.audience.on_experience(experience)
            self.train()
            with self.audience.phase("update"):
                layouts = gather(layout(experience, len(condition), world_size), world_size)
                sizes = (self.num_epochs, self.minibatch_size, self.seed, self.num_rounds)
                updates = plan(experience, layouts, self.global_rank, *sizes)
                idle = idle_of(self.trainer.strategy, self.loss, experience, layouts, self.meter)
                outcomes = [self._update(u, idle) for u in self.rollouts.track(updates, "Training")]
            check_weights(self._trained(), self.num_updates)
            self.sizes.settle(self.trainer)
        self.num_rounds += 1
        self.meter.end_round(gather(self.meter.counts(), world_size))
        means = round_means(experience.metrics, outcomes, world_size)
        means["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        spent, writer = self.meter.spent(self.num_samples), summary_writer(self)
        self.round_log.write(writer, means, spent, experience.histograms, self.num_updates)
        after_round(self.lr_schedulers(), means)

    def _update(self, update: Update, idle: Idle = None) -> dict[str, float]:
        """Take one optimiser step; return what to log: the losses' means and the gradient norm."""
        optimizer, trainer, trained = self.optimizers(), self.trainer, [*self._trained().values()]
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        passes = passes_of(trainer, self.manual_backward, trained, idle)
        loss = self.sizes.filled(self.loss, self.pipeline.denoiser, update, self.meter)
        logged = fitting(update, self.audience.watched(loss), passes, self.sizes, self.meter)
        with finishing(update, passes, self.sizes):
            values, norm = settled(logged, trained, loss_scale(trainer.precision_plugin))
            self.audience.on_gradients(values.get("grad_norm", float("inf")))
            clip(trained, norm, self.max_grad_norm)
            if stepped(optimizer, trainer.precision_plugin):
                self.num_updates += 1
                after_update(self.lr_schedulers())
        return values

    def on_validation_epoch_start(self) -> None:
        """Start a fresh evaluation, not on training's bill; the reference's first one is kept."""
        self.evaluator.start(self.trainer.world_size, keep_reference=True)
        self.meter.start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluator.run(batch, batch_idx, self.route(), self.reference_route())

    def on_validation_epoch_end(self) -> None:
        means = self.evaluator.means()
        self.log_dict({f"val{name}": mean for name, mean in means.items()}, sync_dist=True)
        after_validation(self.lr_schedulers(), means, self.trainer)
        self.meter.end_evaluation()

    def on_test_epoch_start(self) -> None:
        self.evaluator.start(self.trainer.world_size)
        self.meter.start_test()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        routes = (self.route(), self.reference_route())
        dialled = dial_settings(self.dial, routes[0], self.reference)
        condition = self.evaluator.run(batch, batch_idx, *routes, self.best_of, dialled)
        self.meter.look_at(self.pipeline, condition)

    def predict_step(self, batch: Batch, batch_idx: int) -> Draw:
        return self.evaluator.predict(batch, self.route())

    def on_fit_end(self) -> None:
        """Write the tuned model in the format of the domain's own tools; it must be finite."""
        self._write_tuned(self.export, **steps_told(self.route()))
