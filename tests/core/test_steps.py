"""The steps of a grid: what they take from their levels is computed once, and little is left."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import (
    AngularFlow,
    GaussianProcess,
    GibbsProcess,
    MaskedProcess,
    Process,
    ProductProcess,
)
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import walk
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, Schedule, vp_betas
from lit_rlft.core.state import State, fields_of, index, leaves, tensor_of, tree_map
from lit_rlft.core.subspace import PointClouds
from lit_rlft.core.trajectory import walk_with_log_probs
from lit_rlft.kit.saved_grids import Clip
from tests.operations import NOISE, Operations
from tests.support import assert_equal

B, T, CLASSES = 6, 8, 5
MASKED = MaskedProcess(CLASSES)
FLOW = GaussianProcess(RectifiedFlow(), "velocity")
GAUSSIAN: dict[str, GaussianProcess] = {
    "discrete VP": GaussianProcess(DiscreteVP(vp_betas(100))),
    "cosine VP": GaussianProcess(CosineVP(), "v"),
    "flow": FLOW,
    "arcs": AngularFlow(),
}
PROCESSES: dict[str, Process] = {
    **GAUSSIAN,
    "sample": GaussianProcess(CosineVP(), "sample"),
    "wide": GaussianProcess(DiscreteVP(vp_betas(100)), wide_above=0.3),
    "clipped": GaussianProcess(DiscreteVP(vp_betas(100)), bound=Clip(1.0)),
    "clipped, v": GaussianProcess(CosineVP(), "v", bound=Clip(1.0), keeps_noise=False),
    "points": GaussianProcess(RectifiedFlow(), "velocity", PointClouds(3)),
    "masked": MASKED,
    "padded": MaskedProcess(CLASSES, padded=True, power=2.0),
    "product": ProductProcess({"box": FLOW, "category": MASKED}),
    "gibbs": GibbsProcess({"box": FLOW, "category": MASKED}, {"box": 4, "category": 4}, 1),
    "gibbs, a block": GibbsProcess({"box": FLOW, "category": MASKED}, {"category": 4}, 3),
    "points and classes": ProductProcess(
        {
            "box": GaussianProcess(RectifiedFlow(), "velocity", PointClouds(3)),
            "category": MaskedProcess(CLASSES, padded=True),
        }
    ),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def conditions() -> Condition:
    return Condition([{}], {}, torch.zeros(B, dtype=torch.int64))


def start(process: Process) -> State:
    """Return a state with some variety, categories half shown."""
    numbers = torch.randn(B, 4, 3)
    category = torch.arange(B * 4).view(B, 4) % (CLASSES + 1)
    if isinstance(process, ProductProcess):
        return {"box": numbers, "category": category}
    return category if isinstance(process, MaskedProcess) else numbers


def predicted(x: State) -> State:
    """Return a prediction for a state."""

    def of(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point():
            return leaf.roll(1, dims=1).tanh()
        return torch.linspace(-1, 1, CLASSES) * (1 + leaf.unsqueeze(-1))

    return tree_map(of, x)


def denoiser(x: State, t: Tensor, condition: Condition) -> State:
    return predicted(x)


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_the_table_is_the_transition(
    process: Process, eta: float, dtype: torch.dtype
) -> None:
    """To the last bit, for all samples at one step and for each at its own: ratios are then 1."""
    torch.manual_seed(0)
    x = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, start(process))
    prediction, steps = predicted(x), process.steps(process.times(T), None, eta, x)
    numbers = torch.tensor([0, 3, T - 1, 3, 1, T - 2])
    mixed = process.step(prediction, x, index(steps.coefficients, numbers))
    assert_equal(steps.t, process.times(T)[:-1])
    for row, i in enumerate(numbers.tolist()):
        t, s = (process.times(T)[i + end].expand(B) for end in (0, 1))
        assert_equal(steps.levels(i, B), t)
        alone = process.step(prediction, x, steps.row(i))
        general = process.transition(prediction, x, t, s, eta)
        target = general.sample(generators(range(B)))
        for law in (alone, mixed):
            rows = slice(None) if law is alone else slice(row, row + 1)
            assert_equal(index(law.mean, rows), index(general.mean, rows))
            if law is alone or not isinstance(process, GaussianProcess):
                continue
            own = law.log_prob(target)
            assert_equal(own[rows], alone.log_prob(target)[rows])
        assert_equal(alone.sample(generators(range(B))), target)


def counted(walked: Callable[[], Iterator[Any]], count: Operations) -> int:
    """Return the operations of a second walk, its grid being known, without draws."""
    with torch.no_grad():
        list(walked())
        with count:
            list(walked())
    return count.total


WALKS: dict[str, Callable[..., Iterator[Any]]] = {
    "eta 0": partial(walk, eta=0.0),
    "eta 1": partial(walk, eta=1.0),
    "log-probabilities": partial(walk_with_log_probs, eta=1.0),
}
MOST = {
    **{name: (3, 5, 8) for name in GAUSSIAN},
    "masked": (7, 7, 11),
    "padded": (7, 7, 13),
    "product": (12, 12, 20),
    "points": (8, 13, 19),
    # A log-probability of each field, and 12 operations to draw them both.
    "points and classes": (20, 20, 33),
}


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("place", range(3), ids=WALKS)
def test_few_operations_are_left_for_a_step(name: str, place: int) -> None:
    """The second half of a walk has those of its steps; the first also has the walk's own."""
    process, make = PROCESSES[name], [*WALKS.values()][place]
    x, condition, count = start(process), conditions(), Operations()
    known, found = predicted(x), []
    for num_steps in (T, 2 * T):
        count = Operations()
        args = (lambda *_: known, process, x, condition, process.times(num_steps))
        own = partial(make, *args)
        found.append(counted(lambda: own(noise=generators(range(B))), count))  # noqa: B023
    assert (found[1] - found[0]) / T <= MOST[name][place], count.found
    assert found[0] - (found[1] - found[0]) <= 24, count.found
    # Each sample draws once for all steps, and for each field.
    fields = len(leaves(x))
    draws = sum(count.found[kind] for kind in NOISE)
    still = isinstance(process, GaussianProcess)
    assert draws == (0 if place == 0 and still else B * fields)


