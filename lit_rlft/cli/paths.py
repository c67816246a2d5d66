"""Configs that ship with the package, found by name and from any working directory."""

import re
from collections.abc import Sequence
from pathlib import Path

from lit_rlft.cli.config_text import check_config
from lit_rlft.cli.words import nearest, options, rewritten
from lit_rlft.core.checks import UsageError

__all__ = ["CONFIGS", "config_file", "packaged_configs", "with_config_files"]

_ROOT = Path(__file__).parents[2]
CONFIGS = _ROOT / "configs"
_BARE = re.compile(r"(\w+/)?[\w-]+(\.yaml)?")


def packaged_configs() -> list[Path]:
    """Return all configs of the package, by folder and name."""
    return sorted(CONFIGS.glob("*/*.yaml"))


def with_config_files(words: Sequence[str]) -> list[str]:
    """Return a command's words with the files of configs in place of their names.

    Raises:
        UsageError: A name belongs to no config, or to several.
    """
    words = [_installed(word) for word in words]
    for option in options(words):
        if option.key == "config":
            path = config_file(option.value)
            if Path(path).is_file():
                check_config(path)
            elif path.endswith((".yaml", ".yml", ".json")) and "\n" not in path:
                raise UsageError(
                    f"--config {path} does not exist; `lit-rlft list configs` has ours"
                )
            words = rewritten(words, option, path)
    return words


def config_file(name: str) -> str:
    """Return the file of a config that is given by its bare name, such as `p_graft`.

    A file in the working directory wins. Anything but a bare name is returned as it is.

    Raises:
        UsageError: No config has the name, or several have.
    """
    bare = _BARE.fullmatch(name)
    if not bare or name.startswith("configs/") or Path(name).is_file():
        return name
    file = name if name.endswith(".yaml") else f"{name}.yaml"
    if Path(file).is_file():
        return file
    found = [path for path in packaged_configs() if path.match(file)]
    if len(found) == 1:
        return str(found[0])
    if found:
        paths = " and ".join(str(path.relative_to(_ROOT)) for path in found)
        raise UsageError(f"--config {name}: there are {paths}; give one of these paths")
    close = nearest(Path(file).stem, [path.stem for path in packaged_configs()])
    hint = f"did you mean {close}? " if close else ""
    raise UsageError(
        f"--config {name}: there is no file and no packaged config of that name; {hint}"
        "`lit-rlft list configs` shows them all"
    )


def _installed(word: str) -> str:
    """Find `configs/...` in the installed package where the working directory has none."""
    prefix, _, path = word.rpartition("=")
    installed = _ROOT / path
    if path.startswith("configs/") and not Path(path).exists() and installed.is_file():
        return f"{prefix}={installed}" if prefix else str(installed)
    return word
