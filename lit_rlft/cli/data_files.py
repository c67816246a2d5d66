"""A file where a DataModule takes a source, the class that reads the file."""

import importlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

from lit_rlft.cli.texts import scalars, text_of
from lit_rlft.cli.words import Option, options
from lit_rlft.core.checks import UsageError

__all__ = ["check_sources"]

_CLASS = (("data",), ("data", "class_path"))
_SOURCES = ("source", "val_source", "test_source")


def check_sources(words: Sequence[str]) -> None:
    """Check that no source is given as a file, which the parser would read as a config.

    Args:
        words: A command's, with full class paths.

    Raises:
        UsageError: One is; the sentence names the classes that read files.
    """
    given = [option for option in options(words) if _is_file(option)]
    path = _data_class(words) if given else ""
    if not path.startswith("domains."):
        return
    module, _, name = path.rpartition(".")
    parameters = signature(getattr(importlib.import_module(module), name)).parameters
    for option in given:
        argument = option.key.rpartition(".")[2]
        if argument in parameters and "Source" in str(parameters[argument].annotation):
            key = f"--data.{argument}"
            raise UsageError(
                f"{key} {option.value}: {name} takes the class that reads the file, as in {key} "
                f"CLASS {key}.path {option.value}; classes are {', '.join(_readers(module))}"
            )


def _is_file(option: Option) -> bool:
    group, _, name = option.key.replace(".init_args", "").partition(".")
    if group != "data" or name not in _SOURCES or "\n" in option.value:
        return False
    path = Path(option.value)
    return path.exists() or path.suffix[1:].islower()


def _data_class(words: Sequence[str]) -> str:
    """Return the path of the DataModule that is given last."""
    texts = [text_of(option) for option in options(words)]
    named = [str(n.value) for text in texts for key, n in scalars(*text) if key in _CLASS]
    return named[-1] if named else ""


def _readers(module: str) -> list[str]:
    """Return the names of a domain's sources that have a path."""
    sources = importlib.import_module(".".join([*module.split(".")[:2], "sources"]))
    found = {name: getattr(sources, name) for name in sources.__all__}
    classes = {name: one for name, one in found.items() if isinstance(one, type)}
    return sorted(name for name, one in classes.items() if "path" in signature(one).parameters)
