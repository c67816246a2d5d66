"""Which packages hold domains: those that register under the entry points `lit_rlft.domains`."""

import sys
import tomllib
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

__all__ = ["GROUP", "domain_of", "domain_packages", "modules"]

GROUP = "lit_rlft.domains"
_ROOT = Path(__file__).parents[2]


def domain_packages() -> dict[str, str]:
    """Return the module of each registered domain, by the domain's name.

    A checkout's own pyproject.toml is read too: its installed metadata may be older.
    """
    return _of_checkout() | _installed(tuple(sys.path))


def domain_of(path: str) -> str | None:
    """Return the domain that a class path belongs to, None for those of no domain."""
    packages = domain_packages().items()
    return next((name for name, own in packages if path.startswith(f"{own}.")), None)


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package and of all its sub-packages, by dotted name.

    The package is not imported, only those that it lies in.
    """
    try:
        spec = find_spec(package)
    except ImportError:
        return {}
    if spec is None or spec.origin is None:
        return {}
    found = {package: Path(spec.origin)}
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def _installed(searched: tuple[str, ...]) -> dict[str, str]:
    """Return what the packages in these folders register; to read them all takes 20 ms."""
    del searched  # names the answer in the cache
    return {point.name: point.value for point in entry_points(group=GROUP)}


@cache
def _of_checkout() -> dict[str, str]:
    path = _ROOT / "pyproject.toml"
    if not path.is_file():
        return {}
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != "lit-rlft":
        return {}
    registered: dict[str, str] = project.get("entry-points", {}).get(GROUP, {})
    return registered
