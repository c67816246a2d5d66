"""A whole number of a setting of Trainer stays one, in each order that typing may have kept."""

import inspect
from typing import Any, get_args

import pytest
from lightning import Trainer

from lit_rlft.cli import main
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


@pytest.mark.parametrize("number", [float | int | None, int | float | None])
def test_one_batch_is_not_the_whole_epoch(
    number: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another package may have made the union before Lightning does."""
    hints = inspect.unwrap(Trainer.__init__).__annotations__
    for name in [name for name in hints if name.startswith("limit_")]:
        monkeypatch.setitem(hints, name, number)
    words = ["fit", "--config=gaussian_mixture", "--config=p_graft", "--print_config"]
    with pytest.raises(SystemExit):
        main([*words, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1.0"])
    shown = capsys.readouterr().out
    assert "  limit_train_batches: 1\n" in shown
    assert "  limit_val_batches: 1.0\n" in shown
