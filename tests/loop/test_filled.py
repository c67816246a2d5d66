"""A compiled network has microbatches of one size: graphs are counted, gradients compared."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_rlft.core.randomness import Generators, randn_like
from lit_rlft.core.state import tensor_of
from lit_rlft.cost.meter import Meter
from lit_rlft.kit.compiled import compile_network
from lit_rlft.loop.batch_sizes import BatchSizes
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.updates import Layout, Passes, Update, accumulate, plan
from tests.loop.test_updates import experience_of

GRAPHS: list[Any] = []


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).tanh())
        return found


def network_of(*, compiled: bool) -> nn.Module:
    """Return a network that trains, and whose graphs are noted."""

    def backend(graph: Any, inputs: Any) -> Any:
        GRAPHS.append(graph)
        return graph.forward

    torch.manual_seed(0)
    network = _Network().double()
    if compiled:
        compile_network(network, "whole", backend=backend)
    return network


def updated(
    network: nn.Module, updates: list[Update], microbatch_size: int | None
) -> tuple[list[list[Tensor]], list[dict[str, Tensor]], list[int]]:
    """Return the gradients and logs of some updates, and the rows that the network was called with.

    Rows that fill up a batch are worth 1e6 each, were they to count; nobody is billed for them.
    """
    sizes, rows = BatchSizes(microbatch_size, 64, {}), list[int]()
    meter = Meter()
    grads: list[list[Tensor]] = []
    logs: list[dict[str, Tensor]] = []

    def loss(part: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        x = tensor_of(part.states["x"])[:, :1].double()
        rows.append(len(x))
        meter.current.denoiser_calls += len(x)
        meter.current.flops += 6 * len(x)
        found = network(x + randn_like(x, noise))[:, 0].square()
        later = torch.tensor([row in part.seeds[:i] for i, row in enumerate(part.seeds)])
        found = found * torch.where(later, 1e6, 1.0)
        return found, {"found": found.detach(), "found_max": found.detach()}

    for update in updates:
        weights = list(network.parameters())
        network.zero_grad()
        own = sizes.filled(loss, network, update, meter)
        passes = Passes(torch.Tensor.backward, weights, microbatch_size)
        logs.append(accumulate(update, own, passes))
        grads.append([p.grad.clone() for p in weights if p.grad is not None])
    assert (meter.current.denoiser_calls, meter.current.flops) == (13, 6 * 13)
    return grads, logs, rows


@pytest.mark.parametrize(
    ("microbatch_size", "size"),
    [(2, 2), (3, 3), (None, 5), (100, 5)],  # minibatches of 5, 4 and 4
)
def test_there_is_one_graph_and_rows_that_fill_up_count_nothing(
    microbatch_size: int | None, size: int
) -> None:
    experience = experience_of(13)
    updates = plan(experience, [Layout([13], [1] * 13)], 0, 1, 5, 0, 0)
    assert [len(one.minibatch) for one in updates] == [5, 4, 4]
    grads, logs, rows = updated(network_of(compiled=True), updates, microbatch_size)
    assert set(rows) == {size} and len(GRAPHS) == 1
    plain, expected, _ = updated(network_of(compiled=False), updates, microbatch_size)
    torch.testing.assert_close(grads, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logs, expected, rtol=1e-12, atol=1e-14)


def test_a_network_that_is_not_compiled_has_no_row_too_many() -> None:
    updates = plan(experience_of(13), [Layout([13], [1] * 13)], 0, 1, 5, 0, 0)
    *_, rows = updated(network_of(compiled=False), updates, 2)
    assert rows == [2, 2, 1, 2, 2, 2, 2]
