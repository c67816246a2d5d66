"""Checkpointed blocks under several processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_rlft.cli import main
from tests.support import TWO_FORKS, arguments, assert_equal, weights, working_directory

TINY: dict[str, Any] = {
    "pipeline.init_args.pretrained": None,
    "pipeline.init_args.architecture": {"width": 16, "depth": 2, "num_heads": 2},
    "data.init_args.num_train": 8,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 2,
    "data.init_args.batch_size": 8,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.minibatch_size": 4,
    "model.init_args.microbatch_size": 3,
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
}
BLOCKS = {"model.init_args.gradient_checkpointing": "blocks"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["all weights", "lora"])
@pytest.mark.parametrize("algorithm", ["p_graft", "ddpo"])
def test_two_processes_compute_blocks_again(algorithm: str, lora: dict[str, int] | None) -> None:
    """Several backward passes an update, of which the last alone waits for the other process."""
    configs = ("configs/domains/layout.yaml", f"configs/algorithms/{algorithm}.yaml")
    settings = {**TINY, **TWO_FORKS, "model.init_args.lora": lora}
    main(arguments("fit", configs, settings, {"name": "plain"}))
    main(arguments("fit", configs, settings, BLOCKS, {"name": "blocks"}))
    assert_equal(weights("blocks"), weights("plain"))