def test_a_walk_finds_once_what_its_states_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which slots are empty, by the states that steps would ask: samples are the same bits."""
    process = PROCESSES["points and classes"]
    x: Any = start(process)
    x["box"][:, 3], x["category"][:, 3] = 0, CLASSES + 1
    x = process.prior(x).sample(generators(range(B)))
    args = (denoiser, process, x, conditions(), process.times(T))
    found = []
    for _ in range(2):
        ours = walk_with_log_probs(*args, 1.0, generators(range(B)), reduction="mean")
        found.append(list(ours))
        monkeypatch.setattr(ProductProcess, "stepper", lambda self, x_1: self.step)
    for (state, log_prob), (other, expected) in zip(*found, strict=True):
        tree_map(assert_same, state, other)
        assert log_prob is expected is None or torch.equal(log_prob, expected)


def assert_same(state: Tensor, other: Tensor) -> Tensor:
    assert_equal(state, other)
    return state


@pytest.mark.parametrize("channels", [3, 5])
def test_samples_of_point_clouds_are_those_of_the_projection_written_out(channels: int) -> None:
    """To the last bit: the mean and the noise are each projected, then added."""
    process = GaussianProcess(RectifiedFlow(), "velocity", PointClouds(3))
    torch.manual_seed(1)
    full = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 0]).unsqueeze(1)
    x = projected(torch.randn(B, 4, channels), full)
    steps = process.steps(process.times(T), None, 1.0, x)
    *_, (_, found) = walk(denoiser, process, x, conditions(), process.times(T), 1.0, noise())
    drawn = [torch.randn(T, 4, channels, generator=own) for own in noise()]
    for i in range(T):
        of_x, of_p, std, *_ = tensor_of(steps.row(i)).unbind()
        mean = of_x * x + of_p * tensor_of(predicted(x))
        z = torch.stack([steps_noise[i] for steps_noise in drawn])
        x = projected(mean, full) + projected(std * z, full)
    assert_equal(found, x)


def noise() -> list[torch.Generator]:
    return generators(range(B))


def projected(x: Tensor, full: Tensor) -> Tensor:
    """Project clouds of points whose first three channels are coordinates."""
    kept = x.where(full.unsqueeze(-1), 0)
    num = full.sum(dim=1).clamp(min=1).view(-1, 1, 1)
    mean = kept[..., :3].sum(dim=1, keepdim=True) / num
    moved = torch.cat([kept[..., :3] - mean, kept[..., 3:]], dim=-1)
    return moved.where(full.unsqueeze(-1), 0)


def test_what_is_shown_stays_and_classes_are_the_largest_under_gumbel_noise() -> None:
    """To the last bit those of the law that is written out for every position."""
    process = MaskedProcess(CLASSES, padded=True)
    torch.manual_seed(2)
    x = torch.arange(B * 50).view(B, 50) % (CLASSES + 2)
    logits, drawn = torch.randn(B, 50, CLASSES), noise()
    t, s = torch.full((B,), 0.6), torch.full((B,), 0.4)
    law = process.transition(logits, x, t, s, 1.0)
    uniform = torch.stack([torch.rand(50, CLASSES + 2, generator=own) for own in drawn])
    hidden = torch.zeros(B, 50, CLASSES + 2)
    hidden[..., :CLASSES] = logits.log_softmax(-1) + torch.tensor((0.6 - 0.4) / 0.6).log()
    hidden[..., CLASSES], hidden[..., CLASSES + 1] = torch.tensor(0.4 / 0.6).log(), -torch.inf
    point = torch.where(x.unsqueeze(-1) == torch.arange(CLASSES + 2), 0.0, -torch.inf)
    exact = torch.where((x == process.mask).unsqueeze(-1), hidden, point)
    assert torch.equal(law.sample(noise()), (exact - (-uniform.log()).log()).argmax(dim=-1))
    torch.testing.assert_close(law.log_probs, exact)
    # Log-probabilities of any state, those that hide or change what is shown among them.
    for seed in range(3):
        torch.manual_seed(seed)
        other = torch.where(torch.rand(B, 50) < 0.02 * seed, torch.randint(0, 7, (B, 50)), x)
        own = exact.gather(-1, other.unsqueeze(-1)).squeeze(-1).double().sum(dim=1)
        num, close = (x != process.empty).sum(dim=1), {"rtol": 2e-6, "atol": 0.0}
        torch.testing.assert_close(law.log_prob(other).double(), own, **close)
        torch.testing.assert_close(law.log_prob(other, "mean").double(), own / num, **close)


def test_at_most_twenty_operations_surround_a_guided_network(
    tiny_stable_diffusion: Callable[..., Path],
) -> None:
    pipeline: Any = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    pipeline.requires_grad_(False)
    prompts = [f"a circle {i}" for i in range(B)]
    condition = pipeline.encode({"index": torch.arange(B), "prompt": prompts})
    x = torch.randn_like(pipeline.blank(condition))
    process = pipeline.process
    args = (pipeline, process, x, condition, process.times(T))
    for make in WALKS.values():
        count = Operations()
        with count.without(pipeline.denoiser):
            found = counted(lambda: make(*args, noise=generators(range(B))), count)  # noqa: B023
        assert found / T <= 20, count.found


def test_a_grid_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process, calls = GaussianProcess(RectifiedFlow(), "velocity"), []
    rule = process.coefficients

    def told(*args: Any) -> Tensor:
        calls.append(args[-1])
        return rule(*args)

    monkeypatch.setattr(process, "coefficients", told)
    x = torch.randn(B, 3)
    for eta in (1.0, 0.0, 1.0):
        for size in (B, 2):
            rows = torch.arange(size)
            grid = (process.times(T), eta, generators(range(size)))
            list(walk(denoiser, process, x[rows], conditions().index(rows), *grid))
    assert calls == [1.0, 0.0]
    process.steps(process.times(T), None, 1.0, x.double())
    process.steps(process.times(T + 1), None, 1.0, x)
    process.steps(process.times(T), process.times(T)[1:] / 2, 1.0, x)
    assert len(calls) == 5


class Bent(Schedule):
    """A flow whose signal goes faster at first."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) ** self.power

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()


