"""Configs that the package brings along, found from any working directory."""

from pathlib import Path

__all__ = ["packaged"]


def packaged(argument: str) -> str:
    """Find `configs/...` in the installed package where the working directory has none."""
    prefix, _, path = argument.rpartition("=")
    installed = Path(__file__).parents[2] / path
    if path.startswith("configs/") and not Path(path).exists() and installed.is_file():
        return f"{prefix}={installed}" if prefix else str(installed)
    return argument
