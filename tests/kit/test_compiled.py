"""Compiling in place, with a LoRA switched on and off and with counting hooks."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_rlft.cost.counters import Cost, count_calls, count_flops
from lit_rlft.kit.compiled import Compiled, compile_network


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _run(how: Compiled | None, seen: list[int]) -> tuple[list[Tensor], list[int], Cost, list[str]]:
    """Run three rounds, adapter on, off and on with gradients; return results and graphs."""

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(sum(node.op != "placeholder" for node in graph.graph.nodes))
        return graph.forward

    torch.manual_seed(0)
    network, cost = _Network(), Cost()
    if how is not None:
        compile_network(network, how, backend=backend)
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    inject_adapter_in_model(config, network)
    count_calls(network, lambda: cost)
    count_flops(network, lambda: cost)
    x, found, graphs = torch.randn(3, 4), [], []
    for _ in range(3):
        for off in (False, True):
            for layer in network.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer._disable_adapters = off
            with torch.no_grad():
                found.append(network(x))
            if not off:
                found.append(network(x).detach())
        graphs.append(len(seen))
    return found, graphs, cost, list(network.state_dict())


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_a_switched_adapter_compiles_nothing_after_the_first_round(how: Compiled) -> None:
    torch._dynamo.reset()
    seen: list[int] = []
    found, graphs, cost, names = _run(how, seen)
    expected, _, plain, plain_names = _run(None, [])
    assert graphs[0] == graphs[2] and 0 < graphs[0] <= 4
    assert max(seen) > 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (cost.denoiser_calls, cost.flops) == (plain.denoiser_calls, plain.flops) and cost.flops
    assert names == plain_names
    torch._dynamo.reset()


def test_an_odd_last_batch_makes_one_graph_more_and_later_sizes_none() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    network, seen = _Network(), []
    compile_network(network, "whole", backend=backend)
    for rows in (5, 3, 5, 2, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(network(x), network.forward(x))
        seen.append(len(graphs))
    assert seen == [1, 2, 2, 2, 2]
    torch._dynamo.reset()