def bend(process: GaussianProcess) -> None:
    process.schedule.power = 2.0


def swap(process: GaussianProcess) -> None:
    process.schedule = Bent(2.0)


def predict_sample(process: GaussianProcess) -> None:
    process.prediction_type = "sample"


@pytest.mark.parametrize("change", [bend, swap, predict_sample])
@pytest.mark.parametrize("within", [False, True])
def test_a_changed_process_takes_new_steps(
    change: Callable[[GaussianProcess], None], within: bool
) -> None:
    def made() -> tuple[GaussianProcess, Process]:
        own = GaussianProcess(Bent(), "velocity")
        return own, ProductProcess({"x": own}) if within else own

    def steps(process: Process) -> Tensor:
        like = {"x": torch.zeros(B, 3)} if within else torch.zeros(B, 3)
        found = process.steps(process.times(T), None, 1.0, like).coefficients
        return fields_of(found)["x"] if within else tensor_of(found)

    part, used = made()
    before = steps(used)
    assert steps(used) is before
    used.train().eval()
    assert isinstance(part.schedule, Bent)
    part.schedule.power = 1.0  # as it was
    assert steps(used) is before and steps(copy.deepcopy(used)) is not before
    change(part)
    fresh, unused = made()
    change(fresh)
    assert torch.equal(steps(used), steps(unused)) and not torch.equal(steps(used), before)


