"""A file where a DataModule takes a source, the class that reads the file."""

import importlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

from lit_rlft.cli.packages import domain_of, domain_packages, modules
from lit_rlft.cli.texts import class_of, text_of
from lit_rlft.cli.words import Option, options
from lit_rlft.core.checks import UsageError

__all__ = ["check_sources"]

_SOURCES = ("source", "val_source", "test_source")


def check_sources(words: Sequence[str]) -> None:
    """Check that no source is given as a file, which the parser would read as a config.

    Args:
        words: A command's, with full class paths.

    Raises:
        UsageError: One is; the sentence names the classes that read files.
    """
    given = [option for option in options(words) if _is_file(option)]
    named = [class_of("data", *text_of(option)) for option in options(words)] if given else []
    path = next(filter(None, reversed(named)), "")
    if (domain := domain_of(path)) is None:
        return
    package = domain_packages()[domain]
    if f"{package}.sources" not in modules(package):
        return
    module, _, name = path.rpartition(".")
    parameters = signature(getattr(importlib.import_module(module), name)).parameters
    for option in given:
        argument = option.key.rpartition(".")[2]
        if argument in parameters and "Source" in str(parameters[argument].annotation):
            key = f"--data.{argument}"
            raise UsageError(
                f"{key} {option.value}: {name} takes the class that reads the file, as in {key} "
                f"CLASS {key}.path {option.value}; classes are {', '.join(_readers(package))}"
            )


def _is_file(option: Option) -> bool:
    group, _, name = option.key.replace(".init_args", "").partition(".")
    if group != "data" or name not in _SOURCES or "\n" in option.value:
        return False
    path = Path(option.value)
    return path.exists() or path.suffix[1:].islower()


def _readers(package: str) -> list[str]:
    """Return the names of a domain's sources that have a path."""
    sources = importlib.import_module(f"{package}.sources")
    found = {name: getattr(sources, name) for name in sources.__all__}
    classes = {name: one for name, one in found.items() if isinstance(one, type)}
    return sorted(name for name, one in classes.items() if "path" in signature(one).parameters)
