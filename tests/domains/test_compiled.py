"""Small models compiled: graphs are counted, none is broken, and nothing is computed otherwise."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.image.pipeline import ImagePipeline
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.state import State, leaves
from lit_rlft.cost.counters import Cost, count_calls, count_flops
from lit_rlft.kit import compiled
from lit_rlft.kit.weightless import without_weights
from lit_rlft.loop.reference import LoRA, Reference, adapt

MADE = compiled.compile_network
PIPELINES: dict[str, Callable[..., Pipeline]] = {
    "gaussian_mixture": GaussianMixturePipeline,
    "layout": LayoutPipeline,
    "layout_mixed": lambda **settings: LayoutPipeline("grammar_mixed", **settings),
    "molecule": MoleculePipeline,
    "image": ImagePipeline,
}
CASES = [
    (name, how)
    for name in PIPELINES
    for how in ("whole", "blocks")
    if (name, how) != ("gaussian_mixture", "blocks")  # it has none
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace graphs and run them as they are."""
    monkeypatch.setattr(compiled, "compile_network", lambda *args: MADE(*args, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(pipeline: Pipeline) -> tuple[Pipeline, Reference, Cost]:
    """Return a pipeline with a LoRA that changes something, its reference and its costs."""
    cost = Cost()
    reference = adapt(pipeline.eval(), LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for p in pipeline.denoiser.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    count_calls(pipeline.denoiser, lambda: cost)
    count_flops(pipeline.denoiser, lambda: cost)
    return pipeline, reference, cost


def calls(made: tuple[Pipeline, Reference, Cost], size: int) -> list[State]:
    """Call with the adapter on, off, and on with gradients in training mode."""
    pipeline, reference, _ = made
    condition = pipeline.example().repeat(size)
    with torch.random.fork_rng():
        torch.manual_seed(size)
        x = pipeline.process.prior(pipeline.blank(condition)).sample()
    t = torch.linspace(0.1, 0.9, size, dtype=torch.float64)
    with torch.no_grad():
        found = [pipeline(x, t, condition), reference(x, t, condition)]
    pipeline.train()
    found.append(pipeline(x, t, condition))
    pipeline.eval()
    losses = [leaf.clamp(-9, 9).sum() for leaf in leaves(found[-1]) if leaf.requires_grad]
    trained = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), trained, allow_unused=True)
    return [*found, *(g for g in gradients if g is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
@pytest.mark.usefixtures("traced")
def test_one_graph_for_a_first_size_and_one_for_all_others(name: str, how: Any) -> None:
    """A last microbatch of odd size is one of the others."""
    ours, plain = (adapted(PIPELINES[name](compile=setting)) for setting in (how, None))
    seen = []
    for size in (4, 3, 2, 4, 5):
        for a, b in zip(calls(ours, size), calls(plain, size), strict=True):
            for one, other in zip(leaves(a), leaves(b), strict=True):
                torch.testing.assert_close(one, other, equal_nan=True)
        seen.append(counters["stats"]["unique_graphs"])
    assert 0 < seen[0] < seen[1] <= 2 * seen[0] and seen[1:] == seen[1:2] * 4, seen
    if how == "whole":
        assert seen[0] == 3  # the adapter on and off, and on with gradients
    assert not counters["graph_break"]
    assert ours[2].flops == plain[2].flops > 0
    assert ours[2].denoiser_calls == plain[2].denoiser_calls == 3 * 18


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    ours, plain = (adapted(LayoutPipeline(compile=setting)) for setting in ("whole", None))
    for a, b in zip(calls(ours, 3), calls(plain, 3), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_cuda_graphs_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"compile is 'graphs'.* torch finds no GPU of NVIDIA"):
        LayoutPipeline(compile="graphs")
    with without_weights():
        LayoutPipeline(compile="graphs")


def test_cuda_graphs_are_of_one_size_and_what_they_return_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    memory = torch.zeros(2, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "compile_network", lambda *_, **settings: given.update(settings))
    pipeline = GaussianMixturePipeline(compile="graphs")
    assert (given["mode"], given["dynamic"]) == ("reduce-overhead", False)
    pipeline.denoiser.forward = lambda x_t, t: memory  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"this run is on cpu; set it to 'whole' or null"):
        pipeline.denoiser(memory, memory[:, 0])
    assert compiled._copied(pipeline.denoiser, (), {"a": memory})["a"] is not memory


def test_the_mixture_has_no_blocks() -> None:
    with pytest.raises(UsageError, match="has no list of blocks; set it to 'whole' or null"):
        compiled.compile_network(GaussianMixturePipeline().denoiser, "blocks", backend="eager")
