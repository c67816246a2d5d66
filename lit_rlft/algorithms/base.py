"""The loop that every algorithm shares: collect experience, train on it, evaluate."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_rlft.core.advantage import Advantage
from lit_rlft.core.checks import require
from lit_rlft.core.distribution import Distribution
from lit_rlft.core.divergence import path_kl
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.reward import Metric, Metrics, Reward, SetMetric, check_rewards
from lit_rlft.core.samples import Samples
from lit_rlft.core.sampling import Denoiser, Sampler, walk
from lit_rlft.core.state import State, batch_size, cat, index, split
from lit_rlft.core.streams import Stream
from lit_rlft.cost.counters import Cost, count_calls, count_flops, flops_per_call, peak_memory_bytes
from lit_rlft.evaluation.best_of import best_of
from lit_rlft.evaluation.measurements import Arm, Evaluation
from lit_rlft.loop import checkpoint as contents
from lit_rlft.loop.hooks import Observer
from lit_rlft.loop.reference import LoRA, Reference, attach_lora
from lit_rlft.loop.round_log import log_round
from lit_rlft.loop.updates import Updates
from lit_rlft.runs.folder import run_folder

__all__ = ["Draw", "Experience", "Prior", "Relay", "RewardFineTuner"]

T = TypeVar("T")
Relay = Sequence[tuple[Denoiser, int]]
"""Who denoises how many steps, in the sampler's order."""
Prior = Callable[[Condition], Distribution]
"""From conditions to the law of x_1."""


