"""Folders of small runs for tests of reports, their samples and curves by the run's own code."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from lit_rlft.core.figure import Body, Figure
from lit_rlft.runs.shown import SHOWN, TEST, shown, write_shown

ROWS, EACH = 5, 2
BODY = Body([[0, 0, 0], [1, 0, 0]], ["C", "O"], ["#505050", "#e02020"], [0.3, 0.3], [(0, 1)])
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'


def config(**changes: Any) -> dict[str, Any]:
    """Return the config of a run; changes of arguments of the model by name."""
    seed = changes.pop("seed", 0)
    return {
        "name": "x",
        "pipeline": {
            "class_path": "domains.layout.pipeline.LayoutPipeline",
            "init_args": {"pretrained": "/home/jane/models/grammar"},
        },
        "reward": {
            "class_path": "lit_rlft.kit.http_reward.HTTPReward",
            "init_args": {"url": "http://jane:geheim@localhost/score?api_key=geheim2"},
        },
        "data": {"class_path": "domains.layout.data.LayoutData", "init_args": {"num_test": ROWS}},
        "model": {
            "class_path": "lit_rlft.algorithms.graft.GRAFT",
            "init_args": {"seed": seed, "sampler": {"num_steps": 4, "eta": 1.0}, **changes},
        },
    }


def sample(
    value: float, kind: str = "image", side: int = 16, reward: str = "Reward"
) -> dict[str, Any]:
    """Return one sample as a run keeps it: a picture, or a drawing with a body."""
    picture = torch.full((3, side, side), min(255, max(0, int(40 * value) + 90)), dtype=torch.uint8)
    figure = Figure(SVG, BODY) if kind == "figure" else None
    return shown(picture, figure, {reward: value, "other": 1.0 - value})


def moments(values: Any) -> dict[str, float]:
    """Return a mean and its error as metrics.json has them."""
    values = np.asarray(values)
    return {"mean": float(values.mean()), "sem": float(values.std(ddof=1) / len(values) ** 0.5)}


def write_run(
    folder: Path,
    gain: float = 1.0,
    *,
    labels: Sequence[str] = ("a page",),
    kind: str = "image",
    checkpoints: Sequence[int] = (2, 4),
    settings: dict[str, Any] | None = None,
    side: int = 16,
    reward: str = "Reward",
    calls: int = 100,
) -> Path:
    """Write the folder of a run whose tuned model gains about `gain`, with noise per sample.

    The reference's samples are the same for all runs. `reward` is the trained reward's name,
    `calls` how often an update calls it.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config()))
    count = ROWS * EACH
    reference = np.random.default_rng(0).normal(size=count)
    noise = np.random.default_rng(int(1000 * abs(gain))).normal(size=count)
    tuned = reference + gain + 0.1 * noise
    name = [labels[(i // EACH) % len(labels)] for i in range(count)]
    _write_metrics(folder, reference, tuned, reward)
    with (folder / "test_samples.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["row", "sample", "label", f"tuned/{reward}", f"reference/{reward}"])
        for i in range(count):
            out.writerow([i // EACH, i % EACH, name[i], f"{tuned[i]:.9g}", f"{reference[i]:.9g}"])
    for number, updates in enumerate(checkpoints, start=1):
        share = number / len(checkpoints)
        entries = [
            {
                "row": i // EACH,
                "sample": i % EACH,
                "label": name[i],
                "reference": sample(reference[i], kind, side, reward),
                "tuned": sample(reference[i] + share * gain, kind, side, reward),
            }
            for i in range(4)
        ]
        record = _record(updates, share * gain, entries, reward, calls)
        write_shown(folder / SHOWN / f"{updates:06d}.json.gz", record)
    ranked = [{**entries[0], "kind": kind} for kind in ("best", "worst", "changed")]
    write_shown(folder / SHOWN / TEST, {"reward": reward, "seed": 0, "entries": ranked})
    write_events(folder, range(4), reward=reward, calls=calls)
    return folder


def write_events(
    folder: Path,
    steps: Sequence[int],
    offset: float = 0.0,
    reward: str = "Reward",
    calls: int = 100,
) -> None:
    """Write an event file of a fit."""
    writer = SummaryWriter(folder)
    for step in steps:
        writer.add_scalar("train/reward", step + offset, step)
        writer.add_scalar("cost/reward_calls", float(calls * (step + 1)), step)
        writer.add_scalar("time/elapsed", 9.0 * (step + 1), step)
        if step % 2:
            writer.add_scalar(f"val/{reward}", 2 * step + offset, step)
            writer.add_scalar(f"val_reference/{reward}", 0.5, step)
            writer.add_scalar("val/other", -step, step)
    writer.close()


def _write_metrics(folder: Path, reference: Any, tuned: Any, reward: str) -> None:
    phases = {
        "train": {"collect": {"seconds": 30.0, "denoiser_calls": 9}, "update": {"seconds": 6.0}}
    }
    metrics = {
        "algorithm": "GRAFT",
        "domain": "grammar",
        "reward": reward,
        "num_samples": len(tuned),
        "seed": 0,
        "checkpoint": {"path": "checkpoints/last.ckpt", "num_rounds": 4, "num_updates": 4},
        "tuned": {reward: moments(tuned), "other": moments(1 - tuned)},
        "reference": {reward: moments(reference), "other": moments(1 - reference)},
        "gain": {reward: moments(tuned - reference), "other": moments(reference - tuned)},
        "exploitation": ["other"],
        "cost": {"reward_calls": 400, "denoiser_calls": 9, "seconds": 36.0, "phases": phases},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def _record(
    updates: int, gain: float, entries: list[Any], reward: str, calls: int
) -> dict[str, Any]:
    own = {reward: {"mean": gain, "sem": 0.1}, "other": {"mean": -gain, "sem": 0.1}}
    return {
        "reward": reward,
        "updates": updates,
        "rounds": updates,
        "samples": 100 * updates,
        "reward_calls": calls * updates,
        "seconds": 9.0 * updates,
        "guards": {"other": "lower"},
        "summary": {"tuned": own, "reference": own, "gain": own},
        "entries": entries,
    }
