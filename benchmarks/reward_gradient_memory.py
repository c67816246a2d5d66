"""Peak memory of one reward-gradient update against T and K: flat in T, linear in K.

Method: the embedded model, guidance with gradient through both halves, a LoRA of rank 4, T
sampling steps of which K are trained, under Lightning's Trainer as in `lit-rlft fit`. Each entry is
a fresh process that takes two updates. In the first, memory is the peak over what was there before
the update: allocated memory on a GPU, resident memory on a CPU, where the allocator is told to give
back at once what is freed. In the second, autograd's hooks count the bytes that the graph keeps
from the forward to the backward pass, each storage once and without the weights: exact, and the
same on every machine. The decoder is checkpointed, as is our default, so that it adds its input
alone to the bytes kept; running it again in the backward pass is part of the peak.

    python benchmarks/reward_gradient_memory.py
    python benchmarks/reward_gradient_memory.py --accelerator cuda --batch-size 4 \
        --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from quiet import quiet_trainer
from torch import Tensor

from domains.text_to_image.data import ShapesPrompts
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRaFT, DRTune
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA

METHODS = ("DRTune", "DRaFT")
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
"""Memory that is freed goes back to the system at once, so that the resident size is what lives."""


class Memory(Callback):
    """Measures the first update's peak, and counts what the second one's graph keeps."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin an update."""
        if not trainer.global_step:
            self._before = _reset_peak(pl_module.device)
            return
        # Weights are alive anyway.
        weights = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End an update."""
        if trainer.global_step == 1:
            self.peak = _peak(pl_module.device) - self._before
        else:
            self._hooks.__exit__()


def _reset_peak(device: torch.device) -> int:
    """Count the peak from now on; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(options: argparse.Namespace) -> None:
    """Take two updates in this process; print the peak and the bytes kept, in MiB."""
    warnings.filterwarnings("ignore")
    (method,), (num_steps,), (k,) = options.methods, options.num_steps, options.trained
    tuner = RewardGradient(
        TextToImagePipeline(options.pretrained, guidance_scale=3.0),
        Symmetry(),
        method=DRaFT(k) if method == "DRaFT" else DRTune(k, m=1),
        sampler=Sampler(num_steps),
        lora=LoRA(4, 4),
        minibatch_size=options.batch_size,
    )
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            accelerator=options.accelerator,
            max_steps=2,
            limit_val_batches=0,
            callbacks=[memory],
            default_root_dir=folder,
        )
        trainer.fit(tuner, ShapesPrompts(batch_size=options.batch_size))
    print(json.dumps([memory.peak / 2**20, sum(memory.kept.values()) / 2**20]))


def measured(
    method: str, num_steps: int, k: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Measure one entry in a process of its own."""
    command = [sys.executable, __file__, "--once", "--methods", method]
    command += ["--num-steps", str(num_steps), "--trained", str(k)]
    command += ["--pretrained", options.pretrained, "--accelerator", options.accelerator]
    command += ["--batch-size", str(options.batch_size)]
    env = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    peak, kept = json.loads(done.stdout.splitlines()[-1])
    return peak, kept


def slope(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Describe the line through the points: MiB per step and the largest deviation from it."""
    gradient, start = statistics.linear_regression(xs, ys)
    worst = max(abs(start + gradient * x - y) for x, y in zip(xs, ys, strict=True))
    return f"{start:.1f} + {gradient:.1f} K, off by at most {worst:.2g}"


def report(options: argparse.Namespace) -> None:
    """Measure all entries; print a table per method and the lines in K."""
    print("| method | K | " + " | ".join(f"T = {t}" for t in options.num_steps) + " |")
    print("|---|---|" + "---|" * len(options.num_steps))
    for method in options.methods:
        points = []
        for k in options.trained:
            row = [measured(method, t, k, options) for t in options.num_steps]
            points += [(k, *pair) for pair in row]
            cells = " | ".join(f"{peak:.1f} ({kept:.2f})" for peak, kept in row)
            print(f"| {method} | {k} | {cells} |", flush=True)
        ks, peaks, kept = zip(*points, strict=True)
        if len(options.trained) > 1:
            print(f"{method}: peak {slope(ks, peaks)}; kept {slope(ks, kept)} MiB")


def main() -> None:
    """Print the tables, or measure one entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="shapes", help="folder, hub id or embedded model")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-steps", type=int, nargs="+", default=[10, 25, 50], help="T")
    parser.add_argument("--trained", type=int, nargs="+", default=[1, 2, 5], help="K")
    parser.add_argument("--once", action="store_true", help="measure one entry in this process")
    options = parser.parse_args()
    (measure if options.once else report)(options)


if __name__ == "__main__":
    main()
