import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.corrector import FlowMLP, FlowPrior
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, Process, ProductProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler, walk
from lit_rlft.core.schedule import CosineVP, RectifiedFlow
from lit_rlft.core.state import State
from lit_rlft.core.subspace import PointClouds
from tests.support import assert_close_in_rounding

FLOW = GaussianProcess(RectifiedFlow(), "velocity")
SIDES = Condition([{"side": 1}, {"side": -1}], {}, torch.tensor([0, 1, 0]))


def features(condition: Condition) -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.0, 1.0]])[condition.rows]


def moved(flow: FlowMLP) -> FlowMLP:
    """Draw the output layer, which starts at zero."""
    torch.manual_seed(0)
    torch.nn.init.normal_(flow.denoiser.last.weight)  # type: ignore[union-attr, arg-type]
    return flow


@torch.no_grad()
@pytest.mark.parametrize(
    "blank",
    [torch.empty(1, 4, 5), {"a": torch.empty(1, 2), "b": torch.empty(1, 3, 2)}],
    ids=["tensor", "fields"],
)
def test_an_untrained_flow_hands_on_its_noise(blank: State) -> None:
    base = FLOW if isinstance(blank, Tensor) else ProductProcess(dict.fromkeys(blank, FLOW))
    flow = FlowMLP(base, blank, features, 2, width=8)
    wide = (
        blank.expand(3, -1, -1)
        if isinstance(blank, Tensor)
        else {name: leaf.expand(3, *leaf.shape[1:]) for name, leaf in blank.items()}
    )
    start = flow.process.prior(wide)
    seeds = [4, 5, 6]
    drawn = FlowPrior(flow, start, SIDES, Sampler(3)).sample(generators(seeds))
    noise = start.sample(generators(seeds))
    torch.testing.assert_close(drawn, noise, rtol=0, atol=0)
    other = FlowPrior(moved(flow), start, SIDES, Sampler(3)).sample(generators(seeds))
    assert not any(
        torch.equal(a, b)
        for a, b in zip(
            *([x] if isinstance(x, Tensor) else x.values() for x in (other, noise)), strict=True
        )
    )


@torch.no_grad()
def test_samples_are_eulers() -> None:
    """A quarter turn in four steps, velocities by hand from the network's layers."""
    flow = moved(FlowMLP(FLOW, torch.empty(1, 2), features, 2, width=8, depth=2))
    net = flow.denoiser
    law = FlowPrior(flow, flow.process.prior(torch.empty(3, 2)), SIDES, Sampler(4))
    x = torch.stack([torch.randn(2, generator=row) for row in generators([7, 8, 9])])
    drawn = law.sample(generators([7, 8, 9]))
    # Features of rms sqrt(1/2) are divided by 1 + that.
    known = features(SIDES) / (1 + 0.5**0.5)
    for t in (1.0, 0.75, 0.5, 0.25):
        angles = torch.pi * t * torch.arange(1, 9)
        clock = torch.cat([angles.cos(), angles.sin()]).expand(3, -1)
        hidden = torch.nn.functional.silu(net.first(torch.cat([x, clock, known], dim=1)))  # type: ignore[operator]
        hidden = hidden + torch.nn.functional.silu(net.hidden[0](hidden))  # type: ignore[index]
        x = x - torch.pi / 8 * net.last(hidden)  # type: ignore[operator]
    torch.testing.assert_close(drawn, x)


