import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler, walk
from lit_rlft.core.schedule import RectifiedFlow

FLOW = GaussianProcess(RectifiedFlow(), "velocity")


def conditions(num: int) -> Condition:
    return Condition([{}], {}, torch.zeros(num, dtype=torch.int64))


def swirl(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return torch.tanh(x.roll(1, dims=1)) * t.unsqueeze(1).to(x)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_walk_visits_the_grid_from_noise_to_data(eta: float) -> None:
    calls: list[tuple[float, int]] = []

    def denoiser(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append((t[0].item(), len(condition)))
        return swirl(x, t, condition)

    x_1, times = torch.randn(3, 2), FLOW.times(4)
    steps = list(walk(denoiser, FLOW, x_1, conditions(3), times, eta, generators([1, 2, 3])))
    assert [i for i, _ in steps] == [0, 1, 2, 3, 4]
    assert torch.equal(steps[0][1], x_1)
    assert calls == [(1.0, 3), (0.75, 3), (0.5, 3), (0.25, 3)]
    x_0 = Sampler(4, eta).sample(swirl, FLOW, x_1, conditions(3), generators([1, 2, 3]))
    assert torch.equal(x_0, steps[-1][1])


def test_deterministic_walk_is_euler_and_draws_nothing() -> None:
    x = x_1 = torch.randn(3, 2)
    before = torch.get_rng_state()
    x_0 = Sampler(5).sample(swirl, FLOW, x_1, conditions(3))
    assert torch.equal(before, torch.get_rng_state())
    for i in range(5, 0, -1):
        x = x - 0.2 * swirl(x, torch.full((3,), i / 5), conditions(3))
    torch.testing.assert_close(x_0, x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_depends_on_its_seed_and_not_on_its_chunk(eta: float) -> None:
    def draw(seeds: list[int]) -> Tensor:
        noise = generators(seeds)
        x_1 = FLOW.prior(torch.zeros(len(seeds), 4)).sample(noise)
        x_0 = Sampler(6, eta).sample(swirl, FLOW, x_1, conditions(len(seeds)), noise)
        assert isinstance(x_0, Tensor)
        return x_0

    whole = draw([5, 6, 7, 8, 9])
    torch.testing.assert_close(torch.cat([draw([5, 6]), draw([7, 8, 9])]), whole)
    torch.testing.assert_close(draw([9, 5]), whole[[4, 0]])


def test_discrete_processes_draw_at_any_eta() -> None:
    process = MaskedProcess(2)
    torch.manual_seed(0)
    x_1 = process.prior(torch.zeros(400, 1, dtype=torch.int64)).sample()
    x_0 = Sampler(3).sample(lambda x, t, c: torch.zeros(*x.shape, 2), process, x_1, conditions(400))
    assert isinstance(x_0, Tensor) and set(x_0.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(("num_steps", "eta"), [(0, 0.0), (5, -0.1), (5, 1.1)])
def test_settings_that_cannot_work_are_refused(num_steps: int, eta: float) -> None:
    with pytest.raises(UsageError, match="Sampler: "):
        Sampler(num_steps, eta)
