"""Memory of a LoRA update of Stable Diffusion XL in its real size, beside what `plan` says.

Method: a folder with the architecture of Stable Diffusion XL base 1.0 (2,567.5 M of the U-Net, two
text encoders, VAE) and random weights in bfloat16 is written to a temporary folder, 6.5 GB.
`lit-rlft plan` and one round of `lit-rlft fit` get the same arguments: P-GRAFT, 512 x 512 pixels,
frozen weights in bfloat16, a LoRA of rank 8 in single precision, blocks computed again in the
backward pass, one sample per microbatch, no guidance. The round runs under torch's profiler;
"allocated" is the most bytes that lived at once of those allocated while it ran, weights not
included. "resident" is the process's largest resident size in the round (VmHWM, reset before it),
which holds Python and libraries too. Random weights make no pictures, and cost what real ones do.

    python -m benchmarks.sdxl_update_memory [--steps 2] [--pixels 512]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import lit_rlft.cli.plan as plan_command
from domains.text_to_image import EMBEDDED
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main
from lit_rlft.cost.plan import GB, Plan
from tests.cost.measured import peak_of
from tests.domains.text_to_image.families.real_sizes import sdxl

ROOT = Path(__file__).parents[1]


def words(pixels: int, steps: int) -> list[str]:
    """Return the arguments of both commands."""
    return [
        f"--config={ROOT}/configs/domains/sdxl.yaml",
        f"--config={ROOT}/configs/algorithms/p_graft.yaml",
        "--pipeline.pretrained=sdxl",
        f"--pipeline.height={pixels}",
        f"--pipeline.width={pixels}",
        "--pipeline.guidance_scale=1",
        "--reward=Brightness",
        "--data.source=prompts.txt",
        "--data.batch_size=1",
        "--model.num_candidates=2",
        f"--model.sampler.num_steps={steps}",
        "--model.sampling_batch_size=1",
        "--model.minibatch_size=1",
        "--model.microbatch_size=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=0",
    ]


def write_model(folder: Path) -> None:
    """Write the model with random weights, in bfloat16."""
    sdxl(folder)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "shapes" / "tokenizer")
    texts = [
        AutoConfig.from_pretrained(folder / name) for name in ("text_encoder", "text_encoder_2")
    ]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(folder / "unet")
        vae = AutoencoderKL.from_config(folder / "vae")
        first = CLIPTextModel(texts[0])
        second = CLIPTextModelWithProjection(texts[1])
    networks = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}
    for name, network in networks.items():
        filled(network).save_pretrained(folder / name)  # type: ignore[operator]
        network.to("meta")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)


def filled(network: nn.Module) -> nn.Module:
    """Give a network on the meta device small random weights in bfloat16."""
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return network


def planned(given: list[str]) -> dict[str, Any]:
    """Return what `plan` says, in bytes."""
    plans: list[Plan] = []
    plan_command.report = lambda plan, *card: plans.append(plan) or ""  # type: ignore[assignment]
    main(["plan", *given])
    (plan,) = plans
    return {"weights": plan.weights, "peak": plan.peak, **plan.phases}


def fitted(given: list[str]) -> dict[str, Any]:
    """Return what a round of the fit took, in bytes."""
    measured: dict[str, Any] = {}
    step = RewardFineTuner.training_step

    def watched(self: RewardFineTuner, *args: Any) -> None:
        measured["weights"] = sum(
            tensor.numel() * tensor.element_size()
            for tensor in (*self.parameters(), *self.buffers())
        )
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts anew
        kinds = [ProfilerActivity.CPU]
        with profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:
            step(self, *args)
        measured["allocated"] = peak_of(profiler)
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
        measured["resident"] = int(line.split()[1]) * 1024

    RewardFineTuner.training_step = watched  # type: ignore[method-assign]
    main(["fit", *given, "--trainer.accelerator=cpu", "--name=run"])
    return measured


def run(part: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run one part in a fresh process."""
    sizes = [f"--steps={options.steps}", f"--pixels={options.pixels}", f"--part={part}"]
    command = [sys.executable, "-m", "benchmarks.sdxl_update_memory", *sizes]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=env, check=True)
    found: dict[str, Any] = json.loads((Path(folder) / f"{part}.json").read_text())
    return found


def report(plan: dict[str, Any], fit: dict[str, Any]) -> str:
    """Return the table."""
    beside = plan["peak"] - plan["weights"]
    rows = [
        ("weights", plan["weights"], fit["weights"]),
        ("beside the weights, at the peak", beside, fit["allocated"]),
        ("both", plan["peak"], fit["weights"] + fit["allocated"]),
        ("resident", None, fit["resident"]),
    ]
    lines = ["| GB of 2^30 bytes | `plan` | measured | plan / measured |", "|---|---|---|---|"]
    for name, said, found in rows:
        both = ("", "") if said is None else (f"{said / GB:.2f}", f"{said / found:.3f}")
        lines.append(f"| {name} | {both[0]} | {found / GB:.2f} | {both[1]} |")
    return "\n".join(lines)


def main_() -> None:
    """Write the model, run both commands in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--part", choices=("model", "plan", "fit"))
    options = parser.parse_args()
    given = words(options.pixels, options.steps)
    if options.part is None:
        with tempfile.TemporaryDirectory() as folder:
            run("model", options, folder)
            print(report(run("plan", options, folder), run("fit", options, folder)))
        return
    if options.part == "model":
        write_model(Path("sdxl"))
        Path("prompts.txt").write_text("".join(f"a red ring, number {i}\n" for i in range(20)))
        found: dict[str, Any] = {}
    else:
        found = planned(given) if options.part == "plan" else fitted(given)
    Path(f"{options.part}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main_()
