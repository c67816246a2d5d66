"""Interleaved Gibbs diffusion against enumeration: clocks, steps, marginals, losses, laws."""

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import (
    GaussianProcess,
    GibbsProcess,
    MaskedProcess,
    Process,
    ProductProcess,
    UniformProcess,
)
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import State, fields_of
from lit_rlft.core.subspace import PointClouds

L, V = 3, 2
KINDS: dict[str, Callable[[], Process]] = {
    "mask": lambda: MaskedProcess(V),
    "uniform": lambda: UniformProcess(V, power=1.5),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
DATA = torch.tensor(list(product(range(V), repeat=L)))  # all x_0, [8, 3]
LAW = torch.tensor([0.3, 0.01, 0.02, 0.17, 0.05, 0.15, 0.25, 0.05], dtype=torch.float64)
FLOW = GaussianProcess(RectifiedFlow(), "velocity")


def discrete(kind: str, rounds: int) -> GibbsProcess:
    return GibbsProcess({"a": KINDS[kind]()}, {"a": L}, rounds)


def states(kind: str) -> Tensor:
    """Return all x_t, [S, L]."""
    return torch.tensor(list(product(range(V + (kind == "mask")), repeat=L)))


def kernel(kind: str, level_s: float, level_t: float, num: int) -> Tensor:
    """Return q(x_t | x_s) of one element by its definition, float64 [num, num]."""
    if kind == "mask":
        keep = 1.0 if level_s == 1 else (1 - level_t) / (1 - level_s)
        q = keep * torch.eye(num, dtype=torch.float64)
        q[:, V] += 1 - keep
        return q
    keep = 0.0 if level_t == 1 else ((1 - level_t) / (1 - level_s)) ** 1.5
    if level_s == level_t:
        keep = 1.0
    return keep * torch.eye(num, dtype=torch.float64) + (1 - keep) / num


def joint_kernel(kind: str, low: Tensor, high: Tensor) -> Tensor:
    """Return q(x_t | x_s) between all states, [S, S], for levels [L] of the elements."""
    all_states = states(kind)
    num = V + (kind == "mask")
    q = torch.ones(len(all_states), len(all_states), dtype=torch.float64)
    for j in range(L):
        own = kernel(kind, float(low[j]), float(high[j]), num)
        q *= own[all_states[:, None, j], all_states[None, :, j]]
    return q


def clean(kind: str) -> Tensor:
    """Return the law of x_0 over all states, [S]."""
    law = torch.zeros(len(states(kind)), dtype=torch.float64)
    for x, share in zip(DATA, LAW, strict=True):
        law[(states(kind) == x).all(dim=1).nonzero()] = share
    return law


def level(process: GibbsProcess, t: float) -> Tensor:
    x = torch.zeros(1, L, dtype=torch.int64)
    return process.levels({"a": x}, torch.tensor([t], dtype=torch.float64))["a"][0]


def exact(kind: str, levels: Tensor) -> Tensor:
    """Return log p(x_0^j | x_t) for all x_t by Bayes' rule, [S, L, V]; even for impossible ones."""
    q = joint_kernel(kind, torch.zeros(L), levels)
    joint = clean(kind)[:, None] * q  # x_0 by x_t
    logits = torch.zeros(len(q), L, V, dtype=torch.float64)
    for j, v in product(range(L), range(V)):
        logits[:, j, v] = joint[states(kind)[:, j] == v].sum(dim=0)
    return (logits + (logits.sum(-1, keepdim=True) == 0)).log()


def stepped(process: Process, kind: str, logits: Tensor, t: float, s: float) -> Tensor:
    """Return p(x_s | x_t) between all states, [S at t, S at s], from log-probabilities."""
    x = states(kind)
    from_all, to_all = x.repeat_interleave(len(x), 0), x.repeat(len(x), 1)
    prediction = {"a": logits.repeat_interleave(len(x), 0)}
    times = (torch.full((len(from_all),), v, dtype=torch.float64) for v in (t, s))
    transition = process.transition(prediction, {"a": from_all}, *times, 1.0)
    return transition.log_prob({"a": to_all}).exp().double().view(len(x), len(x))


def sampled_law(
    process: Process, kind: str, num_steps: int, denoiser: Callable[[float], Tensor]
) -> Tensor:
    """Return the law of the sampler's x_0 by multiplying its transitions, [S]."""
    x = states(kind)
    law = process.prior({"a": x}).log_prob({"a": x}).exp().double()
    times = process.times(num_steps).tolist()
    for t, s in pairwise(times):
        law = law @ stepped(process, kind, denoiser(t), t, s)
    return law


def test_clocks_are_the_round_robin_by_its_words() -> None:
    """Visit by visit: one element gains 1 / R, in the order of the fields and their slots."""
    fields = {"b": FLOW, "a": MaskedProcess(4)}
    rounds = 3
    process = GibbsProcess(
        fields, {"a": 2, "b": 3}, rounds, order=("b", "a"), shares={"a": 2, "b": 3}
    )
    x = {"a": torch.zeros(1, 2, dtype=torch.int64), "b": torch.zeros(1, 3, 4)}
    expected = {"a": [0.0] * 2, "b": [0.0] * 3}
    times = process.times(5 * rounds).flip(0)
    visits = [("b", 0), ("b", 1), ("b", 2), ("a", 0), ("a", 1)] * rounds
    for name, j in visits:
        t, times = times[:1], times[1:]
        for field, values in process.levels(x, t).items():
            assert values[0].tolist() == pytest.approx(expected[field], abs=1e-12)
        expected[name][j] += 1 / rounds
        after = process.levels(x, times[:1])
        moved = {field: (after[field] > process.levels(x, t)[field])[0] for field in after}
        assert sum(int(flags.sum()) for flags in moved.values()) == 1 and moved[name][j]
    assert all((values == 1).all() for values in process.levels(x, torch.ones(1)).values())


@each_kind
@pytest.mark.parametrize("rounds", [1, 3])
def test_steps_are_the_exact_posterior(kind: str, rounds: int) -> None:
    """Each of a visit, against q(x_s, x_t) enumerated; probabilities of all x_s sum to 1."""
    process = discrete(kind, rounds)
    times = process.times(L * rounds).tolist()
    for t, s in pairwise(times):
        low, high = level(process, s), level(process, t)
        joint = (clean(kind) @ joint_kernel(kind, torch.zeros(L), low))[:, None]
        joint = joint * joint_kernel(kind, low, high)  # x_s by x_t
        reachable = joint.sum(dim=0) > 0
        posterior = (joint / joint.sum(dim=0).where(reachable, 1)).T
        ours = stepped(process, kind, exact(kind, high), t, s)
        torch.testing.assert_close(ours.sum(dim=1), torch.ones(len(ours)).double())
        torch.testing.assert_close(ours[reachable], posterior[reachable], atol=1e-6, rtol=1e-4)


@each_kind
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_by_one_the_joint_law_is_reached_and_together_it_is_not(kind: str, rounds: int) -> None:
    process = discrete(kind, rounds)
    goal = clean(kind)

    def denoiser(t: float) -> Tensor:
        return exact(kind, level(process, t))

    torch.testing.assert_close(
        sampled_law(process, kind, L * rounds, denoiser), goal, atol=3e-6, rtol=1e-4
    )
    # As many calls, but all elements in each: the mixed process, whose steps factorise.
    together = ProductProcess({"a": KINDS[kind]()})
    factorised = sampled_law(together, kind, L * rounds, lambda t: exact(kind, torch.full((L,), t)))
    assert 0.5 * (factorised - goal).abs().sum() > 0.02
    # And steps of its own that skip visits.
    coarse = sampled_law(process, kind, 1, denoiser)
    assert 0.5 * (coarse - goal).abs().sum() > 0.2


@each_kind
@pytest.mark.parametrize("s", [0.0, 0.45])
def test_the_exact_denoiser_minimises_the_loss(kind: str, s: float) -> None:
    """The gradient of the expected loss, enumerated over x_s and x_t, vanishes there alone."""
    process, t = discrete(kind, 2), 0.8
    low, high = level(process, s), level(process, t)
    logits = exact(kind, high)
    joint = (clean(kind) @ joint_kernel(kind, torch.zeros(L), low))[:, None]
    joint = joint * joint_kernel(kind, low, high)
    x_s, x_t = joint.nonzero().unbind(dim=1)

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        time = torch.ones(len(x_s), dtype=torch.float64)
        x = states(kind)
        parts = {"a": logits[x_t]}, {"a": x[x_s]}, {"a": x[x_t]}, s * time, t * time
        (joint[x_s, x_t] * process.loss(*parts)).sum().backward()
        assert logits.grad is not None
        return logits.grad

    assert gradient(logits).abs().max() < 1e-7
    assert gradient(logits + torch.randn_like(logits)).abs().max() > 1e-4


def test_numbers_have_the_gaussian_loss_of_their_own_levels() -> None:
    process = GibbsProcess({"box": FLOW}, {"box": 3}, 2)
    p, x_s, x_t = ({"box": torch.randn(2, 3, 4)} for _ in range(3))
    s, t = torch.tensor([0.0, 0.5]), torch.tensor([0.25, 1.0])
    # At 1/4 of two rounds half of the first is over: the second element is half through.
    spans = [[(0.0, 0.5), (0.0, 0.25), None], [(0.5, 1.0)] * 3]
    expected = []
    for row, own in enumerate(spans):
        total = torch.zeros(())
        for j, span in enumerate(own):
            if span is not None:
                one = [part["box"][row, j][None] for part in (p, x_s, x_t)]
                total = total + FLOW.loss(*one, *(torch.tensor([v]) for v in span))[0]
        expected.append(total / 3)
    torch.testing.assert_close(process.loss(p, x_s, x_t, s, t), torch.stack(expected))


def test_what_does_not_move_has_no_loss_and_no_gradient() -> None:
    """A block whose turn is over, and elements that are all noise or none at both times."""
    process = GibbsProcess({"x": FLOW, "y": FLOW}, {"y": 3}, 1, order=("x", "y"))
    p, x_s, x_t = ({"x": torch.randn(2, 4), "y": torch.randn(2, 3, 2)} for _ in range(3))
    p = {name: field.requires_grad_() for name, field in p.items()}
    # Each of y takes a sixth of the round: the first is through, and the last has yet to start.
    s, t = (torch.full((2,), v, dtype=torch.float64) for v in (0.7, 0.8))
    loss = process.loss(p, x_s, x_t, s, t)
    own = (part["y"][:, 1] for part in (p, x_s, x_t))
    expected = FLOW.loss(*own, *(torch.full((2,), v, dtype=torch.float64) for v in (0.2, 0.8))) / 3
    torch.testing.assert_close(loss, expected)
    of_x, of_y = torch.autograd.grad(loss.sum(), list(p.values()))
    assert not of_x.any() and not of_y[:, [0, 2]].any() and of_y[:, 1].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_forward_noise_has_the_levels_marginals_in_one_step_and_in_two(kind: str) -> None:
    """Shares within 4 standard errors, moments of numbers likewise; what does not move stays."""
    num = 20_000
    process = GibbsProcess({"a": KINDS[kind](), "b": FLOW}, {"a": L, "b": 2}, 2)
    x_0 = {"a": DATA[5].expand(num, -1), "b": torch.full((num, 2, 1), 1.5)}
    zero, s, t = (torch.full((num,), v, dtype=torch.float64) for v in (0.0, 0.4, 0.61))
    once = fields_of(process.noised(x_0, zero, t))
    between = process.noised(x_0, zero, s)
    twice = fields_of(process.noised(between, s, t))
    still = process.levels(x_0, s)["b"][0] == process.levels(x_0, t)["b"][0]
    assert still.any() and not still.all()
    assert twice["b"][:, still].equal(fields_of(between)["b"][:, still])
    for x in (once, twice):
        for j, tau in enumerate(process.levels(x_0, t)["a"][0].tolist()):
            shares = kernel(kind, 0.0, tau, V + (kind == "mask"))[DATA[5, j]]
            found = torch.bincount(x["a"][:, j], minlength=len(shares)) / num
            error = (shares * (1 - shares) / num).sqrt()
            assert ((found - shares).abs() <= 4 * error + 1e-12).all()
        for j, tau in enumerate(process.levels(x_0, t)["b"][0].tolist()):
            numbers = x["b"][:, j, 0]
            assert numbers.mean().item() == pytest.approx(1.5 * (1 - tau), abs=4 * tau / num**0.5)
            assert numbers.std().item() == pytest.approx(tau, rel=4 / (2 * num) ** 0.5)
    ends = fields_of(process.noised(twice, t, torch.ones(num)))
    assert ends["b"].isfinite().all()
    start = fields_of(process.prior(x_0).sample())
    assert start["a"].shape == (num, L) and start["b"].shape == (num, 2, 1)


CENTRES, STD = torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.4
SHARE = torch.tensor([0.3, 0.7], dtype=torch.float64)


def of_the_pair(levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., State]:
    """Return the exact denoiser of c ~ SHARE, box | c ~ N(CENTRES[c], STD^2)."""

    def denoiser(x_t: State, t: Tensor, condition: Condition) -> State:
        x, (tau, _) = fields_of(x_t), levels(t)
        alpha, sigma = (1 - tau).unsqueeze(1), tau.unsqueeze(1)
        variance = alpha**2 * STD**2 + sigma**2
        offset = x["box"][:, 0].double() - alpha * CENTRES
        logits = SHARE.log() - 0.5 * offset**2 / variance
        shown = functional.one_hot(x["c"][:, 0], 3)[:, :2].double()
        share = logits.softmax(1).where(x["c"] == 2, shown)
        x_0 = (share * (CENTRES + alpha * STD**2 / variance * offset)).sum(1, keepdim=True)
        eps = (share * sigma / variance * offset).sum(1, keepdim=True)
        return {"box": (eps - x_0).unsqueeze(1).float(), "c": logits.unsqueeze(1)}

    return denoiser


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 80])
def test_a_class_and_a_number_that_depends_on_it(steps: int, eta: float) -> None:
    """The pair's joint law is reached within 4 standard errors; simultaneous steps break pairs.

    Stds of numbers are those of the data where there are many steps: the Gaussian step's own error.
    """
    num = 2000
    fields = {"box": FLOW, "c": MaskedProcess(2)}
    gibbs = GibbsProcess(
        fields, {"box": 1, "c": 1}, 1, order=("box", "c"), shares={"box": steps - 1}
    )
    blank = {"box": torch.zeros(num, 1, 1), "c": torch.zeros(num, 1, dtype=torch.int64)}
    condition = Condition([{}], {}, torch.zeros(num, dtype=torch.int64))

    def own(t: Tensor) -> tuple[Tensor, Tensor]:
        levels = gibbs.levels(blank, t)
        return levels["box"][:, 0], levels["c"][:, 0]

    def draw(process: Process, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> State:
        x_1 = process.prior(blank).sample()
        return Sampler(steps, eta).sample(of_the_pair(levels), process, x_1, condition)

    def broken(x: State) -> float:
        """Return the share of pairs whose number is nearer to the other class's centre."""
        parts = fields_of(x)
        return ((parts["box"][:, 0, 0] > 0) != (parts["c"][:, 0] == 1)).float().mean().item()

    x = fields_of(draw(gibbs, own))
    error = (0.3 * 0.7 / num) ** 0.5
    assert (x["c"] == 1).float().mean().item() == pytest.approx(0.7, abs=4 * error)
    for k in range(2):
        numbers = x["box"][x["c"] == k]
        few = 4 / len(numbers) ** 0.5
        assert numbers.mean().item() == pytest.approx(CENTRES[k].item(), abs=few * STD)
        if steps == 80:
            assert numbers.std().item() == pytest.approx(STD, rel=few / 2**0.5 + 0.01)
    assert broken(x) == 0
    if steps == 2:
        assert broken(draw(ProductProcess(fields), lambda t: (t, t))) > 0.02


def test_padded_slots_take_no_time_and_stay() -> None:
    """Two atoms of four slots: each has half of the types' part."""
    field = MaskedProcess(3, padded=True)
    process = GibbsProcess({"type": field, "x": FLOW}, {"type": 4}, 1, order=("type", "x"))
    types = torch.tensor([[0, 1, 4, 4], [0, 1, 2, 0]])
    x = {"type": types, "x": torch.randn(2, 4, 3)}
    levels = process.levels(x, torch.full((2,), 0.25))
    assert levels["type"][:, :2].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert levels["x"].tolist() == [0.0, 0.0]
    hidden = fields_of(process.noised(x, torch.zeros(2), torch.ones(2)))["type"]
    assert hidden.tolist() == [[3, 3, 4, 4], [3] * 4]
    prediction = {"type": torch.randn(2, 4, 3), "x": torch.zeros(2, 4, 3)}
    t, s = torch.full((2,), 0.5).double(), torch.full((2,), 0.25).double()
    law = process.transition(prediction, {"type": hidden, "x": x["x"]}, t, s, 1.0)
    drawn = fields_of(law.sample())
    assert drawn["x"].equal(x["x"])
    # A quarter of the round is one of two visits here, two of four there.
    assert (drawn["type"] == 3).tolist() == [[True, *[False] * 3], [True, True, False, False]]
    target = {"type": drawn["type"], "x": x["x"]}
    shown = prediction["type"].log_softmax(-1)
    each = [shown[row, j, drawn["type"][row, j]] for row, j in [(0, 1), (1, 2), (1, 3)]]
    torch.testing.assert_close(law.log_prob(target), torch.stack([each[0], each[1] + each[2]]))
    mean = law.log_prob(target, "mean")
    torch.testing.assert_close(mean, torch.stack([each[0], (each[1] + each[2]) / 2]))


def test_means_run_over_the_numbers_that_move() -> None:
    process = GibbsProcess({"box": FLOW}, {"box": 3}, 1)
    x, p = {"box": torch.randn(2, 3, 4)}, {"box": torch.randn(2, 3, 4)}
    t, s = (torch.full((2,), v, dtype=torch.float64) for v in (2 / 3, 0.5))
    law, other = (process.transition(q, x, t, s, 1.0) for q in (p, {"box": p["box"] + 1}))
    drawn = law.sample()
    one = [part["box"][:, 1] for part in (p, x)]
    half, full = (torch.full((2,), v, dtype=torch.float64) for v in (0.5, 1.0))
    alone = FLOW.transition(*one, full, half, 1.0)
    target = fields_of(drawn)["box"][:, 1]
    for reduction in ("sum", "mean"):
        torch.testing.assert_close(
            law.log_prob(drawn, reduction), alone.log_prob(target, reduction)
        )
    kl = alone.kl(FLOW.transition(one[0] + 1, one[1], full, half, 1.0), "mean")
    torch.testing.assert_close(law.kl(other, "mean"), kl)
    kept = fields_of(drawn)["box"]
    assert kept[:, 0].equal(x["box"][:, 0]) and kept[:, 2].equal(x["box"][:, 2])


@pytest.mark.slow
@each_kind
def test_pretraining_reaches_the_law_of_its_data(kind: str) -> None:
    """A small network trained by the process's own noise and loss, its sampler enumerated."""
    process, num_values = discrete(kind, 2), V + (kind == "mask")
    net = nn.Sequential(nn.Linear(L * num_values + L, 64), nn.SiLU(), nn.Linear(64, L * V))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 2000)

    def predict(x: Tensor, levels: Tensor) -> Tensor:
        inputs = functional.one_hot(x, num_values).flatten(1).float()
        return net(torch.cat([inputs, levels.float()], dim=1)).view(-1, L, V)

    for _ in range(2000):
        x_0 = {"a": DATA[torch.multinomial(LAW, 512, replacement=True)]}
        t, s = process.draw_times(torch.rand(512)), torch.zeros(512)
        x_t = fields_of(process.noised(x_0, s, t))
        prediction = {"a": predict(x_t["a"], process.levels(x_t, t)["a"])}
        optimizer.zero_grad()
        process.loss(prediction, x_0, x_t, s, t).mean().backward()
        optimizer.step()
        schedule.step()
    x = states(kind)
    with torch.no_grad():
        law = sampled_law(
            process, kind, 2 * L, lambda t: predict(x, level(process, t).expand(len(x), -1))
        )
    assert 0.5 * (law - clean(kind)).abs().sum() < 0.04


