"""Draws and scores samples in chunks that fit into memory; chunks do not change the noise."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm.auto import tqdm

from lit_rlft.core.batch_size import BatchSize, Part, sized
from lit_rlft.core.pipeline import Batch, Condition, Pipeline
from lit_rlft.core.randomness import Generators, generators, seed_from
from lit_rlft.core.reward import Reward, rewards_of
from lit_rlft.core.state import State, cat, index
from lit_rlft.cost.meter import Meter
from lit_rlft.loop.route import Route
from lit_rlft.loop.side.rewards import begin

__all__ = ["Chunk", "Drawn", "Rollouts", "Scored", "Scores", "Track", "track"]

T = TypeVar("T")
Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Iterates over items and shows under a label how far it is."""

_COMPARED = 8
"""Samples whose first prediction is made with and without merging an adapter, once."""


class Chunk(NamedTuple):
    """Samples that are drawn together.

    Attributes:
        rows: Which of all samples they are.
        condition: One row per sample.
        noise: One generator per sample; None where none were asked for.
        part: The block for the work on them, `with chunk.part:`. Where memory runs out in it, the
            same samples come again in smaller chunks, if their number is automatic.
    """

    rows: slice
    condition: Condition
    noise: Generators
    part: Part


Drawn = Callable[[Chunk, State], None]
"""Takes a chunk of samples and their x_0."""
Scored = Callable[[Any, Condition, Tensor], None]
"""Takes decoded samples, their conditions and their rewards, without a graph."""


class Scores(NamedTuple):
    """What samples are worth.

    Attributes:
        rewards: [B], NaN where scoring failed; of several rewards [B, P] where asked for.
        keys: The samples' de-duplication keys if any.
    """

    rewards: Tensor
    keys: list[Hashable] | None


