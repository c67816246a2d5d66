"""Rates of a round by hand, peaks of cards, and the operations of backward passes."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_rlft.cost.counters import Cost, count_flops
from lit_rlft.cost.peaks import peak_flops, peak_of
from lit_rlft.cost.throughput import RoundCost, throughput


def test_rates_are_those_of_all_processes_and_milliseconds_those_of_one() -> None:
    phases = {"collect": 3.0, "update": 1.5, "idle": 0.0}
    cost = RoundCost(5.0, 60, 2000, int(2e12), phases)
    assert throughput(cost, world_size=2, peak=1e12) == {
        "collect": 3.0,
        "collect_ms_per_sample": 100.0,  # 3 s for the 30 samples of this process
        "update": 1.5,
        "update_ms_per_sample": 50.0,
        "samples_per_second": 12.0,
        "denoiser_rows_per_second": 400.0,
        "mfu": pytest.approx(0.4),
    }


def test_what_has_no_value_is_left_out() -> None:
    assert "mfu" not in throughput(RoundCost(1.0, 1, 1, 1, {}), 1, None)
    assert throughput(RoundCost(0.0, 0, 0, 0, {"update": 2.0}), 1, 1e12) == {"update": 2.0}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_of_cards(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_a_processor_has_no_peak() -> None:
    assert peak_of(torch.device("cpu")) is None


@pytest.mark.parametrize("rank", [None, 2])
def test_operations_of_a_backward_pass_are_about_those_that_torch_counts(rank: int | None) -> None:
    """Of 24 equal layers the first has no gradient of its input: one part in 24 or 48."""
    layers = [nn.Linear(64, 64, bias=False) for _ in range(24)]
    network: nn.Module = nn.Sequential(*layers)
    if rank is not None:
        targets = [str(i) for i in range(24)]
        network = inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets), network)
    cost, x = Cost(), torch.randn(5, 64)
    count_flops(network, lambda: cost)
    loss = network(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert cost.backward_flops == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_without_a_graph_there_is_no_backward_pass() -> None:
    network, cost = nn.Linear(3, 3), Cost()
    count_flops(network, lambda: cost)
    with torch.no_grad():
        network(torch.randn(2, 3))
    frozen = nn.Linear(3, 3).requires_grad_(False)
    count_flops(frozen, lambda: cost)
    frozen(torch.randn(2, 3))
    assert cost.flops == 2 * 2 * 2 * 9 and cost.backward_flops == 0
    network(torch.randn(2, 3))
    assert cost.backward_flops == 2 * (2 * 2 * 9)
    assert "backward_flops" not in cost.as_dict()


def test_a_backward_pass_through_a_frozen_network_to_its_input() -> None:
    """As many operations as of its forward pass: none is for weights."""
    network = nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False)
    cost = Cost()
    count_flops(network, lambda: cost)
    x = torch.randn(2, 8, requires_grad=True)
    out = network(x).sum()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, x)
    assert cost.backward_flops == cost.flops == counter.get_total_flops() > 0


def test_an_adapter_that_is_off_and_a_call_within_a_backward_pass_have_none() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    network = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), network)
    layer = next(m for m in network.modules() if isinstance(m, BaseTunerLayer))
    cost = Cost()
    count_flops(network, lambda: cost)
    layer._disable_adapters = True
    network(torch.randn(2, 4))
    assert cost.backward_flops == 0
    layer._disable_adapters = False
    x = torch.randn(2, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
    once = cost.backward_flops
    out.sum().backward()
    assert cost.backward_flops == once > 0  # run again for the backward pass, which counts once
