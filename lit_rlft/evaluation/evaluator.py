"""Evaluation: the tuned model, its reference and baselines under the same conditions and noise."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlft.core.answers import any_finite, apart, unchanged
from lit_rlft.core.checks import UsageError
from lit_rlft.core.divergence import path_kl
from lit_rlft.core.figure import Figure
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.randomness import seed_from
from lit_rlft.core.reward import (
    DIVERGENCE,
    Metric,
    SetMetric,
    WeightedSum,
    all_failed,
    check_rewards,
    values_of,
)
from lit_rlft.core.state import State, described, index, num_rows
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, telling
from lit_rlft.evaluation.best_of import best_of
from lit_rlft.evaluation.dial import Setting
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.evaluation.measurements import Arm, Measurements
from lit_rlft.loop.experience import Draw
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.route import Route
from lit_rlft.loop.side.rewards import begin, side_rewards

__all__ = ["Evaluator"]

Phase = Callable[[str, int], AbstractContextManager[Any]]
"""Makes a context that tells what the time within it is spent on, and for how many samples."""

Seen = Callable[[Arm, int, Tensor, Any, Condition, Mapping[str, Tensor]], None]
"""Takes a model's samples of a batch: their number, rows of the data, conditions and values."""

_HOPELESS = 64
"""So many first samples that all failed end an evaluation before the rest is drawn."""


class _Drawn(NamedTuple):
    """Samples that wait for their measurement: the arguments of `Evaluator._measure`, decoded."""

    arm: Arm
    batch_idx: int
    rows: Tensor
    samples: Any
    condition: Condition
    known: dict[str, Tensor]


