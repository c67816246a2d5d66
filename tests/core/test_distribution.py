import pytest
import torch
from scipy import stats
from torch import distributions

from lit_rlft.core.distribution import Categorical, Gaussian, Product
from lit_rlft.core.randomness import generators
from tests.support import assert_close_in_rounding


def gaussians() -> tuple[Gaussian, Gaussian]:
    generator = torch.Generator().manual_seed(0)
    loc, other = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=generator)
    std = torch.tensor([0.1, 1.0, 2.0, 0.5], dtype=torch.float64).reshape(4, 1, 1)
    return Gaussian(loc, std), Gaussian(other, 2 * std)


def categoricals() -> tuple[Categorical, Categorical]:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    return Categorical(logits), Categorical(other)


def test_gaussian_agrees_with_torch() -> None:
    ours, other = gaussians()
    exact = distributions.Normal(ours.loc, ours.std.expand_as(ours.loc))
    reference = distributions.Normal(other.loc, other.std.expand_as(other.loc))
    x = other.loc
    logs, kls = exact.log_prob(x), distributions.kl_divergence(exact, reference)
    torch.testing.assert_close(ours.log_prob(x), logs.sum(dim=(1, 2)))
    torch.testing.assert_close(ours.log_prob(x, "mean"), logs.mean(dim=(1, 2)))
    torch.testing.assert_close(ours.kl(other), kls.sum(dim=(1, 2)))
    torch.testing.assert_close(ours.kl(other, "mean"), kls.mean(dim=(1, 2)))
    assert torch.equal(ours.mean, ours.loc)


def test_categorical_agrees_with_torch() -> None:
    ours, other = categoricals()
    exact = distributions.Categorical(logits=ours.log_probs)
    reference = distributions.Categorical(logits=other.log_probs)
    x = torch.randint(0, 5, (4, 3))
    logs, kls = exact.log_prob(x), distributions.kl_divergence(exact, reference)
    torch.testing.assert_close(ours.log_prob(x), logs.sum(dim=1))
    torch.testing.assert_close(ours.log_prob(x, "mean"), logs.mean(dim=1))
    torch.testing.assert_close(ours.kl(other), kls.sum(dim=1))
    torch.testing.assert_close(ours.kl(other, "mean"), kls.mean(dim=1))
    assert torch.equal(ours.mean, exact.probs.argmax(dim=-1))


def test_point_masses_count_zero() -> None:
    loc = torch.randn(3, 2)
    std = torch.tensor([[0.0], [1.0], [0.0]])
    ours, other = Gaussian(loc, std), Gaussian(loc + 1, std)
    drawn = ours.sample()
    assert torch.equal(drawn[0], loc[0]) and torch.equal(drawn[2], loc[2])
    exact = distributions.Normal(loc[1], 1.0).log_prob(drawn[1]).sum()
    torch.testing.assert_close(ours.log_prob(drawn), torch.stack([exact * 0, exact, exact * 0]))
    torch.testing.assert_close(ours.kl(other), torch.tensor([0.0, 1.0, 0.0]))
    loc.requires_grad_()
    (grad,) = torch.autograd.grad(Gaussian(loc, std).log_prob(drawn + 1).sum(), loc)
    assert grad.isfinite().all()


def test_impossible_classes() -> None:
    ours = Categorical(torch.tensor([[0.0, 0.0, -torch.inf]]))
    other = Categorical(torch.zeros(1, 3))  # one class per sample, [B]
    assert ours.log_prob(torch.tensor([2])).item() == -torch.inf
    assert ours.kl(other).item() == pytest.approx(torch.tensor(1.5).log().item())
    assert other.kl(ours).item() == torch.inf
    many = Categorical(torch.tensor([0.0, 0.0, -torch.inf]).expand(1000, 3))
    assert (many.sample() < 2).all()


def test_categorical_frequencies() -> None:
    """Chi-square of 40 000 Gumbel-max draws at 1e-3."""
    probs = torch.tensor([0.5, 0.25, 0.15, 0.09, 0.01], dtype=torch.float64)
    torch.manual_seed(0)
    drawn = Categorical(probs.log().expand(40_000, 5)).sample()
    counts = torch.bincount(drawn, minlength=5)
    assert stats.chisquare(counts.numpy(), 40_000 * probs.numpy()).pvalue > 1e-3


def test_gaussian_samples_have_its_law() -> None:
    """Kolmogorov-Smirnov at 1e-3."""
    torch.manual_seed(0)
    drawn = Gaussian(torch.full((5000, 1), 2.0), torch.tensor(0.5)).sample().flatten()
    assert stats.kstest(drawn.numpy(), stats.norm(2.0, 0.5).cdf).pvalue > 1e-3


def test_gaussian_samples_carry_gradients_on_request() -> None:
    loc, std = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    law = Gaussian(loc, std)
    assert not law.sample().requires_grad
    drawn = law.rsample(generators([1, 2]))
    grads = torch.autograd.grad(drawn.sum(), [loc, std])
    torch.testing.assert_close(grads[0], torch.ones(2, 3))
    torch.testing.assert_close(grads[1], drawn.detach().sum(dim=1, keepdim=True))


@pytest.mark.parametrize("law", [gaussians()[0], categoricals()[0]], ids=["normal", "classes"])
def test_a_row_is_drawn_alike_in_every_batch(law: Gaussian | Categorical) -> None:
    whole = law.sample(generators([10, 11, 12, 13]))
    rows = [3, 1]
    if isinstance(law, Gaussian):
        part: Gaussian | Categorical = Gaussian(law.loc[rows], law.std[rows])
    else:
        part = Categorical(law.log_probs[rows])
    assert_close_in_rounding(part.sample(generators([13, 11])), whole[rows])


def test_product_adds_over_fields() -> None:
    fields = {"b": gaussians()[0], "a": categoricals()[0]}
    others = {"b": gaussians()[1], "a": categoricals()[1]}
    ours, other = Product(fields), Product(others)
    assert list(ours.fields) == ["a", "b"]
    x = ours.sample(generators(range(4)))
    for reduction in ("sum", "mean"):
        logs = [fields[name].log_prob(x[name], reduction) for name in fields]
        kls = [fields[name].kl(others[name], reduction) for name in fields]
        torch.testing.assert_close(ours.log_prob(x, reduction), logs[0] + logs[1])
        torch.testing.assert_close(ours.kl(other, reduction), kls[0] + kls[1])
    assert torch.equal(ours.mean["b"], fields["b"].mean)


def test_divergence_of_laws_that_exclude_the_same_class_has_a_gradient() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    excluded = torch.zeros(4).index_fill(0, torch.tensor([1]), -torch.inf)
    law, other = Categorical(logits + excluded), Categorical(torch.zeros(2, 3, 4) + excluded)
    (grads,) = torch.autograd.grad(law.kl(other).sum(), logits)
    kept = logits.detach()[..., [0, 2, 3]].requires_grad_()
    expected = Categorical(kept).kl(Categorical(torch.zeros(2, 3, 3)))
    torch.testing.assert_close(law.kl(other), expected)
    torch.testing.assert_close(grads[..., [0, 2, 3]], torch.autograd.grad(expected.sum(), kept)[0])
    assert not grads[..., 1].any()


def test_divergences_between_families_are_refused() -> None:
    normal, classes = gaussians()[0], categoricals()[0]
    for law, other in ((normal, classes), (classes, normal), (Product({"a": normal}), normal)):
        with pytest.raises(TypeError, match="closed-form KL"):
            law.kl(other)
