"""Python's search for cycles is off while a command starts, and on while it runs."""

import gc
from typing import Any

import pytest

from lit_rlft.cli import main
from lit_rlft.cli.app import Command
from lit_rlft.cli.collector import resume, without_collection
from lit_rlft.core.checks import UsageError


def test_it_is_off_in_the_block_and_as_before_after_it() -> None:
    assert gc.isenabled()
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
        resume()
        assert gc.isenabled()
    with pytest.raises(ValueError), without_collection():
        raise ValueError
    assert gc.isenabled()


def test_what_somebody_else_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with without_collection():
            resume()
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    resume()
    assert gc.isenabled()


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_options_are_read_without_it_and_classes_are_made_with_it(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    parse = Command.parse_arguments

    def parsed(self: Command, *args: Any) -> None:
        seen.append(gc.isenabled())
        parse(self, *args)

    def made(self: Command) -> None:
        seen.append(gc.isenabled())
        raise UsageError("that is enough")

    monkeypatch.setattr(Command, "parse_arguments", parsed)
    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI.instantiate_classes", made)
    with pytest.raises(SystemExit, match="that is enough"):
        main([command, "--config=gaussian_mixture", "--config=graft"])
    assert seen == [False, True] and gc.isenabled()
