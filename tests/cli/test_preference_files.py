"""Diffusion-DPO of a file in every domain: draw, prefer, fit, resume, test by the command line."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from lit_rlft.kit.preferences import preference_line
from tests.support import (
    TINY_SPLITS,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    working_directory,
)

# The DataModule of each domain's own conditions, and whether it runs by default.
DOMAINS = {
    "shapes": "ShapesPrompts",
    "digits": "ImageData",
    "layout": "LayoutData",
    "molecule": "AtomCounts",
    "molecule_heavy": "AtomCounts",
    "layout_mixed": "LayoutData",
    "molecule_mixed": "AtomCounts",
}
SLOW = set(DOMAINS) - {"layout", "molecule"}
QUICK: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "model.sampler.num_steps": 2,
    "model.num_eval_samples": 8,
    "model.lora.rank": 2,
    "model.lora.alpha": 2,
    "metrics.parts": [],
}
VOTES = {"data": "PreferencePairs", "data.init_args.file": "runs/drawn/votes.jsonl"}
FIT: dict[str, Any] = {
    **QUICK,
    **VOTES,
    "data.init_args.batch_size": 4,
    "data.init_args.val_fraction": 0.4,
    "model.beta": 5.0,
}
LAST = "runs/run/checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


def command(stage: str, domain: str, *settings: dict[str, Any]) -> None:
    configs = (f"configs/domains/{domain}.yaml", "configs/algorithms/dpo_offline.yaml")
    main(arguments(stage, configs, *settings))


def vote(folder: Path) -> int:
    """Write which of two samples of one condition a run's rewards prefer; return the pairs.

    No two pairs share a sample, so that any number of them may be held out.
    """
    drawn = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines = []
    for given, group in groupby(sorted(drawn, key=_condition), key=_condition):
        samples = list(group)
        for pair in zip(samples[::2], samples[1::2], strict=False):
            worse, better = sorted(pair, key=lambda sample: sum(sample["rewards"].values()))
            files = (f"samples/{sample['file']}" for sample in (better, worse))
            lines.append(preference_line(json.loads(given), *files, voter="reward"))
    (folder / "votes.jsonl").write_text("".join(lines))
    return len(lines)


def _condition(sample: dict[str, Any]) -> str:
    """Return the condition's record as text."""
    others = ("seed", "rewards", "facts", "file", "checkpoint")
    return json.dumps({key: value for key, value in sample.items() if key not in others})


@pytest.mark.parametrize(
    "domain", [pytest.param(d, marks=pytest.mark.slow if d in SLOW else []) for d in DOMAINS]
)
def test_pairs_of_any_domain_are_learned_and_resumed_bit_for_bit(domain: str) -> None:
    sizes = dict(setting.split("=") for setting in TINY_SPLITS[DOMAINS[domain]])
    own = {f"data.init_args.{name}": int(size) for name, size in sizes.items()}
    drawing = {"name": "drawn", "ckpt_path": "none", "data.init_args.eval_batch_size": 2}
    command("predict", domain, QUICK, own, drawing)
    assert vote(Path("runs/drawn")) == 8  # of two conditions, eight samples each
    rounds = {"trainer.limit_train_batches": 1, "trainer.limit_val_batches": 1}
    command("fit", domain, FIT, rounds, {"name": "whole", "trainer.max_epochs": 2})
    command("fit", domain, FIT, rounds, {"name": "run", "trainer.max_epochs": 1})
    command("fit", domain, FIT, rounds, {"name": "run", "trainer.max_epochs": 2, "ckpt_path": LAST})
    whole, resumed = checkpoint("whole"), checkpoint()
    assert_equal(whole["state_dict"], resumed["state_dict"])
    assert_equal(whole["optimizer_states"], resumed["optimizer_states"])
    assert any(own.any() for name, own in whole["state_dict"].items() if "lora_B" in name)
    assert all(own.isfinite().all() for own in whole["state_dict"].values())
    # At the start tuned and pretrained model are one: a loss of log 2, and every pair is a tie.
    found = scalars("whole")
    assert found["train/loss"][0] == pytest.approx(float(torch.tensor(2.0).log()), rel=1e-5)
    assert 0 <= found["val/implicit_accuracy"][-1] <= 1
    held_out = {**VOTES, "data.init_args.val_fraction": 0.4, "data.init_args.eval_batch_size": 2}
    command("test", domain, QUICK, held_out, {"name": "run", "ckpt_path": LAST})
    tested = report()
    assert torch.tensor(tested["tuned"][tested["reward"]]["mean"]).isfinite()
