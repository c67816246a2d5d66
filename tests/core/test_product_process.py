import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.distribution import Product
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess, MaskedProcess, ProductProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP, DiscreteVP, RectifiedFlow, vp_betas
from lit_rlft.core.state import State, fields_of
from tests.support import assert_close_in_rounding

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
CENTERS = torch.tensor([-1.5, 0.5, 2.0])
STD = 0.3
FLOW = GaussianProcess(RectifiedFlow(shift=2.0), "velocity")
MASKED = MaskedProcess(3)
MIXED = ProductProcess({"category": MASKED, "box": FLOW}, {"category": 0.5})


def mixed_state(num: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "box": torch.randn(num, 1, generator=generator),
        "category": torch.randint(0, 4, (num, 1), generator=generator),
    }


def exact(x_t: State, t: Tensor, condition: Condition | None) -> dict[str, Tensor]:
    """Denoiser of c ~ WEIGHTS, box | c ~ N(CENTERS[c], STD^2) by Bayes' rule on both fields."""
    x = fields_of(x_t)
    alpha, sigma = (1 - t).unsqueeze(1), t.unsqueeze(1)
    variance = alpha**2 * STD**2 + sigma**2
    offset = x["box"] - alpha * CENTERS  # [B, 3]
    logits = WEIGHTS.log() - 0.5 * offset**2 / variance
    shown = torch.nn.functional.one_hot(x["category"][:, 0], 4)[:, :3].float()
    hidden = x["category"] == 3
    share = torch.where(hidden, logits.softmax(dim=1), shown)
    x_0 = (share * (CENTERS + alpha * STD**2 / variance * offset)).sum(dim=1, keepdim=True)
    eps = (share * sigma / variance * offset).sum(dim=1, keepdim=True)
    return {"box": (eps - x_0).float(), "category": logits.unsqueeze(1)}


def test_exact_denoiser_samples_a_mixed_law() -> None:
    """Class shares, and mean and std of each class, within 4 standard errors plus 3 % of a std.

    Fields are updated side by side, which is an error of first order in the step.
    """
    num = 6000
    torch.manual_seed(0)
    blank = {"box": torch.zeros(num, 1), "category": torch.zeros(num, 1, dtype=torch.int64)}
    for eta in (0.0, 1.0):
        x_0 = fields_of(
            Sampler(200, eta).sample(
                exact,
                MIXED,
                MIXED.prior(blank).sample(),
                Condition([{}], {}, torch.zeros(num, dtype=torch.int64)),
            )
        )
        for k in range(3):
            boxes = x_0["box"][x_0["category"] == k]
            weight, size = float(WEIGHTS[k]), len(boxes)
            error = (weight * (1 - weight) / num) ** 0.5
            assert size / num == pytest.approx(weight, abs=4 * error + 0.003)
            assert boxes.mean().item() == pytest.approx(
                float(CENTERS[k]), abs=4 * STD / size**0.5 + 0.03 * STD
            )
            assert boxes.std().item() == pytest.approx(STD, rel=4 / (2 * size) ** 0.5 + 0.03)


def test_losses_add_with_their_weights() -> None:
    x_s, x_t = mixed_state(5), mixed_state(5)
    x_t["category"] = torch.full((5, 1), 3)
    s, t = torch.full((5,), 0.1), torch.full((5,), 0.6)
    output = {"box": torch.randn(5, 1), "category": torch.randn(5, 1, 3)}
    parts = [
        FLOW.loss(output["box"], x_s["box"], x_t["box"], s, t),
        0.5 * MASKED.loss(output["category"], x_s["category"], x_t["category"], s, t),
    ]
    torch.testing.assert_close(MIXED.loss(output, x_s, x_t, s, t), parts[0] + parts[1])


def test_transitions_and_their_log_probabilities_are_those_of_the_fields() -> None:
    x_t, t, s = mixed_state(6), torch.full((6,), 0.7), torch.full((6,), 0.4)
    output = exact(x_t, t, None)
    step = MIXED.transition(output, x_t, t, s, 1.0)
    assert isinstance(step, Product)
    box = FLOW.transition(output["box"], x_t["box"], t, s, 1.0)
    category = MASKED.transition(output["category"], x_t["category"], t, s, 1.0)
    x_s = step.sample(generators(range(6)))
    torch.testing.assert_close(
        step.log_prob(x_s), box.log_prob(x_s["box"]) + category.log_prob(x_s["category"])
    )
    other = MIXED.transition(exact(x_t, t - 0.1, None), x_t, t, s, 1.0)
    kl_box = box.kl(other.fields["box"])
    kl_category = category.kl(other.fields["category"])
    torch.testing.assert_close(step.kl(other), kl_box + kl_category)
    denoised = fields_of(MIXED.denoised(output, x_t, t))
    torch.testing.assert_close(denoised["box"], FLOW.denoised(output["box"], x_t["box"], t))
    assert (denoised["category"] != 3).all()


def test_noise_is_drawn_per_field_and_row() -> None:
    x_0 = {"box": torch.ones(3, 4), "category": torch.ones(3, 4, dtype=torch.int64)}
    s, t = torch.zeros(3), torch.full((3,), 0.5)
    whole = fields_of(MIXED.noised(x_0, s, t, generators([1, 2, 3])))
    last = {name: field[2:] for name, field in x_0.items()}
    part = fields_of(MIXED.noised(last, s[2:], t[2:], generators([3])))
    for name in x_0:
        assert_close_in_rounding(whole[name][2:], part[name])


def test_all_fields_share_the_clock_of_the_first() -> None:
    uniform = torch.linspace(0, 0.99, 7)
    assert torch.equal(MIXED.times(10), FLOW.times(10))
    assert torch.equal(MIXED.draw_times(uniform, 0.3), FLOW.draw_times(uniform, 0.3))
    discrete = GaussianProcess(DiscreteVP(vp_betas()), "v")
    clock = ProductProcess({"a": discrete, "b": GaussianProcess(CosineVP(), "v")})
    assert torch.equal(clock.times(10), discrete.times(10))


@pytest.mark.parametrize("low", [0.0, 0.25])
def test_a_table_of_levels_follows_a_continuous_clock(low: float) -> None:
    # Times that round to the same entry of the table must not lose the noise between them.
    process = ProductProcess({"a": MASKED, "b": GaussianProcess(DiscreteVP(vp_betas()), "v")})
    uniform = torch.tensor([0.0, 0.5, 0.9999, 1 - 2**-24])
    t, s = process.draw_times(uniform, low), torch.full((4,), low, dtype=torch.float64)
    x_s = {"a": torch.zeros(4, 1, dtype=torch.int64), "b": torch.ones(4, 1)}
    output = {"a": torch.zeros(4, 1, 3), "b": torch.zeros(4, 1)}
    loss = process.loss(output, x_s, process.noised(x_s, s, t), s, t)
    assert loss.isfinite().all()


def test_capabilities_are_those_of_all_fields() -> None:
    assert not MIXED.differentiable and not MIXED.invertible
    pair = ProductProcess({"a": FLOW, "b": FLOW})
    assert pair.differentiable and pair.invertible


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="fields"):
        ProductProcess({})
    with pytest.raises(UsageError, match="weights"):
        ProductProcess({"a": FLOW}, {"b": 1.0})
