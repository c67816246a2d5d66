"""The same fit on one and on two GPUs."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, NotHere, Row
from benchmarks.gpu.models import parts_of
from benchmarks.gpu.parts.embedded_fit import _last

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Run rounds of P-GRAFT on Stable Diffusion 1.5 with 16 prompts for each device."""
    if not bench.cuda or torch.cuda.device_count() < 2:
        bench.rows.append({"devices": 2, "skipped": "fewer than two GPUs"})
        return
    with tempfile.TemporaryDirectory() as folder:
        parts_of(bench, "sd").save_pretrained(f"{folder}/model")
        bench.fresh()
        for devices in (1, 2):
            bench.case({"devices": devices}, partial(_fit, Path(folder), devices))


def _fit(folder: Path, devices: int) -> Row:
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a red ring, number {i}\n" for i in range(200)))
    words = [
        *("fit", "--config=sd15", "--config=p_graft", f"--pipeline.pretrained={folder}/model"),
        *("--reward=Brightness", f"--data.source={prompts}", "--data.batch_size=16"),
        *("--model.num_candidates=4", "--model.sampler.num_steps=10"),
        *("--model.sampling_batch_size=16", "--model.microbatch_size=2"),
        *("--pipeline.decode_batch_size=8", "--trainer.precision=bf16-mixed"),
        *(f"--trainer.devices={devices}", "--trainer.accelerator=gpu"),
        *("--trainer.limit_train_batches=3", "--trainer.limit_val_batches=0"),
        *("--trainer.enable_progress_bar=false", f"--root={folder}", f"--name=on_{devices}"),
    ]
    command = [sys.executable, "-m", "lit_rlft", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NotHere(f"the fit failed: {done.stderr[-300:]}")
    return _last(folder / f"on_{devices}")
