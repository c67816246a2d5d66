"""The optimiser of Muon and AdamW: against the singular value decomposition and torch's AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_rlft.core.checks import UsageError
from lit_rlft.optimizers import MuonAdamW

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Linear(24, 3))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (net(x) - x[:, :3]).square().mean().backward()
    optimizer.step()


def test_steps_of_matrices_are_nearly_orthogonal() -> None:
    net = network()
    before = net[0].weight.detach().clone()
    step(net, MuonAdamW(net.parameters(), lr=0.1))
    taken = (before - net[0].weight.detach()) / (0.1 * 0.2 * 32**0.5)
    u, _, v = torch.linalg.svd(net[0].weight.grad, full_matrices=False)
    rotated = u.mT @ taken @ v.mT
    values = rotated.diagonal()
    # Five iterations leave singular values around 1, those of the smallest ones behind.
    assert values.median() == pytest.approx(1.0, abs=0.3)
    assert values.max() < 1.3
    assert (rotated - torch.diag(values)).abs().max() < 0.05  # bfloat16


def test_all_other_parameters_take_steps_of_adamw() -> None:
    net, other = network(), network()
    ours = MuonAdamW(net.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    step(net, ours)
    step(other, theirs)
    for mine, reference in ((net[0].bias, other[0].bias), (net[3].weight, other[3].weight)):
        torch.testing.assert_close(mine, reference)
    assert not torch.allclose(net[2].weight, other[2].weight)


def test_schedulers_reach_both_parts() -> None:
    net = network()
    optimizer = MuonAdamW(net.parameters(), lr=1.0)
    LambdaLR(optimizer, lambda _: 0.0)
    before = copy.deepcopy(net.state_dict())
    step(net, optimizer)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_restored_optimiser_goes_on_as_if_never_stopped() -> None:
    net = network()
    optimizer = MuonAdamW(net.parameters(), lr=0.01)
    step(net, optimizer, 0)
    resumed = copy.deepcopy(net)
    other = MuonAdamW(resumed.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 1)
    step(resumed, other, 1)
    for mine, theirs in zip(net.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"needs torch 2\.9"):
        MuonAdamW(network().parameters())