class Evaluator:
    """Draws samples, measures them and summarises the measurements.

    Args:
        rollouts: Draws samples of a pipeline; its reward is measured, and best-of-n chooses by it.
        metrics: Further measurements.
        num_samples: Samples per condition.

    Attributes:
        latest: The `summary` that `means` was last made of.
        known: The last `summary` of this evaluation, for others that need no more than its means.
        world_size: Processes that share it; one that fails tells the others.
        num_pictures: First samples to render, over all processes; see `show`.
        keeps_figures: Whether drawings of these samples are kept too.
        seen: Hears of all samples that were measured, if a callback has set it.
        phase: Reports what the time is spent on.
    """

    def __init__(self, rollouts: Rollouts, metrics: Metric, num_samples: int) -> None:
        self.rollouts, self.metrics, self.num_samples = rollouts, metrics, num_samples
        self.pipeline, self.reward = rollouts.pipeline, rollouts.reward
        self._measurements, self.num_pictures, self.world_size = Measurements(), 0, 1
        self._said = False
        self._num_failed = self._num_asked = 0
        self._hopeful = self._finite = False
        self.keeps_figures = False
        self.seen: Seen | None = None
        self._best: Arm | None = None
        self._waiting: deque[_Drawn] = deque()
        self.latest: dict[Arm, dict[str, Moments]] = {}
        self.known: dict[Arm, dict[str, Moments]] = {}
        self.phase: Phase = lambda name, num_samples: nullcontext()

    @property
    def measurements(self) -> Measurements:
        """Those of the present evaluation; waits for rewards that are still on their way."""
        if self._waiting:
            with telling(self.world_size), self.phase("measure", 0):
                self._take_all(leave=0)
        return self._measurements

    @property
    def set_metrics(self) -> list[SetMetric]:
        """The metrics of all samples of an evaluation together."""
        return [part for part in self.metrics.modules() if isinstance(part, SetMetric)]

    def show(self, num_samples: int) -> None:
        """Render so many first samples at least; each process renders its share of them.

        `kept.first_of_all` brings them together.
        """
        self.num_pictures = max(self.num_pictures, num_samples)

    def start(self, world_size: int = 1, *, keep_reference: bool = False) -> None:
        """Start a fresh evaluation by all processes; the reference's measurements can be kept."""
        self.world_size = world_size
        self._num_failed = self._num_asked = 0
        self._waiting.clear()
        self.known = {}
        kept = self._measurements.reference if keep_reference else None
        self._measurements, self._best = Measurements(kept), None
        if isinstance(self.reward, WeightedSum) and self.reward.moments:
            self._combine_again(self.reward)

    def _combine_again(self, reward: WeightedSum) -> None:
        """Bring the reference's sums to the present unit, in which the tuned model's will be."""
        values = self._measurements.reference.values
        for batch in values.get(reward.name, ()):
            parts = {name: values[name][batch] for name in reward.counted}
            values[reward.name][batch] = reward.combined(parts)

    def run(
        self,
        batch: Batch,
        batch_idx: int,
        tuned: Route,
        reference: Route,
        num_best: int = 0,
        settings: Iterable[Setting] = (),
    ) -> Condition:
        """Measure the models on one batch, the reference where it was not measured before.

        Args:
            batch: The conditions.
            batch_idx: Its number.
            tuned: The tuned model's route.
            reference: The reference's.
            num_best: n of the best-of-n baselines; 0 leaves them out.
            settings: Further settings of the tuned model.

        Returns:
            The conditions, one row per sample.
        """
        with telling(self.world_size):
            condition, seeds = self._conditions(batch)
            rows = batch["index"].repeat_interleave(self.num_samples)
            common = batch_idx, rows, condition, seeds
            self._measure_route("tuned", *common, tuned, kl_from=reference)
            if not self._measurements.reference.has(batch_idx, rows):
                self._measurements.reference.forget(batch_idx)  # a loader may shuffle
                self._measure_route("reference", *common, reference)
            for setting in settings:
                with setting.active():
                    self._measure_route(setting.arm, *common, setting.route, kl_from=reference)
            if num_best:
                arms = best_of(self.rollouts, reference, condition, seeds, num_best)
                self._best = next(iter(arms))
                for arm, x_0 in arms.items():
                    self._measure(arm, batch_idx, rows, x_0, condition)
        return condition

    def predict(self, batch: Batch, route: Route) -> Draw:
        """Draw samples and score them, on nobody's bill."""
        condition, seeds = self._conditions(batch)
        with self.rollouts.meter.unbilled():
            x_0 = self._draw("tuned", condition, seeds, route)
            samples = self.pipeline.decode(x_0, condition)
            asks = self.reward.asks
            rewards = self.rollouts.reward_of(samples, condition, may_fail=asks)
        return Draw(samples, condition, seeds, rewards)

    def summary(self, *, errors: bool = False) -> dict[Arm, dict[str, Moments]]:
        """Return mean and standard error per arm and metric (`Measurements.summary`).

        Raises:
            UsageError: No sample of any process could be scored.
        """
        sets, best, measurements = self.set_metrics, self._best, self.measurements
        found = measurements.summary(self.world_size, sets, errors=errors, best=best)
        own = (self._num_failed, self._num_asked, measurements.tuned.num_samples, self._finite)
        failed, asked, tuned, finite = map(sum, zip(*gather(own, self.world_size), strict=True))
        scores = found["tuned"].get(self.reward.name)
        if scores is not None and math.isnan(scores["mean"]) and not self.reward.asks:
            raise all_failed(self.reward.name, tuned, finite=finite > 0)
        self._say_failed(failed, asked)
        self.known = found
        return found

    def means(self) -> dict[str, float]:
        """Return the means of `summary` by "/<metric>", and by "_<arm>/<metric>" of other arms."""
        self.latest = self.summary()
        return {
            f"{'' if arm == 'tuned' else f'_{arm}'}/{name}": moments["mean"]
            for arm, summary in self.latest.items()
            for name, moments in summary.items()
        }

    def _conditions(self, batch: Batch) -> tuple[Condition, list[int]]:
        condition = self.pipeline.encode(batch).repeat(self.num_samples)
        return condition, self.rollouts.seeds(batch, self.num_samples, Stream.EVALUATE)

    def _draw(self, arm: Arm, condition: Condition, seeds: Sequence[int], route: Route) -> State:
        ends, label = [route.num_steps], f"Sampling ({arm})"
        (x_0,) = self.rollouts.draw(route, condition, seeds, keep=ends, label=label)
        return x_0

    def _measure_route(
        self,
        arm: Arm,
        batch_idx: int,
        rows: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        route: Route,
        kl_from: Route | None = None,
    ) -> None:
        with self.phase(f"sample_{arm}", len(condition)):
            x_0 = self._draw(arm, condition, seeds, route)
        kl = torch.zeros(len(condition))
        if kl_from is not None:
            kl = self._divergence(x_0, condition, seeds, route, kl_from)
        with self.phase("measure", 0):
            self._measure(arm, batch_idx, rows, x_0, condition, kl=kl)

    def _measure(
        self,
        arm: Arm,
        batch_idx: int,
        rows: Tensor,
        x_0: State,
        condition: Condition,
        **known: Tensor,
    ) -> None:
        """Decode and measure samples of some rows; `known` holds the values known already.

        Where workers score them, they are measured once further samples are drawn.
        """
        samples = self.pipeline.decode(x_0, condition)
        begin(self.reward, "evaluate", samples, condition)
        self._waiting.append(_Drawn(arm, batch_idx, rows, samples, condition, known))
        sides, chunk = side_rewards(self.reward), self.rollouts.chunk_size.rows or len(condition)
        self._take_all(leave=sides[0].workers.ahead * chunk if sides else 0)

    def _take_all(self, leave: int) -> None:
        """Measure what waits, in order, down to `leave` samples; the newest may be more."""
        while self._waiting and (
            not leave or sum(len(one.condition) for one in list(self._waiting)[:-1]) > leave
        ):
            self._take(self._waiting.popleft())

    def _take(self, drawn: "_Drawn") -> None:
        arm, batch_idx, rows, samples, condition, known = drawn
        values = values_of(self.reward, samples, condition)
        self._check_scored(values[self.reward.name], len(condition), samples)
        # A reward without bounds leaves a sample out as a failed one does, in training too.
        values = {name: v.where(v.isfinite(), torch.nan) for name, v in values.items()}
        taken: dict[str, Any] = {DIVERGENCE: None, **known}  # in every arm, so that names agree
        values = apart(taken, values)
        others = apart(taken | values, values_of(self.metrics, samples, condition))
        values |= others | known
        pictures, figures = self._pictures(arm, samples, condition)
        labels = [self.pipeline.describe(entry) for entry in condition.each()]
        features = [_features(metric, samples, condition) for metric in self.set_metrics]
        measured = (values, pictures, labels, features, rows, figures)
        self._measurements.add(arm, batch_idx, *measured)
        if self.seen is not None:
            self.seen(arm, batch_idx, rows, samples, condition, values)

    def _check_scored(self, rewards: Any, num_samples: int, samples: Any) -> None:
        """Check rewards; say once that some are missing, and stop where there never were any.

        A person is asked in training alone. One of several processes does not stop: `summary`
        knows the rewards of all.
        """
        found = check_rewards(self.reward, rewards, num_samples, may_fail=True).isfinite()
        if self.reward.asks:
            return
        failed = int((~found).sum())
        self._num_failed, self._num_asked = self._num_failed + failed, self._num_asked + num_samples
        self._hopeful |= failed < num_samples
        self._finite = self._finite or failed < num_samples or any_finite(samples)
        if not self._hopeful and self.world_size == 1 and self._num_failed >= _HOPELESS:
            raise all_failed(self.reward.name, self._num_failed, finite=self._finite)
        self._say_failed(failed, num_samples)

    def _say_failed(self, failed: int, num_samples: int) -> None:
        """Say once, on the first process, that some rewards are missing."""
        if failed and not self._said:
            self._said = True
            rank_zero_warn(
                f"{self.reward.name} failed for {failed} of {num_samples} samples of an "
                "evaluation, which are left out of its means; further failures are not said"
            )

    def _pictures(
        self, arm: Arm, samples: Any, condition: Condition
    ) -> tuple[Tensor | None, list[Figure] | None]:
        """Render only what is still to be shown: some domains render more slowly than sample."""
        if arm not in ("tuned", "reference"):
            return None, None
        missing = self._share() - self._measurements.arms[arm].num_pictures
        rows = torch.arange(max(0, min(missing, len(condition))))
        if not len(rows):
            return None, None
        chosen = self.pipeline.index_samples(samples, rows), condition.index(rows)
        figures = self.pipeline.figures(*chosen) if self.keeps_figures else None
        return self.pipeline.render(*chosen), figures

    def _share(self) -> int:
        """Return how many samples this process renders: those of its share of the first rows."""
        if self.world_size == 1:
            return self.num_pictures
        rows = math.ceil(self.num_pictures / self.num_samples)
        return math.ceil(rows / self.world_size) * self.num_samples

    def _divergence(
        self, x_0: State, condition: Condition, seeds: Sequence[int], route: Route, other: Route
    ) -> Tensor:
        """Estimate the KL of a route's paths from another route's, [B]."""
        prior = route.prior(condition).kl(other.prior(condition))
        tuned = [leg.denoiser for leg in route.legs if leg.tuned and leg.num_steps]
        if not tuned:
            return prior
        times, steps = route.times, route.tuned_steps
        (reference,) = {leg.denoiser for leg in other.legs}
        parts = []
        merged = self.rollouts.merged(route, condition, seeds)
        with self.rollouts.meter.unbilled(), merged:
            own = [seed_from(seed, Stream.DIVERGENCE) for seed in seeds]
            for chunk in self.rollouts.chunks(condition, own):
                with chunk.part:
                    x = index(x_0, chunk.rows)
                    args = (tuned[0], reference, x, chunk.condition, times, steps, chunk.noise)
                    parts.append(path_kl(route.process, *args, route.ends))
        return prior + torch.cat(parts)


def _features(metric: SetMetric, samples: Any, condition: Condition) -> dict[str, Tensor]:
    """Return the features that a metric of whole sets needs, which must not change the samples."""
    name, num = type(metric).__name__, len(condition)
    with unchanged(samples, name):
        found: Any = metric.features(samples, condition)
    if not isinstance(found, dict):
        raise UsageError(f"{name}.features returned {described(found)}; it is a dict of tensors")
    for key, value in found.items():
        if not isinstance(value, Tensor) or num_rows(value) != num:
            raise UsageError(
                f"{name}.features returned {described(value)} as {key!r}; each is a tensor with a "
                f"row per sample, [{num}, ...]"
            )
    return found
