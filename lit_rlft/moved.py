"""Old names of modules; they work for one more release and tell the new ones."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

__all__ = ["moved_name", "register"]

_MOVED = {
    "lit_rlft.adapters": "lit_rlft.loop.reference",
    "lit_rlft.algorithms.drtune": "lit_rlft.algorithms.reward_gradient",
    "lit_rlft.array_cache": "lit_rlft.kit.cache",
    "lit_rlft.best_of": "lit_rlft.evaluation.best_of",
    "lit_rlft.bootstrap": "lit_rlft.evaluation.jackknife",
    "lit_rlft.checkpoint": "lit_rlft.loop.checkpoint",
    "lit_rlft.core.judge": "lit_rlft.kit.judge",
    "lit_rlft.core.mmd": "lit_rlft.kit.statistics",
    "lit_rlft.data": "lit_rlft.kit.data",
    "lit_rlft.entries": "lit_rlft.kit.bad_entries",
    "lit_rlft.evaluation.bootstrap": "lit_rlft.evaluation.jackknife",
    "lit_rlft.layers": "lit_rlft.kit.time_layers",
    "lit_rlft.muon": "lit_rlft.optimizers",
    "lit_rlft.noise_generator": "lit_rlft.inference",
    "lit_rlft.observer": "lit_rlft.loop.hooks",
    "lit_rlft.pictures": "lit_rlft.kit.images",
    "lit_rlft.processes": "lit_rlft.distributed",
    "lit_rlft.weights": "lit_rlft.kit.network_folder",
}


class _Finder(MetaPathFinder, Loader):
    """Finds modules under their old names; each has the public names of the new one.

    Args:
        moved: New module by old one.
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        self.moved = dict(moved)
        self.renamed: dict[str, Mapping[str, str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.moved:
            return None
        new = find_spec(self.moved[fullname])
        assert new is not None
        return ModuleSpec(fullname, self, origin=new.origin)

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, self.moved[module.__name__]
        _warn(old, new)
        source = import_module(new)
        vars(module).update(_public(source))
        names = self.renamed.get(old, {})
        vars(module).update({name: getattr(source, other) for name, other in names.items()})
        vars(module)["__getattr__"] = partial(getattr, source)  # also what is not in `__all__`

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the new module's code, which `python -m <old name>` runs."""
        spec = find_spec(self.moved[fullname])
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        _warn(fullname, self.moved[fullname])
        return spec.loader.get_code(self.moved[fullname])


_FINDER = _Finder(_MOVED)


def moved_name(module: str, name: str, moved: Mapping[str, str]) -> Any:
    """Return the object of a name that has moved from a module, for its `__getattr__`.

    Args:
        module: The module that is asked.
        name: The name.
        moved: New module by name.

    Raises:
        AttributeError: The name is none of those that have moved.
    """
    if name not in moved:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{moved[name]}.{name}")
    return getattr(import_module(moved[name]), name)


def _public(module: ModuleType) -> dict[str, Any]:
    """Return the public names of a module: those of its `__all__`, or all without underscore."""
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    return {name: getattr(module, name) for name in names}


def _warn(old: str, new: str) -> None:
    text = f"{old} has moved: write {new} instead; the old name is deprecated and goes next"
    warnings.warn(text, FutureWarning, stacklevel=3)


def register(
    moved: Mapping[str, str], renamed: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Let old names of modules work; this package's own always do.

    Args:
        moved: New module by old one.
        renamed: By old module, new name by old one, for names that changed as well.
    """
    _FINDER.moved.update(moved)
    _FINDER.renamed.update(renamed or {})
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
