"""A compiled denoiser: the same predictions, few graphs, and no trace in what is saved."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.cost.meter import Meter
from lit_rlft.kit.compiled import blocks_of, compile_network, compiling
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import tiny


class Graphs:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = self.operations = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        self.operations += sum(node.op == "call_function" for node in graph.graph.nodes)
        return graph.forward


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _pipeline(how: str | None, backend: Any, **settings: Any) -> tuple[Any, Any, Meter]:
    torch.manual_seed(0)
    pipeline = TextToImagePipeline("shapes", guidance_scale=1.0, **settings)
    if how is not None:
        compile_network(pipeline.denoiser, how, backend=backend)  # type: ignore[arg-type]
    reference = adapt(pipeline, LoRA(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    meter = Meter()
    meter.watch(pipeline, pipeline.denoiser, reference)
    return pipeline, reference, meter


def _round(pipeline: Any, reference: Any) -> list[Tensor]:
    """Predict with the LoRA on and off, then train; return predictions and a gradient."""
    condition = pipeline.encode({"prompt": ["a red ring", "a blue square"]})
    x = torch.randn(pipeline.blank(condition).shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    pipeline.eval()
    with torch.no_grad():
        found = [pipeline(x, t, condition), reference(x, t, condition)]
    pipeline.denoiser.train()
    pipeline.denoiser.zero_grad()
    trained = pipeline(x, t, condition)
    trained.square().mean().backward()
    named = pipeline.denoiser.named_parameters()
    gradient = next(p.grad for name, p in named if "lora_A" in name and p.grad is not None)
    return [*found, trained.detach(), gradient.clone()]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [("blocks", 40), ("whole", 4)])
def test_rounds_after_the_first_compile_nothing(how: str, most: int) -> None:
    graphs = Graphs()
    pipeline, reference, meter = _pipeline(how, graphs, checkpoint_denoiser=how == "blocks")
    plain = _pipeline(None, None)
    expected = _round(*plain[:2])
    first, after_one = _round(pipeline, reference), graphs.count
    for _ in range(2):
        _round(pipeline, reference)
    assert 0 < after_one <= most
    assert graphs.operations > 20
    assert graphs.count == after_one
    for ours, theirs in zip(first, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert meter.current.denoiser_calls == 3 * plain[2].current.denoiser_calls
    assert meter.current.flops == 3 * plain[2].current.flops > 0


@pytest.mark.slow
def test_no_name_of_weights_changes(tmp_path: Path) -> None:
    pipeline, _, _ = _pipeline("blocks", Graphs())
    plain, _, _ = _pipeline(None, None)
    compile_network(pipeline.denoiser, "whole", backend=Graphs())
    assert list(pipeline.state_dict()) == list(plain.state_dict())
    (ours,), (theirs,) = pipeline.save(tmp_path / "a"), plain.save(tmp_path / "b")
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("sd3", "JointTransformerBlock")])
def test_blocks_are_found_where_diffusers_names_none(name: str, kind: str) -> None:
    blocks = blocks_of(tiny(name).transformer)
    assert blocks and {type(block).__name__ for block in blocks} == {kind}


def test_without_compiler_or_blocks_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="a Linear has no list of blocks; set it to 'whole'"):
        compile_network(nn.Linear(2, 2), "blocks", backend="eager")

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    layer = _Doubled()
    compile_network(layer, "whole", backend=fails)
    told = r"compile: torch could not compile .*set it to null"
    with pytest.raises(UsageError, match=told), compiling():
        layer(torch.ones(1, 2))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(UsageError, match=r"compile needs a C\+\+ compiler and finds none; install"):
        TextToImagePipeline("shapes", compile="blocks")


@pytest.mark.slow
def test_inductor_changes_no_prediction() -> None:
    pipeline, plain = _pipeline("blocks", "inductor"), _pipeline(None, None)
    for ours, theirs in zip(_round(*pipeline[:2]), _round(*plain[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("p_graft", ["--trainer.callbacks+", "EMA"]),
        (
            "drtune",
            [
                "--reward=CLIPScore",
                "--model.method.m=1",
                "--model.gradient_checkpointing=blocks",
                "--pipeline.offload=[vae]",
            ],
        ),
    ],
)
def test_fits_resume_and_export(
    algorithm: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graphs = Graphs()
    monkeypatch.setattr(
        "domains.text_to_image.pipeline.compile_network", partial(compile_network, backend=graphs)
    )
    limits = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    sizes = ["--data.batch_size=2", "--model.minibatch_size=2", "--model.sampler.num_steps=3"]
    common = ["--config=shapes", f"--config={algorithm}", *limits, *sizes, *words]
    common += ["--pipeline.compile=blocks", "--trainer.accelerator=cpu"]
    main(["fit", *common, "--trainer.max_epochs=1", "--name=a"])
    last = tmp_path / "runs/a/checkpoints/last.ckpt"
    main(["fit", *common, "--trainer.max_epochs=2", "--name=b", f"--ckpt_path={last}"])
    assert graphs.count
    content = torch.load(last, weights_only=False)
    assert "_orig_mod" not in str(content.keys()) + str(content["state_dict"].keys())
    exported = [*(tmp_path / "runs/b/tuned").glob("*.safetensors")]
    assert exported and all("_orig_mod" not in name for name in load_file(exported[0]))
