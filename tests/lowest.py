"""Prints the lowest versions that pyproject.toml admits, as constraints for pip.

`make test-lowest` installs these. torch is left out: which builds of it there are depends on the
machine.
"""

import re
import tomllib
from pathlib import Path

__all__ = ["lowest"]

_FLOOR = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)")


def lowest(requirements: list[str]) -> list[str]:
    """Return each requirement at its lowest version: "plotly==6" for "plotly>=6"."""
    floors = [found.groups() for each in requirements if (found := _FLOOR.match(each))]
    return [f"{name}=={version}" for name, version in floors if name != "torch"]


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    print("\n".join(lowest(tomllib.loads(text)["project"]["dependencies"])))
