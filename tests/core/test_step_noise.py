"""Noise of several steps drawn at once: by whom, how much, and that nobody else has a say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import generators, next_step, rand_like, randn_like, step_noise
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.route import Leg, Route

SEEDS = [11, 12, 13]


def drawn(shape: tuple[int, ...], num_steps: int, seeds: list[int] = SEEDS) -> Tensor:
    """Return the normal noise of each step of a walk, [T, B, ...]."""
    noise = step_noise(generators(seeds), num_steps)
    like = torch.empty(len(seeds), *shape)
    return torch.stack([randn_like(like, next_step(noise)) for _ in range(num_steps)])


@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (12, 10), (4, 8, 8)])
def test_a_sample_draws_for_all_steps_at_once(shape: tuple[int, ...]) -> None:
    found = drawn(shape, 7)
    for row, own in enumerate(generators(SEEDS)):
        assert torch.equal(found[:, row], torch.randn(7, *shape, generator=own))


@pytest.mark.parametrize(("numbers", "ahead"), [(1024, 4), (1025, 3), (4096, 1), (9000, 1)])
def test_as_many_steps_as_have_4096_numbers(numbers: int, ahead: int) -> None:
    found = drawn((numbers,), 6)
    for row, own in enumerate(generators(SEEDS)):
        sizes = [min(ahead, 6 - done) for done in range(0, 6, ahead)]
        blocks = [torch.randn(size, numbers, generator=own) for size in sizes]
        assert torch.equal(found[:, row], torch.cat(blocks))


def test_a_row_depends_on_its_generator_alone() -> None:
    whole = drawn((5,), 4)
    assert torch.equal(whole[:, 1:], drawn((5,), 4, SEEDS[1:]))
    assert torch.equal(whole[:, [2, 0]], drawn((5,), 4, [13, 11]))
    assert len({float(number) for number in whole.flatten()}) == whole.numel()


def test_each_field_of_a_state_has_noise_of_its_own() -> None:
    noise = step_noise(generators(SEEDS), 3)
    box, category = torch.empty(3, 4), torch.empty(3, 2, 5)
    steps = []
    for _ in range(3):
        next_step(noise)
        steps.append((randn_like(box, noise), rand_like(category, noise), randn_like(box, noise)))
    for row, own in enumerate(generators(SEEDS)):
        expected = (
            torch.randn(3, 4, generator=own),
            torch.rand(3, 2, 5, generator=own),
            torch.randn(3, 4, generator=own),
        )
        for step, parts in enumerate(steps):
            for part, whole in zip(parts, expected, strict=True):
                assert torch.equal(part[row], whole[step])


def test_what_comes_after_a_walk_goes_on_from_there() -> None:
    own, other = generators([5]), generators([5])
    noise = step_noise(own, 2)
    for _ in range(2):
        randn_like(torch.empty(1, 3), next_step(noise))
    torch.randn(2, 3, generator=other[0])
    assert torch.equal(torch.rand(4, generator=own[0]), torch.rand(4, generator=other[0]))


def test_without_generators_torchs_own_is_asked_each_step() -> None:
    assert next_step(step_noise(None, 3)) is None


@pytest.mark.parametrize("legs", [(6,), (4, 2), (1, 0, 5)])
def test_the_legs_of_a_route_share_its_noise(legs: tuple[int, ...]) -> None:
    """The last steps have the noise of the route of one leg, for either network."""
    process: Any = GaussianProcess(RectifiedFlow(), "velocity")

    def denoiser(x: Any, t: Tensor, condition: Condition) -> Tensor:
        return x.tanh()

    def draw(*parts: int) -> Tensor:
        route = Route(
            process,
            lambda condition: process.prior(torch.empty(3, 5)),
            [Leg(denoiser, num, tuned=False) for num in parts],
            1.0,
        )
        condition = Condition([{}], {}, torch.zeros(3, dtype=torch.int64))
        return torch.stack([tensor_of(x) for _, x in route.walk(condition, generators(SEEDS))])

    assert torch.equal(draw(*legs), draw(6))
