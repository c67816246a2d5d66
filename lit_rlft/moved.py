"""Old names of modules, which work for one more release and say what the new ones are."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

_MOVED = {
    "lit_rlft.adapters": "lit_rlft.loop.reference",
    "lit_rlft.algorithms.drtune": "lit_rlft.algorithms.reward_gradient",
    "lit_rlft.array_cache": "lit_rlft.kit.cache",
    "lit_rlft.best_of": "lit_rlft.evaluation.best_of",
    "lit_rlft.bootstrap": "lit_rlft.evaluation.bootstrap",
    "lit_rlft.checkpoint": "lit_rlft.loop.checkpoint",
    "lit_rlft.core.judge": "lit_rlft.kit.judge",
    "lit_rlft.core.mmd": "lit_rlft.kit.statistics",
    "lit_rlft.data": "lit_rlft.kit.data",
    "lit_rlft.entries": "lit_rlft.kit.bad_entries",
    "lit_rlft.layers": "lit_rlft.kit.time_layers",
    "lit_rlft.muon": "lit_rlft.optimizers",
    "lit_rlft.noise_generator": "lit_rlft.inference",
    "lit_rlft.observer": "lit_rlft.loop.hooks",
    "lit_rlft.pictures": "lit_rlft.kit.images",
    "lit_rlft.processes": "lit_rlft.distributed",
    "lit_rlft.report": "lit_rlft.runs.before_after",
    "lit_rlft.weights": "lit_rlft.kit.network_folder",
}


class _Finder(MetaPathFinder, Loader):
    """Finds modules under their old names; each has the public names of the new one.

    Args:
        moved: New module by old one.
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        self.moved = dict(moved)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, self.moved[module.__name__]
        text = f"{old} has moved: write {new} instead; the old name is deprecated and goes next"
        warnings.warn(text, FutureWarning, stacklevel=2)
        source = import_module(new)
        vars(module).update({name: getattr(source, name) for name in source.__all__})


_FINDER = _Finder(_MOVED)


def register(moved: Mapping[str, str]) -> None:
    """Let old names of modules work, by their new ones; this package's own always do."""
    _FINDER.moved.update(moved)
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
