"""A VAE that stays in the processor's memory until it decodes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lit_rlft.cli.plan as command
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.cli import main
from lit_rlft.cost.plan import Plan


@pytest.fixture(name="moves")
def _moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of networks' `to`, and when the VAE runs."""
    found: list[str] = []
    plain = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if type(self).__name__ == "AutoencoderKL":
            found.append(str(args[0]))
        return plain(self, *args, **kwargs)

    pipeline = TextToImagePipeline("shapes", offload=["vae"])
    monkeypatch.setattr(type(pipeline.vae), "to", to)
    for name in ("decode", "encode"):
        own = getattr(type(pipeline.vae), name)

        def run(self: Any, *args: Any, own: Any = own, name: str = name) -> Any:
            found.append(name)
            return own(self, *args)

        monkeypatch.setattr(type(pipeline.vae), name, run)
    return found


def test_the_vae_is_on_the_device_to_decode_alone(moves: list[str]) -> None:
    kept, idle = TextToImagePipeline("shapes"), TextToImagePipeline("shapes", offload=["vae"])
    own = {id(parameter) for parameter in idle.vae.parameters()}
    assert own.isdisjoint(map(id, idle.parameters()))
    assert len(list(kept.parameters())) == len(list(idle.parameters())) + len(own)
    condition = idle.encode({"prompt": ["a red ring"]})
    x = torch.randn(idle.blank(condition).shape, generator=torch.Generator().manual_seed(0))
    moves.clear()
    pictures = idle.decode(x, condition)
    assert moves == ["cpu", "decode", "cpu"]
    assert torch.equal(pictures, kept.decode(x, condition))
    moves.clear()
    batch = {"image": (pictures * 255).to(torch.uint8)}
    states = idle.states(batch)
    assert moves == ["cpu", "encode", "cpu"]
    assert torch.equal(states, kept.states(batch))


@pytest.mark.parametrize("size", [1, 2])
def test_it_stays_for_a_backward_pass(size: int, moves: list[str]) -> None:
    idle = TextToImagePipeline("shapes", offload=["vae"], decode_batch_size=1)
    block = idle.diffusers.vae.decoder.up_blocks[-1]
    block.register_forward_pre_hook(lambda *_: moves.append("block"))
    condition = idle.encode({"prompt": ["a red ring", "a blue ring"][:size]})
    x = torch.randn(idle.blank(condition).shape).requires_grad_()
    moves.clear()
    idle.decode(x, condition).sum().backward()  # type: ignore[no-untyped-call]
    # Blocks are computed again in the backward pass, still there: of a picture among several as
    # a part of all of it.
    again = ["block"] if size == 1 else [*["decode", "block", "block"] * size]
    assert moves == ["cpu", *["decode", "block"] * size, *again]
    assert x.grad is not None and x.grad.abs().sum() > 0
    moves.clear()
    idle.decode(x.detach(), condition)
    assert moves == ["cpu", *["decode", "block"] * size, "cpu"]


@pytest.mark.slow
def test_plan_weighs_it_while_it_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plans: list[Plan] = []

    def kept_plan(plan: Plan, *card: Any) -> str:
        plans.append(plan)
        return ""

    monkeypatch.setattr(command, "report", kept_plan)
    steps = ["--model.sampler.num_steps=2", "--data.batch_size=4", "--model.minibatch_size=4"]
    steps.append("--pipeline.decode_batch_size=4")  # not "auto", which a plan weighs at its least
    for more in ([], ["--pipeline.offload=[vae]"]):
        main(["plan", "--config=shapes", "--config=graft", *steps, *more])
    kept, idle = plans
    vae = sum(part.size for part in kept.parts if part.name == "vae")
    assert vae > 0
    assert kept.weights - idle.weights == vae
    assert kept.phases["decode"] == pytest.approx(idle.phases["decode"], rel=0.01)
    assert kept.phases["sampling"] - idle.phases["sampling"] == pytest.approx(vae, rel=0.01)