@torch.no_grad()
@pytest.mark.parametrize("fields", [False, True], ids=["tensor", "fields"])
def test_a_flow_stays_where_the_bases_states_exist(fields: bool) -> None:
    """Three points, none, and one in four slots, around their centre: the subspace of the base."""
    full = torch.arange(4) < torch.tensor([3, 0, 1]).unsqueeze(1)
    cloud = torch.cat([full.unsqueeze(-1)] * 5, dim=-1).float()
    base: Process = GaussianProcess(CosineVP(), "v", PointClouds(num_coordinates=2))
    blank: State = cloud
    if fields:
        free = GaussianProcess(CosineVP(), "v")
        base = ProductProcess({"cloud": base, "free": free})
        blank = {"cloud": cloud, "free": torch.ones(3, 2)}
    flow = moved(FlowMLP(base, blank, features, 2, width=8))
    times, noise = flow.process.times(3), base.prior(blank).sample(generators([1, 2, 3]))
    states = [x for _, x in walk(flow.predict, flow.process, noise, SIDES, times, 0.0)]
    zero = torch.zeros(3)
    states.append(flow.process.noised(noise, zero, zero + 0.5, generators([4, 5, 6])))
    clouds = [state if isinstance(state, Tensor) else state["cloud"] for state in states]
    for x in clouds:
        assert not x[~full].any() and (x[full] != 0).any(dim=-1).all()
        assert x[..., :2].sum(dim=1).abs().max() < 1e-5
    assert not torch.allclose(clouds[0], clouds[3])
    predictions = [flow.predict(states[-1], zero + 0.5, SIDES) for _ in range(2)]
    outside = predictions[1] if isinstance(predictions[1], Tensor) else predictions[1]["cloud"]
    outside[~full] += 3.0
    args = (noise, states[-1], zero, zero + 0.5)
    losses = [flow.process.loss(prediction, *args) for prediction in predictions]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


@torch.no_grad()
def test_conditions_and_seeds_decide_what_is_drawn() -> None:
    flow = moved(FlowMLP(FLOW, torch.empty(1, 2), features, 2, width=8))
    start = flow.process.prior(torch.empty(3, 2))
    drawn = FlowPrior(flow, start, SIDES, Sampler(2)).sample(generators([1, 1, 1]))
    assert isinstance(drawn, Tensor)
    assert_close_in_rounding(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)


@torch.no_grad()
def test_any_pipeline_is_a_flow() -> None:
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    condition = pipeline.encode({"index": torch.arange(5)})
    start = pipeline.process.prior(pipeline.blank(condition))
    law = FlowPrior(pipeline, start, condition, Sampler(6))
    x_1 = start.sample(generators(range(5)))
    x_0 = Sampler(6).sample(pipeline, pipeline.process, x_1, condition)
    torch.testing.assert_close(law.sample(generators(range(5))), x_0, rtol=0, atol=0)


def test_divergence_does_not_apply_and_density_is_refused() -> None:
    flow = FlowMLP(FLOW, torch.empty(1, 2), features, 2)
    start = flow.process.prior(torch.zeros(3, 2))
    law = FlowPrior(flow, start, SIDES, Sampler(2))
    assert law.kl(start).isnan().tolist() == [True] * 3
    assert torch.equal(law.mean, torch.zeros(3, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no closed form"):
        law.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="2 samples for 3"):
        FlowPrior(flow, flow.process.prior(torch.zeros(2, 2)), SIDES, Sampler(2)).sample()
    with pytest.raises(UsageError, match="FlowMLP: depth must be at least 1"):
        FlowMLP(FLOW, torch.empty(1, 2), features, 2, depth=0)


def test_layouts_know_what_is_given() -> None:
    """Boxes of the first slot, and no classes: the mask of a state [B, N, 4 + C + 1]."""
    small = Architecture(num_slots=2, width=8, depth=1, num_heads=1)
    pipeline = LayoutPipeline(None, architecture=small)
    condition = pipeline.example()
    given = pipeline.given(condition)
    assert isinstance(given, Tensor) and given.shape == (1, 2, 4 + 5 + 1) and not given.any()
    condition.tables["known_boxes"].data = torch.tensor([[[True] * 4, [False] * 4]])
    given = pipeline.given(condition)
    assert isinstance(given, Tensor) and given.sum() == 4 and given[0, 0, :4].all()
    mixture = GaussianMixturePipeline()
    assert mixture.given(mixture.encode({"index": torch.arange(2)})) is None