@dataclass(frozen=True)
class Experience:
    """What one collect returns and the updates train on: n samples and what is known of them.

    Attributes:
        states: Named states, each with n rows (e.g. the accepted x_tau).
        condition: n rows.
        seeds: n integers that seed each sample's noise during the updates.
        metrics: Numbers to log, averaged over the processes where they are not NaN.
        histograms: Values to show as histograms, by name.
    """

    states: Mapping[str, State]
    condition: Condition
    seeds: Sequence[int]
    metrics: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return n."""
        return len(self.seeds)

    @property
    def num_terms(self) -> int:
        """Number of terms of the loss, which microbatches share out: here one per sample."""
        return len(self)

    def terms(self, rows: Tensor) -> "Experience":
        """Select terms of the loss, as many rows."""
        return self.index(rows)

    def index(self, rows: Tensor) -> "Experience":
        """Select samples."""
        states = {name: index(state, rows) for name, state in self.states.items()}
        seeds = [self.seeds[row] for row in rows.tolist()]
        return Experience(states, self.condition.index(rows), seeds)


@dataclass(frozen=True)
class Draw:
    """Decoded samples with their conditions, the integers their noise came from, their rewards."""

    samples: Any
    condition: Condition
    seeds: Sequence[int]
    rewards: Tensor

    def to(self, device: torch.device | str) -> "Draw":
        """Move samples and rewards, as Lightning does with predictions that it keeps."""
        movable = isinstance(self.samples, Tensor | Samples)
        samples = self.samples.to(device) if movable else self.samples
        return replace(self, samples=samples, rewards=self.rewards.to(device))


class RewardFineTuner(LightningModule, ABC):
    """Improves a pipeline under a reward; subclasses say what to collect and what to minimise.

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
        lr_scheduler: From the optimiser to a learning-rate schedule, stepped once per update.
        num_epochs: Passes over the experience of each round.
        minibatch_size: Samples per update on each process, at most.
        microbatch_size: Samples per backward pass, which bounds the memory of training; None
            takes the whole minibatch. Gradients do not depend on it.
        max_grad_norm: Gradients are clipped to this norm; None leaves them alone.
        sampling_batch_size: Samples drawn at a time, which bounds the sampler's memory.
        num_eval_samples: Samples per condition in `validate`, `test` and `predict`.
        best_of: n of the best-of-n baselines that `test` draws from the reference beside it: the
            best of n samples, and a sample from the best of n initial noises; 0 leaves them out.
        seed: Seed of all noise.
    """

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
        microbatch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        sampling_batch_size: int = 64,
        num_eval_samples: int = 4,
        best_of: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.pipeline = pipeline
        self.reward = reward
        self.metrics = metrics or Metrics()
        self.sampler = sampler
        self.lora = lora
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.num_epochs, self.minibatch_size = num_epochs, minibatch_size
        self.microbatch_size, self.max_grad_norm = microbatch_size, max_grad_norm
        self.sampling_batch_size = sampling_batch_size
        self.num_eval_samples, self.best_of = num_eval_samples, best_of
        self.seed = seed
        self.reference: Reference | None = None
        self.pretrained = ""
        self.evaluation = Evaluation()
        self.num_pictures = 0
        """Samples of an evaluation that are rendered; who shows them raises it."""
        self.updates = Updates(self)
        self.num_rounds = self.num_samples = self.num_updates = 0
        self._collected_at = 0
        self.cost = self._meter = Cost()
        self._started = self._seconds_before = 0.0
        self._flops = 0

    @property
    def algorithm(self) -> str:
        """The name under which results are reported."""
        return type(self).__name__

    @property
    def observers(self) -> list[Observer]:
        """The trainer's callbacks that watch rounds from inside."""
        callbacks = getattr(self.trainer, "callbacks", [])
        return [one for one in callbacks if isinstance(one, Observer) and one.enabled]

    @property
    def set_metrics(self) -> list[SetMetric]:
        """The metrics of all samples of an evaluation together."""
        return [part for part in self.metrics.modules() if isinstance(part, SetMetric)]

    @property
    def meter(self) -> Cost:
        """The counters that count at present: training's, or those of an evaluation."""
        return self._meter

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

    def statistics(self) -> Mapping[str, Advantage]:
        """Return what else a resumed run has to know, by its name in the checkpoint."""
        return {}

    def trainable(self) -> nn.Module:
        """Return what is trained, checkpointed and exported."""
        return self.pipeline.denoiser

    def denoisers(self) -> list[nn.Module]:
        """Return the pipeline's denoiser, and the reference's where that is another one."""
        assert self.reference is not None
        frozen = self.reference.frozen
        return [self.pipeline.denoiser, *([] if frozen is None else [frozen])]

    def prior_networks(self) -> list[nn.Module]:
        """Return what is trained beside the pipeline, to draw where its sampler starts."""
        inside = {id(module) for module in self.pipeline.modules()}
        beside = self.trainable()
        return [] if id(beside) in inside else [beside]

    def policy(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the prediction of the model being tuned."""
        return self.pipeline(x_t, t, condition)

    def reference_policy(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the prediction of the frozen pretrained model."""
        assert self.reference is not None
        with self.reference.active(self.pipeline):
            return self.pipeline(x_t, t, condition)

    def relay(self) -> Relay:
        """Return who denoises which steps when the tuned model samples."""
        return [(self.policy, self.sampler.num_steps)]

    def reference_relay(self) -> Relay:
        """Return the pretrained model for all steps."""
        return [(self.reference_policy, self.sampler.num_steps)]

    def prior(self, condition: Condition) -> Distribution:
        """Return the law of x_1; overridden by algorithms that learn it."""
        return self.reference_prior(condition)

    def reference_prior(self, condition: Condition) -> Distribution:
        """Return the process's own law of x_1."""
        return self.pipeline.process.prior(self.pipeline.blank(condition))

    def setup(self, stage: str) -> None:
        """Check the settings and attach the adapter; the reference is the model as loaded."""
        if self.reference is not None:
            return
        self._check_settings()
        self.check()
        for part in (*self.reward.modules(), *self.metrics.modules()):
            if isinstance(part, Metric):
                part.check(self.pipeline)
        self.build()
        self.reward.requires_grad_(False)
        self.metrics.requires_grad_(False)
        self.pretrained = contents.fingerprint(self.pipeline.denoiser)
        if self.lora is not None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                attach_lora(self.pipeline, self.lora)
        self.reference = Reference(self.pipeline, adapted=self.lora is not None)
        for denoiser in self.denoisers():
            count_calls(denoiser, lambda: self._meter)
        for network in self.prior_networks():
            count_calls(network, lambda: self._meter, "prior_calls")
        for network in (*self.denoisers(), *self.prior_networks()):
            count_flops(network, lambda: self._meter)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of what is trained; everything else stays in evaluation mode."""
        super().train(False)
        self.training = mode
        self.trainable().train(mode)
        return self

    def configure_optimizers(self) -> Any:
        """Build the optimiser over what is trainable."""
        parameters = [p for p in self.trainable().parameters() if p.requires_grad]
        optimizer = self.make_optimizer(parameters)
        if self.make_lr_scheduler is None:
            return optimizer
        return [optimizer], [self.make_lr_scheduler(optimizer)]

    def on_train_start(self) -> None:
        """Set the modes, which Lightning leaves alone, and start the clock."""
        self.train()
        self._meter, self._started = self.cost, time.monotonic()
        self._seconds_before = self.cost.seconds

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one round: collect, in evaluation mode, then update."""
        self.eval()
        self._collected_at = self.num_updates
        with self.phase("collect"), torch.no_grad():
            experience = self.collect(batch, self.pipeline.encode(batch))
        for observer in self.observers:
            observer.on_experience(self, experience)
        self.train()
        with self.phase("update"):
            outcomes = [
                self.updates.take(update)
                for update in self.track(self.updates.plan(experience), "Training")
            ]
        self.num_rounds += 1
        self.cost.seconds = self._seconds_before + time.monotonic() - self._started
        log_round(self, experience, outcomes)

    def draw_states(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        keep: Sequence[int],
        relay: Relay,
        prior: Prior | None = None,
        label: str = "Sampling",
    ) -> list[State]:
        """Sample trajectories in chunks and keep the states at some indices of the grid.

        Args:
            condition: One row per sample.
            seeds: One integer per sample; all its noise comes from it.
            keep: Indices into the grid [num_steps + 1] (num_steps is x_0).
            relay: Who denoises which steps.
            prior: The law of x_1; None takes the tuned model's.
            label: Text of the progress bar.

        Returns:
            One state per entry of `keep`, all samples concatenated.
        """
        prior = prior or self.prior
        kept: list[list[State]] = [[] for _ in keep]
        starts = range(0, len(condition), self.sampling_batch_size)
        for start in self.track(starts, label):
            chunk = slice(start, start + self.sampling_batch_size)
            part, noise = condition.index(chunk), generators(seeds[chunk])
            for i, x in self._walk(relay, part, prior(part).sample(noise), noise):
                for slot, wanted in enumerate(keep):
                    if i == wanted:
                        kept[slot].append(x)
        return [cat(states) for states in kept]

    def _walk(
        self, relay: Relay, condition: Condition, x: State, noise: Generators
    ) -> Iterator[tuple[int, State]]:
        """Iterate over (i, x at times[i]) from x_1 on; several denoisers run in turn."""
        process, first = self.pipeline.process, 0
        times = process.times(self.sampler.num_steps)
        yield 0, x
        for denoiser, num_steps in relay:
            leg = times[first : first + num_steps + 1]
            for i, state in walk(denoiser, process, x, condition, leg, self.sampler.eta, noise):
                if i:
                    yield first + i, (x := state)
            first += num_steps

    def score(
        self, x_0: State, condition: Condition, *, may_fail: bool = False
    ) -> tuple[Tensor, list[Hashable] | None]:
        """Decode and score samples in chunks; return rewards [B] and de-duplication keys.

        Rewards are NaN for samples that could not be scored, which stops the run unless they
        `may_fail`.
        """
        rewards: list[Tensor] = []
        keys: list[Hashable] = []
        first = 0
        for chunk in self.track(list(split(x_0, self.sampling_batch_size)), "Scoring"):
            part = condition.index(slice(first, first + batch_size(chunk)))
            first += batch_size(chunk)
            samples = self.pipeline.decode(chunk, part)
            rewards.append(self.reward_of(samples, part, may_fail=may_fail))
            keys.extend(self.pipeline.keys(samples, part) or [])
        return torch.cat(rewards), keys or None

    def sample_seeds(self, batch: Batch, num: int, *stream: int) -> list[int]:
        """Return `num` seeds for each row of the batch, by the row's place in its data set."""
        rows = batch["index"].tolist()
        return [seed_from(self.seed, *stream, row, i) for row in rows for i in range(num)]

    @contextmanager
    def phase(self, name: str, num_samples: int = 0) -> Iterator[None]:
        """Tell the observers what the time within the block is spent on."""
        for observer in self.observers:
            observer.on_phase_start(self, name)
        try:
            yield
        finally:
            for observer in self.observers:
                observer.on_phase_end(self, name, num_samples)

    def track(self, items: Iterable[T], label: str) -> Iterable[T]:
        """Show a progress bar over `items` on the main process, if the trainer shows any."""
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        return tqdm(items, label, leave=False, position=1, dynamic_ncols=True, disable=not shown)

    def on_validation_epoch_start(self) -> None:
        """Start a fresh evaluation, not on training's bill; the reference's first one is kept."""
        self.evaluation = Evaluation(self.evaluation.reference)
        self._meter = Cost()

    def on_test_epoch_start(self) -> None:
        """Start a fresh evaluation, with a clock and counters of its own."""
        self.evaluation = Evaluation()
        self._meter, self._started = Cost(), time.monotonic()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the tuned model, and once the reference, on the same noise."""
        condition = self.pipeline.encode(batch).repeat(self.num_eval_samples)
        known = self.evaluation.reference.has(batch_idx)
        self._evaluate(batch, batch_idx, condition, ["tuned"] if known else ["tuned", "reference"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the tuned model, the reference and baselines on the same conditions."""
        condition = self.pipeline.encode(batch).repeat(self.num_eval_samples)
        self._evaluate(batch, batch_idx, condition, ["tuned", "reference"])
        if self.best_of:
            seeds = self._eval_seeds(batch)
            for arm, x_0 in best_of(self, condition, seeds, self.best_of).items():
                self._measure(arm, batch_idx, x_0, condition)
        if not self._flops:
            meter, self._meter = self._meter, Cost()  # looking costs nothing
            self._flops = flops_per_call(self.pipeline, condition)
            self._meter = meter

    def predict_step(self, batch: Batch, batch_idx: int) -> Draw:
        """Draw samples from the tuned model and score them."""
        condition = self.pipeline.encode(batch).repeat(self.num_eval_samples)
        x_0, seeds = self._draw(batch, condition, "tuned")
        samples = self.pipeline.decode(x_0, condition)
        return Draw(samples, condition, seeds, self.reward_of(samples, condition))

    def on_validation_epoch_end(self) -> None:
        """Log every metric of the tuned model and of the reference."""
        summaries = self.evaluation.summary(self.trainer.world_size, self.set_metrics)
        for arm, summary in summaries.items():
            prefix = "val" if arm == "tuned" else f"val_{arm}"
            for name, moments in summary.items():
                self.log(f"{prefix}/{name}", moments["mean"], sync_dist=True)
        self._meter = self.cost

    def cost_report(self) -> dict[str, Any]:
        """Return what training and the test spent, over all processes."""
        world, test = self.trainer.world_size, self._meter
        return {
            "denoiser_calls": self.cost.denoiser_calls * world,
            "prior_calls": self.cost.prior_calls * world,
            "reward_calls": self.cost.reward_calls * world,
            "flops": self.cost.flops * world,
            "seconds": self.cost.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "test_denoiser_calls": test.denoiser_calls * world,
            "test_prior_calls": test.prior_calls * world,
            "test_reward_calls": test.reward_calls * world,
            "test_flops": test.flops * world,
            "test_seconds": time.monotonic() - self._started,
            "flops_per_denoiser_call": self._flops,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, counters, statistics, and the pretrained model's fingerprint."""
        contents.reduce(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore all but the weights; raise UsageError for a checkpoint of another model."""
        contents.restore(checkpoint, self)

    def export(self, folder: Path) -> list[Path]:
        """Write what was tuned into `folder`; return what was written."""
        return self.pipeline.save(folder)

    def on_fit_end(self) -> None:
        """Write the tuned model in the format of the domain's own tools."""
        if self.trainer.is_global_zero and self.num_updates:
            for path in self.export(run_folder(self.trainer) / "tuned"):
                rank_zero_info(f"tuned model: {path}")

    def _eval_seeds(self, batch: Batch) -> list[int]:
        return self.sample_seeds(batch, self.num_eval_samples, Stream.EVALUATE)

    def _draw(self, batch: Batch, condition: Condition, arm: Arm) -> tuple[State, list[int]]:
        seeds = self._eval_seeds(batch)
        tuned = arm == "tuned"
        (x_0,) = self.draw_states(
            condition,
            seeds,
            keep=[self.sampler.num_steps],
            relay=self.relay() if tuned else self.reference_relay(),
            prior=self.prior if tuned else self.reference_prior,
            label=f"Sampling ({arm})",
        )
        return x_0, seeds

    def _evaluate(
        self, batch: Batch, batch_idx: int, condition: Condition, arms: Sequence[Arm]
    ) -> None:
        for arm in arms:
            with self.phase(f"sample_{arm}", len(condition)):
                x_0, seeds = self._draw(batch, condition, arm)
            kl = torch.zeros(len(condition))
            if arm == "tuned":
                kl = self._divergence(x_0, condition, seeds)
            with self.phase("measure"):
                self._measure(arm, batch_idx, x_0, condition, kl=kl)

    def _measure(
        self, arm: Arm, batch_idx: int, x_0: State, condition: Condition, **known: Tensor
    ) -> None:
        """Decode and measure samples; `known` are values that are known already."""
        samples = self.pipeline.decode(x_0, condition)
        values = self.reward.evaluate(samples, condition)
        check_rewards(self.reward, values[self.reward.name], len(condition))
        values |= self.metrics.evaluate(samples, condition) | known
        pictures = self._pictures(arm, samples, condition)
        labels = [self.pipeline.describe(entry) for entry in condition.each()]
        features = [metric.features(samples, condition) for metric in self.set_metrics]
        self.evaluation.add(arm, batch_idx, values, pictures, labels, features)

    def _pictures(self, arm: Arm, samples: Any, condition: Condition) -> Tensor | None:
        """Render what is still to be shown of a model: some domains take longer than to sample."""
        if arm not in ("tuned", "reference") or not self.trainer.is_global_zero:
            return None
        missing = self.num_pictures - self.evaluation.arms[arm].num_pictures
        rows = torch.arange(max(0, min(missing, len(condition))))
        if not len(rows):
            return None
        return self.pipeline.render(
            self.pipeline.index_samples(samples, rows), condition.index(rows)
        )

    def _divergence(self, x_0: State, condition: Condition, seeds: Sequence[int]) -> Tensor:
        """Estimate the KL of the tuned model's paths from the reference's, [B]."""
        prior = self.prior(condition).kl(self.reference_prior(condition))
        tuned = torch.tensor([who == self.policy for who, n in self.relay() for _ in range(n)])
        if not tuned.any():
            return prior
        process, meter = self.pipeline.process, self._meter
        self._meter = Cost()  # looking costs nothing
        times = process.times(self.sampler.num_steps)
        parts, first = [], 0
        for x in split(x_0, self.sampling_batch_size):
            chunk = slice(first, first := first + batch_size(x))
            noise = generators([seed_from(seed, Stream.DIVERGENCE) for seed in seeds[chunk]])
            args = (self.policy, self.reference_policy, x, condition.index(chunk), times, tuned)
            parts.append(path_kl(process, *args, noise))
        self._meter = meter
        return prior + torch.cat(parts)

    def reward_of(self, samples: Any, condition: Condition, *, may_fail: bool = False) -> Tensor:
        """Score decoded samples, [B]; raises UsageError where the reward returns something else.

        NaN counts as something else unless samples `may_fail`.
        """
        self._meter.reward_calls += len(condition)
        values = self.reward(samples, condition)
        return check_rewards(self.reward, values, len(condition), may_fail=may_fail)

    def _check_settings(self) -> None:
        for name in ("num_epochs", "minibatch_size", "sampling_batch_size", "num_eval_samples"):
            require(getattr(self, name) >= 1, name, "at least 1")
        require(self.best_of != 1 and self.best_of >= 0, "best_of", "2 or more, or 0 for none")