def test_numbers_alone_are_no_plain_product() -> None:
    """Elements have clocks of their own, of which an adjoint at one level knows nothing."""
    process = GibbsProcess({"x": FLOW, "y": FLOW}, {"x": 2, "y": 2}, 2)
    assert not (process.differentiable or process.invertible or process.has_flow_steps)


def test_bad_settings_are_named() -> None:
    cloud = GaussianProcess(RectifiedFlow(), "velocity", PointClouds(3))
    with pytest.raises(UsageError, match=r"elements of field 'x' depend .* leave it out of elem"):
        GibbsProcess({"x": cloud}, {"x": 4}, 2)
    with pytest.raises(UsageError, match=r"order must name each of \['a', 'x'\] once"):
        GibbsProcess({"x": cloud, "a": MaskedProcess(3)}, {"a": 4}, 2, order=["x"])
    with pytest.raises(UsageError, match="name \\['b'\\]"):
        GibbsProcess({"x": cloud}, {"b": 4}, 2)
    with pytest.raises(UsageError, match="rounds must be at least 1"):
        GibbsProcess({"x": FLOW}, {"x": 4}, 0)
    with pytest.raises(UsageError, match="has a ProductProcess; fields are Gaussian, masked or"):
        GibbsProcess({"x": ProductProcess({"y": FLOW})}, {}, 1)
    with pytest.raises(UsageError, match="field 'x' has 3 elements, elements says 4"):
        GibbsProcess({"x": FLOW}, {"x": 4}, 1).prior({"x": torch.zeros(2, 3, 1)})
