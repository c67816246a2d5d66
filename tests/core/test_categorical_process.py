import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import MaskedProcess, UniformProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler, walk

CLASSES, MASK = 3, 3
PROCESS = MaskedProcess(CLASSES)
VALUES = torch.tensor(list(itertools.product(range(CLASSES), repeat=2)))  # [9, 2]
PARTIAL = torch.tensor(list(itertools.product(range(CLASSES + 1), repeat=2)))  # [16, 2]
LAW = torch.tensor([8.0, 1, 1, 2, 6, 1, 1, 1, 4]).double() / 25  # correlated over the two positions


def code(states: Tensor) -> Tensor:
    """Row of each state [B, 2] in PARTIAL."""
    return states[:, 0] * (CLASSES + 1) + states[:, 1]


def hide(states: Tensor, hidden: tuple[bool, ...]) -> Tensor:
    return states.where(~torch.tensor(hidden), MASK)


def law_at(level: float) -> Tensor:
    """The law of x_s over PARTIAL when x_0 ~ LAW, by enumeration, [16]."""
    law = torch.zeros(len(PARTIAL), dtype=torch.float64)
    for hidden in itertools.product((False, True), repeat=2):
        weight = np.prod([level if h else 1 - level for h in hidden])
        law.index_add_(0, code(hide(VALUES, hidden)), LAW * weight)
    return law


