"""A whole number of a setting of Trainer stays one, in each order that typing may have kept."""

import subprocess
import sys
from typing import get_args

import pytest

from lit_rlft.cli.whole_numbers import try_whole_numbers_first


def test_int_comes_before_float() -> None:
    def function(
        a: float | int | None,
        b: float | int | str | None,
        c: float | str,
        d: int,
    ) -> None: ...

    try_whole_numbers_first(function)
    hints = function.__annotations__
    assert get_args(hints["a"]) == (int, float, type(None))
    assert get_args(hints["b"]) == (int, float, str, type(None))
    assert hints["c"] == float | str and hints["d"] is int


@pytest.mark.parametrize("first", ["float | int", "int | float"])
def test_one_batch_is_not_the_whole_epoch(first: str) -> None:
    """Another package may have made the union before Lightning does."""
    code = f"""
import inspect
import sys
from lightning import Trainer
from lit_rlft.cli import main
hints = inspect.unwrap(Trainer.__init__).__annotations__
hints |= {{name: {first} | None for name in hints if name.startswith("limit_")}}
main(sys.argv[1:])
"""
    words = ["fit", "--config=gaussian_mixture", "--config=p_graft", "--print_config"]
    words += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1.0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300
    )
    assert "  limit_train_batches: 1\n" in done.stdout, done.stderr
    assert "  limit_val_batches: 1.0\n" in done.stdout