class Rollouts:
    """Draws and scores samples of a pipeline.

    Args:
        pipeline: Decodes what is drawn.
        reward: Scores it.
        chunk_size: Samples at a time, which bounds the memory.
        seed: Seed of all noise.
        meter: Counts the cost of the reward.
        track: Shows the progress; shows nothing unless it is given.

    Attributes:
        scored: Hears of samples that were scored, if a callback has set it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        reward: Reward,
        chunk_size: int | BatchSize,
        seed: int,
        meter: Meter,
        track: Track = lambda items, label: items,
    ) -> None:
        self.pipeline, self.reward = pipeline, reward
        self.chunk_size, self.seed, self.meter = sized(chunk_size), seed, meter
        self.track: Track = track
        self.scored: Scored | None = None

    def seeds(self, batch: Batch, num: int, *stream: int) -> list[int]:
        """Return `num` seeds for each row of the batch, by the row's place in its data set."""
        rows = batch["index"].tolist()
        return [seed_from(self.seed, *stream, row, i) for row in rows for i in range(num)]

    def chunks(
        self,
        condition: Condition,
        seeds: Sequence[int] | None = None,
        label: str | None = None,
    ) -> Iterator[Chunk]:
        """Iterate over samples in chunks.

        Args:
            condition: One row per sample.
            seeds: One integer per sample, which its generator starts from.
            label: Text of the progress bar; None shows none.
        """
        parts = self.chunk_size.parts(len(condition))
        for part in parts if label is None else self.track(parts, label):
            noise = None if seeds is None else generators(seeds[part.rows])
            counted = replace(self.meter.current)
            yield Chunk(part.rows, condition.index(part.rows), noise, part)
            if part.failed:  # nobody pays for what is done again
                vars(self.meter.current).update(vars(counted))

    def draw(
        self,
        route: Route,
        condition: Condition,
        seeds: Sequence[int],
        *,
        keep: Sequence[int],
        label: str = "Sampling",
        drawn: Drawn | None = None,
    ) -> list[State]:
        """Walk a route and keep the states at some indices of its grid.

        Args:
            route: The route to walk.
            condition: One row per sample.
            seeds: One integer per sample; all its noise comes from it.
            keep: Indices into the grid [num_steps + 1]; num_steps is x_0.
            label: Text of the progress bar.
            drawn: Is told of each chunk when it is done.

        Returns:
            One state per entry of `keep`, all samples concatenated.
        """
        with self.merged(route, condition, seeds):
            return self._draw(route, condition, seeds, keep, label, drawn)

    def _draw(
        self,
        route: Route,
        condition: Condition,
        seeds: Sequence[int],
        keep: Sequence[int],
        label: str,
        drawn: Drawn | None,
    ) -> list[State]:
        kept: list[list[State]] = [[] for _ in keep]
        for chunk in self.chunks(condition, seeds, label):
            with chunk.part:
                found: dict[int, State] = {}
                for i, x in route.walk(chunk.condition, chunk.noise):
                    if i in keep:
                        found[i] = x
                if drawn is not None:
                    drawn(chunk, x)
                for states, wanted in zip(kept, keep, strict=True):
                    states.append(found[wanted])
        return [cat(states) for states in kept]

    def complete(
        self,
        route: Route,
        condition: Condition,
        seeds: Sequence[int],
        x: State,
        *,
        first: int = 0,
        label: str | None = None,
    ) -> State:
        """Walk the rest of a route from given states and return x_0.

        Args:
            route: The route.
            condition: One row per sample.
            seeds: One integer per sample; all its noise comes from it.
            x: States at `route.times[first]`, one per row of `condition`.
            first: Index of the grid to start at.
            label: Text of the progress bar; None shows none.
        """
        parts = []
        for chunk in self.chunks(condition, seeds, label):
            with chunk.part:
                own = (chunk.condition, chunk.noise, index(x, chunk.rows), first)
                *_, (_, x_0) = route.walk(*own)
                parts.append(x_0)
        return cat(parts)

    def merged(
        self, route: Route, condition: Condition, seeds: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Return a context in which a route may draw with its adapter merged.

        Args:
            route: The route; first predictions of the first few samples are those compared.
            condition: One row per sample.
            seeds: One integer per sample.
        """
        few = slice(0, min(self.chunk_size.rows or _COMPARED, _COMPARED))

        def predict() -> State:
            with self.meter.unbilled():
                return route.first_prediction(condition.index(few), generators(seeds[few]))

        return route.merged(predict)

    def score(self, x_0: State, condition: Condition, *, may_fail: bool = False) -> Scores:
        """Decode and score samples.

        Args:
            x_0: The samples, one per row of `condition`.
            condition: One row per sample.
            may_fail: Samples that could not be scored have NaN.

        Raises:
            UsageError: The reward returns something other than a finite number per sample.
        """
        rewards: list[Tensor] = []
        keys: list[Hashable] = []
        for chunk in self.chunks(condition, label="Scoring"):
            with chunk.part:
                samples = self.pipeline.decode(index(x_0, chunk.rows), chunk.condition)
                begin(self.reward, "forward", samples, chunk.condition)
                own = self.reward_of(samples, chunk.condition, may_fail=may_fail)
                keys.extend(self.pipeline.keys(samples, chunk.condition) or [])
                rewards.append(own)
        return Scores(torch.cat(rewards), keys or None)

    def reward_of(self, samples: Any, condition: Condition, *, may_fail: bool = False) -> Tensor:
        """Return the rewards of decoded samples, [B], as `score` does."""
        self.meter.current.reward_calls += len(condition)
        rewards = rewards_of(self.reward, samples, condition, may_fail=may_fail)
        if self.scored is not None:
            self.scored(samples, condition, rewards.detach())
        return rewards


def track(items: Iterable[T], label: str, *, trainer: Trainer | None) -> Iterable[T]:
    """Show a progress bar over `items` on the main process, if the trainer shows tqdm's own.

    The live display of rich fights further bars, in a notebook without end.
    """
    bar = None if trainer is None else trainer.progress_bar_callback
    shown = isinstance(bar, TQDMProgressBar) and trainer is not None and trainer.is_global_zero
    return tqdm(items, label, leave=False, position=1, dynamic_ncols=True, disable=not shown)
