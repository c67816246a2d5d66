"""The classes that a command line can name, read from the sources without importing them."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lit_rlft.cli.packages import domain_packages, modules

__all__ = ["Entry", "index", "sentence_of"]

OWN = "lit_rlft"
_KINDS = {
    "lit_rlft.algorithms.base.RewardFineTuner": "algorithm",
    "lit_rlft.core.pipeline.Pipeline": "pipeline",
    "lit_rlft.core.reward.Reward": "reward",
    "lit_rlft.core.reward.Metric": "metric",
    "lit_rlft.core.selection.Selection": "selection",
    "lightning.LightningDataModule": "data",
    "lightning.pytorch.LightningDataModule": "data",
}
_GRADIENT = "differentiable"
_INTERNAL = frozenset({"lit_rlft.loop.side.rewards.SideReward"})
"""Classes of such a kind that nobody names."""
_CLASS = re.compile(r"^class \w+\(", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A class that a command line can name.

    Attributes:
        name: Its own name.
        path: The shortest dotted path under which it can be imported.
        module: Where it is defined.
        kind: "algorithm", "pipeline", "data", "reward", "metric", "selection", or "" for others.
        domain: Name of the domain it belongs to, or None for those of `lit_rlft` itself.
        summary: First sentence of its docstring.
        gradient: Whether a reward is differentiable: "yes", "no", or "depends" on its settings.
    """

    name: str
    path: str
    module: str
    kind: str
    domain: str | None
    summary: str
    gradient: str


@dataclass(frozen=True)
class _Module:
    """A parsed file: its classes, and what its names stand for."""

    classes: Mapping[str, ast.ClassDef]
    members: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]


class _Sources:
    """The parsed modules of several packages, and which class inherits from which."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.modules = {name: _parsed(name, path) for name, path in files.items()}

    def resolve(self, path: str) -> str:
        """Return where the class behind a dotted path is defined, through re-exports."""
        module, _, name = path.rpartition(".")
        known = self.modules.get(module)
        if known is None or name in known.classes or name not in known.names:
            return path
        return self.resolve(known.names[name])

    def bases(self, path: str) -> list[str]:
        """Return the paths of a class's direct base classes."""
        module, _, name = path.rpartition(".")
        known = self.modules.get(module)
        if known is None or name not in known.classes:
            return []
        return [
            self.resolve(_dotted(base, known.names, module)) for base in known.classes[name].bases
        ]

    def ancestors(self, path: str) -> Iterator[str]:
        """Iterate over a class and all that it inherits from, the nearest first."""
        yield path
        for base in self.bases(path):
            yield from self.ancestors(base)

    def kind(self, path: str) -> str:
        """Return what a class is used for, as in `Entry.kind`."""
        return next((_KINDS[one] for one in self.ancestors(path) if one in _KINDS), "")

    def members(self, path: str) -> dict[str, str]:
        """Return each member as "abstract" or "concrete", and `differentiable` as its value."""
        members: dict[str, str] = {}
        for base in reversed(self.bases(path)):
            members |= self.members(base)
        module, _, name = path.rpartition(".")
        known = self.modules.get(module)
        if known is not None and name in known.members:
            members |= known.members[name]
        return members

    def is_abstract(self, path: str) -> bool:
        """Return whether a class only says what its subclasses have in common."""
        direct = {base.rpartition(".")[2] for base in self.bases(path)}
        return bool(direct & {"ABC", "Protocol"}) or "abstract" in self.members(path).values()


def index() -> list[Entry]:
    """Return all classes with public names that are not abstract, in the order of the sources."""
    return _index(tuple(domain_packages().items()))


@cache
def _index(domains: tuple[tuple[str, str], ...]) -> list[Entry]:
    files = modules(OWN)
    owner: dict[str, str] = {}
    for domain, package in domains:
        own = modules(package)
        owner |= dict.fromkeys(own, domain)
        files |= own
    sources = _Sources(files)
    shortest = _shortest(sources)
    return [
        entry
        for module, known in sources.modules.items()
        for name, node in known.classes.items()
        if not name.startswith("_") and not sources.is_abstract(f"{module}.{name}")
        if f"{module}.{name}" not in _INTERNAL
        for entry in [_entry(sources, module, node, owner.get(module), shortest)]
    ]