def transitions(law_s: Tensor, s: float, t: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All (x_s, x_t, probability) when x_s ~ law_s is carried from s to t, by enumeration."""
    keep = (1 - t) / (1 - s)
    table = []
    for hidden in itertools.product((False, True), repeat=2):
        shown = (PARTIAL != MASK).long()
        weight = law_s.clone()
        for position, hide_it in enumerate(hidden):
            # What is hidden at s stays hidden: such a position is counted once, under hide_it.
            factor = torch.tensor([1.0, 1 - keep] if hide_it else [0.0, keep])
            weight = weight * factor.double()[shown[:, position]]
        table.append((PARTIAL, hide(PARTIAL, hidden), weight))
    return table


def exact_logits(law_s: Tensor, s: float, t: float) -> Tensor:
    """log P(x_s^i = v | x_t, position i shown at s and hidden at t), [16, 2, 3]."""
    counts = torch.zeros(len(PARTIAL), 2, CLASSES, dtype=torch.float64)
    for x_s, x_t, weight in transitions(law_s, s, t):
        for position in range(2):
            known = (x_s[:, position] != MASK) & (x_t[:, position] == MASK)
            place = (code(x_t)[known], torch.tensor(position), x_s[known, position])
            counts.index_put_(place, weight[known], accumulate=True)
    return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1e-300)).log().clamp(min=-80)


def expected_loss(logits: Tensor, law_s: Tensor, s: float, t: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x_s, x_t, weight in transitions(law_s, s, t):
        levels = torch.full((2, len(PARTIAL)), 1.0, dtype=torch.float64)
        times_s, times_t = levels[0] * s, levels[1] * t
        loss = PROCESS.loss(logits[code(x_t)], x_s, x_t, times_s, times_t)
        total = total + (weight * loss).sum()
    return total


def posterior(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """The exact denoiser of LAW."""
    return exact_logits(law_at(0.0), 0.0, 0.5)[code(x)]


def test_enumeration_covers_everything_once() -> None:
    total = sum(weight.sum() for _, _, weight in transitions(law_at(0.25), 0.25, 0.7))
    assert float(total) == pytest.approx(1)


def test_prior_is_fully_masked() -> None:
    prior = PROCESS.prior(torch.zeros(5, 2, dtype=torch.int64))
    x_1 = prior.sample()
    assert (x_1 == MASK).all() and x_1.dtype == torch.int64
    assert not prior.log_prob(x_1).any()
    assert PROCESS.times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_transition_is_the_posterior_of_absorption() -> None:
    # A hidden position is still hidden at s with probability s / t (Bayes), else drawn.
    x_t = torch.tensor([[MASK, 2], [0, MASK]])
    logits = torch.randn(2, 2, CLASSES, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.0])
    step = PROCESS.transition(logits, x_t, t, s, 0.0)
    probs = logits.softmax(dim=-1)
    stays = step.log_prob(torch.tensor([[MASK, 2], [0, MASK]])).exp()
    torch.testing.assert_close(stays, torch.tensor([0.75, 0.0]))
    for v in range(CLASSES):
        moved = step.log_prob(torch.tensor([[v, 2], [0, v]])).exp()
        torch.testing.assert_close(moved, torch.stack([0.25 * probs[0, 0, v], probs[1, 1, v]]))
    changed = step.log_prob(torch.tensor([[MASK, 1], [1, 0]]))
    assert (changed == -torch.inf).all()


def test_denoised_fills_hidden_positions_only() -> None:
    logits = torch.zeros(1, 2, CLASSES)
    logits[..., 1] = 1.0
    x = torch.tensor([[MASK, 2]])
    assert PROCESS.denoised(logits, x, torch.ones(1)).tolist() == [[1, 2]]


def test_exact_posterior_samples_the_law() -> None:
    """Chi-square at 1e-3; both positions unmask in one of 150 steps with probability 1 / 150."""
    num = 12_000
    torch.manual_seed(0)
    blank = torch.zeros(num, 2, dtype=torch.int64)
    condition = Condition([{}], {}, torch.zeros(num, dtype=torch.int64))
    table = exact_logits(law_at(0.0), 0.0, 0.5)
    x_0 = Sampler(150).sample(
        lambda x, t, c: table[code(x)], PROCESS, PROCESS.prior(blank).sample(), condition
    )
    assert (x_0 != MASK).all()
    counts = torch.bincount(x_0[:, 0] * CLASSES + x_0[:, 1], minlength=9)
    assert stats.chisquare(counts.numpy(), num * LAW.numpy()).pvalue > 1e-3


def test_shown_positions_stay_along_a_trajectory() -> None:
    torch.manual_seed(0)
    x_1 = PROCESS.prior(torch.zeros(50, 2, dtype=torch.int64)).sample()
    condition = Condition([{}], {}, torch.zeros(50, dtype=torch.int64))
    states = [x for _, x in walk(posterior, PROCESS, x_1, condition, PROCESS.times(8), 0.0)]
    for before, after in itertools.pairwise(states):
        assert torch.equal(before[before != MASK], after[before != MASK])


def test_forward_kernel_composes() -> None:
    """Share of shown positions and survival of their values, within 4 standard errors."""
    num = 50_000
    x_0 = torch.arange(num * 2).reshape(num, 2) % CLASSES
    s, t = torch.full((num,), 0.3), torch.full((num,), 0.8)
    torch.manual_seed(0)
    x_s = PROCESS.noised(x_0, torch.zeros_like(s), s)
    x_t = PROCESS.noised(x_s, s, t)
    direct = PROCESS.noised(x_0, torch.zeros_like(t), t)
    for states, shown in ((x_s, 0.7), (x_t, 0.2), (direct, 0.2)):
        kept = states != MASK
        assert torch.equal(states[kept], x_0[kept])
        error = (shown * (1 - shown) / (2 * num)) ** 0.5
        assert kept.float().mean().item() == pytest.approx(shown, abs=4 * error)
    assert (x_t[x_s == MASK] == MASK).all()
    everything = PROCESS.noised(x_0, torch.zeros_like(t), torch.ones_like(t))
    assert (everything == MASK).all()


def test_noise_depends_on_the_row_alone() -> None:
    x_0 = torch.zeros(4, 8, dtype=torch.int64)
    s, t = torch.zeros(4), torch.full((4,), 0.5)
    whole = PROCESS.noised(x_0, s, t, generators([1, 2, 3, 4]))
    part = PROCESS.noised(x_0[2:], s[2:], t[2:], generators([3, 4]))
    assert torch.equal(whole[2:], part)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.25, 0.6), (0.25, 0.26), (0.5, 1.0)])
@pytest.mark.parametrize("tilted", [False, True])
def test_loss_is_least_at_the_exact_conditional(s: float, t: float, tilted: bool) -> None:
    """Expected gradient by enumeration; tilted: any law of x_s, as acceptance makes it."""
    law_s = law_at(s)
    if tilted:
        law_s = law_s * torch.rand(16, generator=torch.Generator().manual_seed(1)).double()
        law_s = law_s / law_s.sum()
    logits = exact_logits(law_s, s, t).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(logits, law_s, s, t), logits)
    # The process works in float32.
    assert gradient.abs().max() < 1e-6
    off = (logits.detach() + 0.3 * torch.eye(CLASSES)[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(off, law_s, s, t), off)
    assert gradient.abs().max() > 1e-4
    assert expected_loss(off, law_s, s, t) > expected_loss(logits, law_s, s, t)


@pytest.mark.parametrize("s", [0.25, 0.5])
def test_intermediate_loss_has_the_same_minimiser_as_the_native_one(s: float) -> None:
    logits = exact_logits(law_at(0.0), 0.0, 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(logits, law_at(s), s, 0.8), logits)
    assert gradient.abs().max() < 1e-6


def test_native_loss_integrates_to_the_entropy() -> None:
    # The bound is tight for the exact denoiser: E_t sum_i nll_i / t = H(x_0); the integrand is a
    # polynomial in t, so Gauss-Legendre with 4 nodes is exact.
    nodes, weights = np.polynomial.legendre.leggauss(4)
    logits = exact_logits(law_at(0.0), 0.0, 0.5)
    bound = sum(
        w / 2 * 2 * expected_loss(logits, law_at(0.0), 0.0, (x + 1) / 2).item()
        for x, w in zip(nodes, weights, strict=True)
    )
    assert bound == pytest.approx(stats.entropy(LAW.numpy()), rel=1e-5)


def test_intermediate_weight_is_bounded() -> None:
    # As t -> s only the share (t - s) / t of hidden positions counts: the mean loss goes to 0.
    logits = torch.zeros(16, 2, CLASSES)
    near = expected_loss(logits, law_at(0.5), 0.5, 0.501)
    wide = expected_loss(logits, law_at(0.5), 0.5, 0.7)
    assert 0 < near < wide < expected_loss(logits, law_at(0.0), 0.0, 0.7)
    exact = np.log(CLASSES) * 0.2 / 0.7  # 0.7 - 0.5 is known and hidden; over t
    assert wide.item() == pytest.approx(exact, rel=1e-5)


def test_a_process_without_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="num_classes"):
        MaskedProcess(0)


def test_uniform_noise_with_a_class_that_cannot_be() -> None:
    """The last step's loss is the cross-entropy; its gradient says nothing of that class."""
    process, t = UniformProcess(CLASSES), torch.tensor([0.5], dtype=torch.float64)
    logits = torch.tensor([[[0.3, 0.1, -torch.inf]]], requires_grad=True)
    state = torch.tensor([[1]])
    loss = process.loss(logits, state, torch.tensor([[0]]), torch.zeros(1).double(), t)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    share = float(torch.tensor([0.3, 0.1]).softmax(0)[0])
    assert float(loss) == pytest.approx(-math.log(1 - share), rel=1e-6)
    torch.testing.assert_close(found, torch.tensor([[[share, -share, 0.0]]]))
    law = process.transition(logits, state, t, torch.zeros(1).double(), 1.0)
    assert law.log_prob(torch.tensor([[2]])).exp() == 0
