"""Refuses the rewards, metrics and data of another domain than the pipeline's."""

from collections.abc import Iterator, Mapping
from typing import Any

from lit_rlft.cli.index import index
from lit_rlft.cli.packages import domain_of, domain_packages, modules
from lit_rlft.core.checks import UsageError

__all__ = ["check_domains"]

_GROUPS = {"reward": "reward", "metrics": "metric", "data": "data"}
"""Groups of a config by what the index calls their classes."""


def check_domains(config: Mapping[str, Any]) -> None:
    """Raise UsageError where a class takes other samples than the pipeline makes.

    Domains whose samples are pictures, which have no module `render`, share theirs.

    Args:
        config: Of a command, with full class paths.
    """
    pipeline = config.get("pipeline")
    own = domain_of(str(pipeline.get("class_path"))) if isinstance(pipeline, Mapping) else None
    if own is None:
        return
    for group, kind in _GROUPS.items():
        for key, path in _paths(config.get(group), group):
            other = domain_of(path)
            if other is None or _samples(other) == _samples(own):
                continue
            names = [entry.name for entry in index() if (entry.domain, entry.kind) == (own, kind)]
            known = ", ".join(names[:5]) + (", ..." if names[5:] else "")
            name = path.rpartition(".")[2]
            raise UsageError(
                f"{key}: {name} is of the domain {other}, but the pipeline is of {own}; choose one "
                f"of {own}, such as {known}"
            )


def _paths(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str):
            yield key, path
        parts = [(f"{key}.{name}", part) for name, part in value.items()]
    else:
        parts = [(f"{key}.{i}", p) for i, p in enumerate(value)] if isinstance(value, list) else []
    for name, part in parts:
        yield from _paths(part, name)


def _samples(domain: str) -> str:
    """Return what tells a domain's samples from others'."""
    package = domain_packages()[domain]
    return domain if f"{package}.render" in modules(package) else "pictures"