def test_a_grid_of_an_evaluation_serves_training() -> None:
    """Lightning evaluates in inference mode, whose tensors no graph may keep."""
    process, x = GaussianProcess(DiscreteVP(vp_betas(100))), torch.randn(B, 3)
    weight = torch.tensor(0.5, requires_grad=True)
    with torch.inference_mode():
        list(walk(denoiser, process, x, conditions(), process.times(T), 0.0))
    seen: list[Tensor] = []

    def trained(x: State, t: Tensor, condition: Condition) -> State:
        seen.append(t)
        return weight * tensor_of(x) * t.unsqueeze(1).to(weight)

    *_, (_, x_0) = walk(trained, process, x, conditions(), process.times(T), 0.0)
    (grad,) = torch.autograd.grad(tensor_of(x_0).sum(), weight)
    assert grad.isfinite() and len(seen) == T


def test_a_process_of_ones_own_has_two_halves() -> None:
    """An overridden `transition` would never be called by samplers."""
    with pytest.raises(TypeError, match="Mine overrides transition; override its halves"):

        class Mine(GaussianProcess):
            def transition(self, *args: Any) -> Gaussian:
                raise AssertionError


class Kept(Bent):
    """Has its power in the state that is saved."""

    def __init__(self, power: float) -> None:
        super().__init__(power)
        del self.power
        self.register_buffer("power", torch.tensor(power, dtype=torch.float64))


def test_a_state_that_is_loaded_gives_new_steps() -> None:
    one, other = (GaussianProcess(Kept(power), "velocity") for power in (1.0, 2.0))
    grid = (one.times(T), None, 1.0, torch.zeros(B, 3))
    before = tensor_of(one.steps(*grid).coefficients)
    one.load_state_dict(other.state_dict())
    after = tensor_of(one.steps(*grid).coefficients)
    assert torch.equal(after, tensor_of(other.steps(*grid).coefficients))
    assert not torch.equal(after, before)
