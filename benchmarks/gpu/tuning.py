"""Rounds of the algorithms under Lightning's trainer, without files."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning import Callback
from torch.utils.data import DataLoader

from benchmarks.gpu.bench import Bench, Row
from benchmarks.quiet import quiet_trainer
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.kit.data import Rows, collate
from lit_rlft.loop.updates import Update

__all__ = ["Arm", "arms_on_an_update", "checkpointing", "fit"]

Arm = Callable[[Update], object]
"""Takes an optimiser step."""


def fit(
    bench: Bench, tuner: RewardFineTuner, callbacks: list[Callback], rounds: int, prompts: int
) -> None:
    """Run rounds of a tuner in bf16-mixed on one device.

    Args:
        bench: The device.
        tuner: Of text to image.
        callbacks: Of the trainer.
        rounds: How many.
        prompts: Of each round, all different.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = Rows(rounds * prompts, lambda i: {"prompt": f"a red ring, number {i % prompts}"})
    loader = DataLoader(rows, batch_size=prompts, collate_fn=collate)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(
            "gpu" if bench.cuda else "cpu",
            precision="bf16-mixed",
            max_epochs=1,
            callbacks=callbacks,
            default_root_dir=folder,
        )
        trainer.fit(tuner, loader)


def arms_on_an_update(
    bench: Bench, arms: Mapping[str, Arm], keys: Mapping[str, Row], work: Row
) -> Callable[..., dict[str, float]]:
    """Return an `_update` that times several ways to take one and the same update.

    Each is tried once, for its memory and because it may not fit; those that do then take turns.

    Args:
        bench: Collects a row of each.
        arms: Ways to take the update, by name.
        keys: What the rows say of each.
        work: What all rows say.
    """

    def update(given: Update, *_: object) -> dict[str, float]:
        peaks: dict[str, float | None] = {}
        for name, arm in arms.items():

            def once(name: str = name, arm: Arm = arm) -> Row:
                arm(given)
                peaks[name] = bench.peak()
                return {}

            bench.case({"arm": name, **keys[name], **work}, once)
        fitting = {name: arm for name, arm in arms.items() if name in peaks}
        calls = {name: partial(arm, given) for name, arm in fitting.items()}
        found = bench.turns(calls, warm=0) if calls else {}
        for row in bench.rows:
            if row.get("arm") in found and not {"error", "seconds"} & set(row):
                row |= {**found[row["arm"]], "peak_gib": peaks[row["arm"]]}
        return {"loss": 0.0, "grad_norm": 0.0}

    return update


def checkpointing(tuner: RewardFineTuner, on: bool) -> None:
    """Switch block checkpointing of the denoiser on or off."""
    denoiser: Any = tuner.pipeline.denoiser
    (denoiser.enable_gradient_checkpointing if on else denoiser.disable_gradient_checkpointing)()
