"""LPIPS's diversity against its formula, on random weights in the published formats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.metrics import LPIPSDiversity
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition

SIZES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    seeded = torch.Generator().manual_seed(0)
    network, heads = {"classifier.1.weight": torch.zeros(2, 2)}, {}
    for i, (place, (out, channels, side)) in enumerate(SIZES.items()):
        drawn = torch.randn(out, channels, side, side, generator=seeded)
        network[f"features.{place}.weight"] = drawn / (channels * side**2) ** 0.5
        network[f"features.{place}.bias"] = torch.randn(out, generator=seeded) / 10
        heads[f"lin{i}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=seeded)
    return network, heads


def saved(folder: Path, network: State, heads: State) -> dict[str, str]:
    torch.save(network, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return {"network": str(folder / "alexnet.pth"), "heads": str(folder / "alex.pth")}


def condition(rows: list[int]) -> Condition:
    entries = [{"prompt": str(row)} for row in range(max(rows) + 1)]
    return Condition(entries, {}, torch.tensor(rows))


def pictures(number: int, height: int = 40, width: int = 48) -> Tensor:
    seeded = torch.Generator().manual_seed(1)
    return torch.rand(number, 3, height, width, generator=seeded, dtype=torch.float64)


def lpips(x: Tensor, y: Tensor, network: State, heads: State) -> Tensor:
    """Return the distance of two pictures [3, H, W] in [0, 1]."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    total, pair = torch.zeros(()).double(), (torch.stack([x, y]) * 2 - 1 - shift) / scale
    for i, (place, (_, _, side)) in enumerate(SIZES.items()):
        weight, bias = (network[f"features.{place}.{kind}"].double() for kind in ("weight", "bias"))
        if place in (3, 6):
            pair = F.max_pool2d(pair, 3, 2)
        # 11 pixels are padded by 2, as in torchvision.
        settings = {"stride": 1, "padding": side // 2} if place else {"stride": 4, "padding": 2}
        pair = F.conv2d(pair, weight, bias, **settings).relu()
        one, other = pair / (pair.square().sum(1, keepdim=True).sqrt() + 1e-10)
        each = heads[f"lin{i}.model.1.weight"].double().squeeze() @ (one - other).flatten(1) ** 2
        total = total + each.mean()
    return total


def test_diversity_is_the_mean_distance_of_pairs(
    states: tuple[State, State], tmp_path: Path
) -> None:
    metric = LPIPSDiversity(**saved(tmp_path, *states), batch_size=2).double()
    shown = pictures(5)
    found = metric.evaluate(shown, condition([0, 0, 1, 0, 2]))["lpips_diversity"]
    near = {(i, j): lpips(shown[i], shown[j], *states) for i, j in ((0, 1), (0, 3), (1, 3))}
    # Three times the mean, minus twice the mean without one of them.
    whole = near[0, 1] + near[0, 3] + near[1, 3]
    expected = [whole - 2 * near[1, 3], whole - 2 * near[0, 3], whole - 2 * near[0, 1]]
    assert found[[0, 1, 3]].allclose(torch.stack(expected), rtol=1e-10, atol=0)
    assert found[[2, 4]].isnan().all() and float(near[0, 1]) > 1e-3
    alike = metric.evaluate(shown[:1].expand(3, -1, -1, -1), condition([0, 0, 0]))
    assert alike["lpips_diversity"].eq(0).all()
    assert set(metric.guards()) == {"lpips_diversity"}


def test_small_pictures_are_refused(states: tuple[State, State], tmp_path: Path) -> None:
    metric = LPIPSDiversity(**saved(tmp_path, *states)).double()
    smallest = metric.evaluate(pictures(2, 31, 31), condition([0, 0]))["lpips_diversity"]
    assert smallest.isfinite().all()
    with pytest.raises(UsageError, match=r"at least 31 pixels a side, got \(30, 40\); raise"):
        metric.evaluate(pictures(2, 30, 40), condition([0, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, h: n.pop("features.6.bias"), r"^network: .*AlexNet .*lacks features\.6\.bias"),
        (lambda n, h: h.pop("lin2.model.1.weight"), r"^heads: .*lacks lin2\.model\.1\.weight"),
        (lambda n, h: n.update(more=torch.zeros(1)), r"^network: .*has an unknown more"),
    ],
)
def test_wrong_keys_are_named(
    states: tuple[State, State], change: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    network, heads = (dict(state) for state in states)
    change(network, heads)
    with pytest.raises(UsageError, match=message):
        LPIPSDiversity(**saved(tmp_path, network, heads))
