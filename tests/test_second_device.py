"""The second device refuses what mixes it with the CPU, and computes what the CPU does."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.second_device import SecondTensor
from tests.support import assert_equal

Case = Callable[[Tensor, Tensor], object]


MIXED: dict[str, Case] = {
    "sum": lambda here, there: here[0] + there,
    "concatenation of numbers": lambda here, there: torch.stack([here[0, 0], there[0]]),
    "rows of the CPU": lambda here, there: there[torch.arange(2, device=here.device)],
    "mask of rows of the CPU": lambda here, there: there[here[0] > 0],
    "gather": lambda here, there: here.gather(1, there.long()[None]),
    "values put at places": lambda here, there: here.__setitem__(here > 0, there),
    "in place on the CPU": lambda here, there: there[0].add_(here[0, 0]),
    "out": lambda here, there: torch.add(here[0], here[0], out=there),
    "equal": lambda here, there: torch.equal(here[0], there),
    "matrix": lambda here, there: nn.functional.linear(here, torch.zeros(2, 4)),
    "generator": lambda here, there: here.normal_(generator=torch.Generator()),
    "new with generator": lambda here, there: torch.randn(
        2, device=here.device, generator=torch.Generator()
    ),
    "numpy": lambda here, there: here.numpy(),
    "array": lambda here, there: np.asarray(here),
}
FINE: dict[str, Case] = {
    "number of the CPU": lambda here, there: here + there[0],
    "chosen number": lambda here, there: torch.where(here > 0, here, torch.tensor(0.0)),
    "index of the CPU": lambda here, there: here[:, torch.arange(2)],
    "rows of the CPU put": lambda here, there: here.__setitem__(0, there),
    "put into the CPU": lambda here, there: there.__setitem__(slice(None), here[0]),
    "copy": lambda here, there: there.copy_(here[0]),
    "like it": lambda here, there: there.to(here) + torch.zeros_like(here).new_ones(4),
    "made there": lambda here, there: here[:, torch.arange(2, device=here.device)],
    "read": lambda here, there: (float(here.sum()), here.tolist(), f"{here[0, 0]:.1f}"),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixtures_are_refused(case: str, second: torch.device) -> None:
    here = torch.randn(3, 4).to(second)
    with pytest.raises(RuntimeError, match=r"same device|generator|numpy"):
        MIXED[case](here, torch.randn(4))


@pytest.mark.parametrize("case", FINE)
def test_what_cuda_allows_is_allowed(case: str, second: torch.device) -> None:
    FINE[case](torch.randn(3, 4).to(second), torch.randn(4))


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_are_made_there_and_moved(inference: bool, second: torch.device) -> None:
    with torch.inference_mode(inference):
        made = [torch.zeros(2, device=second), torch.tensor([1, 2], device="second")]
        made += [torch.arange(3, device=second)[1:], torch.eye(2).to("second"), made[0].double()]
        assert all(type(one) is SecondTensor and one.device == second for one in made)
        assert all(type(one.cpu()) is Tensor and type(one.to("cpu")) is Tensor for one in made)
        assert type(made[0].to(torch.ones(1))) is Tensor
    assert_equal(made[2].cpu(), torch.tensor([1, 2]))


def test_views_share_what_they_show(second: torch.device) -> None:
    whole = torch.zeros(2, 3, device=second)
    whole.view(6)[4:].add_(1)
    whole[0].copy_(torch.ones(3))
    assert_equal(whole.cpu(), torch.tensor([[1.0, 1, 1], [0, 1, 1]]))


class Doubled(torch.autograd.Function):
    """A function whose gradient is its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        assert gradient.device == ctx.saved_tensors[0].device
        return 2 * gradient


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Take two steps and return weights and gradients, on the CPU."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        hidden = checkpoint(model[:4], x, use_reentrant=False)
        hidden = Doubled.apply(hidden.mul(1.5).relu_())
        model[4](hidden[:, None]).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    named = dict(model.named_parameters())
    ends = {name: weight.detach().cpu() for name, weight in named.items()}
    return ends | {f"{name}.grad": weight.grad.cpu() for name, weight in named.items()}


def test_training_is_that_of_the_cpu(second: torch.device) -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)
    layers = [nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 8), attention]
    model, x = nn.Sequential(*layers), torch.randn(2, 1, 4, 4)
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    torch.manual_seed(1)
    wanted = trained(model, x)
    content.seek(0)
    model.to(second).load_state_dict(torch.load(content, weights_only=True))
    assert all(type(weight) is SecondTensor for weight in model.parameters())
    torch.manual_seed(1)
    assert_equal(trained(model, x.to(second)), wanted)
    again = io.BytesIO()
    torch.save(model.state_dict(), again)
    again.seek(0)
    saved = torch.load(again, weights_only=True)
    assert_equal(saved, {name: wanted[name] for name in saved})
    assert type(next(model.cpu().parameters())) is nn.Parameter


def test_weights_are_exchanged(second: torch.device) -> None:
    weight = nn.Parameter(torch.zeros(2, device=second))
    weight.data = torch.ones(2, device=second)
    assert_equal((weight * 2).detach().cpu(), torch.full((2,), 2.0))