def _entry(
    sources: _Sources,
    module: str,
    node: ast.ClassDef,
    domain: str | None,
    shortest: Mapping[str, str],
) -> Entry:
    path = f"{module}.{node.name}"
    gradient = sources.members(path).get(_GRADIENT, "no")
    summary = sentence_of(ast.get_docstring(node) or "")
    return Entry(
        node.name, shortest.get(path, path), module, sources.kind(path), domain, summary, gradient
    )


def _shortest(sources: _Sources) -> dict[str, str]:
    """Return the shortest path of each class that a package re-exports from its own modules."""
    found: dict[str, str] = {}
    for module, known in sources.modules.items():
        for name in known.names:
            path = sources.resolve(f"{module}.{name}")
            shorter = len(module) < len(found.get(path, path).rpartition(".")[0])
            if path.startswith(f"{module}.") and path.endswith(f".{name}") and shorter:
                found[path] = f"{module}.{name}"
    return found


def _parsed(module: str, path: Path) -> _Module:
    try:
        text = path.read_text(encoding="utf-8")
        # Parsing takes time, and most files neither define such classes nor re-export them.
        wanted = path.name == "__init__.py" or _CLASS.search(text)
        tree = ast.parse(text if wanted else "")
        stub = path.with_suffix(".pyi")  # says what a package re-exports that loads it lazily
        promised = ast.parse(stub.read_text(encoding="utf-8") if stub.is_file() else "")
        body = [*tree.body, *promised.body]
    except (SyntaxError, UnicodeDecodeError, OSError):
        return _Module({}, {}, {})  # somebody's file that Python could not import either
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    members = {name: dict(_own_members(node)) for name, node in classes.items()}
    names = {name: full for node in body for name, full in _imported(node, package)}
    return _Module(classes, members, names)


def _imported(node: ast.stmt, package: str) -> Iterator[tuple[str, str]]:
    """Iterate over the names that an import statement makes, and what they stand for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], alias.name
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        source = ".".join((*parents, *([node.module] if node.module else [])))
        source = source if node.level else str(node.module)
        for alias in node.names:
            yield alias.asname or alias.name, f"{source}.{alias.name}"


def _dotted(base: ast.expr, names: Mapping[str, str], module: str) -> str:
    """Return the full path of a base class as it is written in a module."""
    if isinstance(base, ast.Subscript):
        base = base.value
    text = ast.unparse(base)
    first, dot, rest = text.partition(".")
    if first in names:
        # `import a.b` makes the name a.
        full = names[first] if names[first].partition(".")[0] != first else first
        return full + dot + rest
    return f"{module}.{text}"


def _own_members(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            decorators = {ast.unparse(one).rpartition(".")[2] for one in part.decorator_list}
            concrete = "depends" if part.name == _GRADIENT else "concrete"
            yield part.name, "abstract" if "abstractmethod" in decorators else concrete
            if part.name == "__init__" and any(map(_sets_gradient, part.body)):
                yield _GRADIENT, "depends"
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            for name in (target.id for target in targets if isinstance(target, ast.Name)):
                yield name, _value(part.value) if name == _GRADIENT else "concrete"


def _sets_gradient(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    found = (one for target in targets for one in ast.walk(target))  # of `a, b = ...` too
    return any(isinstance(one, ast.Attribute) and one.attr == _GRADIENT for one in found)


def _value(value: ast.expr | None) -> str:
    if not isinstance(value, ast.Constant):
        return "depends"
    return "yes" if value.value else "no"


def sentence_of(docstring: str) -> str:
    """Return the first sentence of a docstring, on one line and without its full stop."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    paragraph = re.sub(r":math:`([^`]*)`", r"\1", paragraph)
    return paragraph.partition(". ")[0].removesuffix(".")
