"""Routes and rollouts: who runs which steps, in which chunks, from which noise."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators
from lit_rlft.core.state import State, tensor_of
from lit_rlft.cost.meter import Meter
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.route import Leg, Route

T, NUM = 6, 5


def route_of(*legs: tuple[int, bool], eta: float = 1.0) -> tuple[Route, list[int]]:
    """Return a route and a list that grows by the number of the leg that was called."""
    pipeline, called = GaussianMixturePipeline(), []  # type: ignore[var-annotated]

    def counted(leg: int) -> Any:
        def denoise(x_t: State, t: Tensor, condition: Condition) -> State:
            called.append(leg)
            return pipeline(x_t, t, condition)

        return denoise

    made = [Leg(counted(i), num, tuned) for i, (num, tuned) in enumerate(legs)]
    prior = lambda condition: pipeline.process.prior(pipeline.blank(condition))  # noqa: E731
    return Route(pipeline.process, prior, made, eta), called


def conditions(num: int = NUM) -> Condition:
    return GaussianMixturePipeline().encode({"index": torch.arange(num)})


def walked(route: Route, x_1: State | None = None) -> list[Tensor]:
    steps = list(route.walk(conditions(), generators(range(NUM)), x_1))
    assert [i for i, _ in steps] == list(range(T + 1))
    return [tensor_of(x) for _, x in steps]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_legs_make_one_walk(eta: float) -> None:
    whole, _ = route_of((T, True), eta=eta)
    parts, called = route_of((2, True), (0, False), (4, False), eta=eta)
    assert parts.num_steps == T and torch.equal(parts.times, whole.times)
    for one, other in zip(walked(whole), walked(parts), strict=True):
        assert torch.equal(one, other)
    assert called == [0, 0, 2, 2, 2, 2]


def test_a_route_says_which_steps_are_tuned() -> None:
    route, _ = route_of((2, True), (4, False))
    assert route.tuned_steps.tolist() == [True] * 2 + [False] * 4
    assert not route.deterministic and replace(route, eta=0.0).deterministic


def test_a_walk_can_start_where_it_is_told_to() -> None:
    route, _ = route_of((T, True), eta=0.0)
    states = walked(route)
    again = walked(route, states[0])
    assert torch.equal(again[-1], states[-1])
    other = walked(route, states[0] + 1)
    assert not torch.allclose(other[-1], states[-1])


def rollouts_of(chunk_size: int) -> tuple[Rollouts, list[str]]:
    rollouts, labels = Rollouts(GaussianMixturePipeline(), Coordinate(), chunk_size, 0, Meter()), []

    def tracked(items: Iterable[Any], label: str) -> Iterable[Any]:
        labels.append(label)
        return items

    rollouts.track = tracked
    return rollouts, labels


def test_samples_do_not_depend_on_their_chunks() -> None:
    route, _ = route_of((T, True))
    drawn = []
    for size in (1, 2, 100):
        rollouts, labels = rollouts_of(size)
        x_1, x_0 = rollouts.draw(route, conditions(), range(NUM), keep=[0, T], label="Here")
        scores = rollouts.score(x_0, conditions())
        assert labels == ["Here", "Scoring"] and len(scores.keys or []) == NUM
        assert rollouts.meter.current.reward_calls == NUM
        torch.testing.assert_close(scores.rewards, tensor_of(x_0)[:, 0])
        drawn.append(torch.cat([tensor_of(x_1), tensor_of(x_0)]))
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0])


def test_chunks_cover_every_row_once() -> None:
    rollouts, labels = rollouts_of(2)
    chunks = list(rollouts.chunks(conditions(), range(NUM)))
    assert [chunk.rows for chunk in chunks] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [len(chunk.condition) for chunk in chunks] == [2, 2, 1] and not labels
    seeds = [own.initial_seed() for chunk in chunks for own in chunk.noise or []]
    assert seeds == list(range(NUM))
    assert all(chunk.noise is None for chunk in rollouts.chunks(conditions()))


def test_seeds_belong_to_rows_of_the_data() -> None:
    rollouts, _ = rollouts_of(2)
    first = rollouts.seeds({"index": torch.tensor([3, 7])}, 2, 10, 0)
    second = rollouts.seeds({"index": torch.tensor([7])}, 2, 10, 0)
    assert first[2:] == second and len(set(first)) == 4
