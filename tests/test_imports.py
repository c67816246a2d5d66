"""Who may import whom, the size of things, and what `import lit_rlft` must not pull in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIELDS = {"diffusers", "transformers", "rdkit", "domains"}
STANDARD = sys.stdlib_module_names
PATHS = sorted([*(ROOT / "lit_rlft").rglob("*.py"), *(ROOT / "domains").rglob("*.py")])
# Each room may import itself and those on lines above its own.
LAYERS = (
    ("core",),
    ("runs", "distributed", "cost", "kit", "optimizers"),
    ("inference", "loop", "voting"),
    ("evaluation", "report"),
    ("algorithms",),
    ("callbacks",),
    ("cli",),
)
HEIGHTS = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
LOOSE = {"__init__", "__main__", "distributed", "moved", "optimizers"}
MAX_LINES, MAX_BASE = 50, 300
UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
OF_OPEN = {"mode", "buffering", "errors", "newline", "data"}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in PATHS}


def imports(path: Path) -> Iterator[str]:
    """Iterate over the full names that a file imports, also inside functions and for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{dotted(path)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room(name: str) -> str:
    """Return the part of lit_rlft that a module belongs to, "" for its root."""
    return ([*name.split("."), ""])[1]


def allowed(module: str, name: str) -> bool:
    """Return whether a module of this repository may import a name."""
    top = name.partition(".")[0]
    if within(module, "lit_rlft.core"):
        return top in STANDARD or top == "torch" or within(name, "lit_rlft.core")
    if within(module, "lit_rlft.algorithms") and within(name, "lit_rlft.algorithms"):
        own = ".".join(module.split(".")[:3])
        return within(name, own) or within(name, "lit_rlft.algorithms.base")
    if within(module, "lit_rlft"):
        if not within(name, "lit_rlft"):
            return top not in FIELDS
        return room(module) == room(name) or below(room(name), room(module))
    if within(name, "domains") and module.count("."):
        return within(name, ".".join(module.split(".")[:2]))
    if within(name, "lit_rlft") and module.count("."):
        return room(name) in ("core", "kit", "moved")
    return top != "peft" or within(module, "domains.text_to_image")


def below(lower: str, upper: str) -> bool:
    """Return whether a room lies lower than another; the root's names are everyone's."""
    return lower not in HEIGHTS or HEIGHTS[lower] < HEIGHTS.get(upper, len(LAYERS))


def graph() -> dict[str, set[str]]:
    """Return which of this repository's modules each imports."""
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = set(imports(path))
        # `from package import name` is the module of that name where there is one.
        found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
        edges[module] = (found & set(MODULES)) - {module}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, none where there is no circle."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for name in sorted(edges[module]):
            if found := visit(name, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_what_they_may(module: str) -> None:
    forbidden = [name for name in imports(MODULES[module]) if not allowed(module, name)]
    assert not forbidden, f"{module} must not import {forbidden}"


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("lit_rlft.core.reward", "torch.nn", True),
        ("lit_rlft.core.reward", "lightning.LightningModule", False),
        ("lit_rlft.core.reward", "lit_rlft.algorithms.base", False),
        ("lit_rlft.algorithms.graft", "lit_rlft.algorithms.base.RewardFineTuner", True),
        ("lit_rlft.algorithms.graft", "lit_rlft.algorithms.pretrain.Pretrain", False),
        ("lit_rlft.algorithms.graft", "lit_rlft.callbacks.ema.EMA", False),
        ("lit_rlft.loop.rollouts", "lit_rlft.cost.meter.Meter", True),
        ("lit_rlft.loop.rollouts", "lit_rlft.evaluation.evaluator.Evaluator", False),
        ("lit_rlft.cost.meter", "lit_rlft.loop.rollouts", False),
        ("lit_rlft.cost.meter", "lit_rlft.kit.data", False),
        ("lit_rlft.cli.app", "lit_rlft.callbacks.ema.EMA", True),
        ("lit_rlft.cli.app", "lit_rlft.__version__", True),
        ("lit_rlft.cli.app", "domains.gaussian_mixture", False),
        ("lit_rlft.loop.reference", "peft.LoraConfig", True),
        ("domains.text_to_image.data", "domains.text_to_image.shapes.world", True),
        ("domains.text_to_image.data", "domains.gaussian_mixture.data", False),
        ("domains.text_to_image.data", "lit_rlft.kit.data.Rows", True),
        ("domains.text_to_image.data", "lit_rlft.loop.route.Route", False),
        ("domains.text_to_image.data", "lit_rlft.algorithms.graft.GRAFT", False),
    ],
)
def test_the_rules_themselves(module: str, name: str, expected: bool) -> None:
    assert allowed(module, name) is expected


def test_every_room_has_its_layer() -> None:
    rooms = {room(module) for module in MODULES if within(module, "lit_rlft")}
    assert rooms - {"", "__main__", "moved"} == set(HEIGHTS)


def test_no_modules_import_each_other() -> None:
    edges = graph()
    assert edges["lit_rlft.algorithms.graft"] >= {"lit_rlft.algorithms.base"}
    assert not circle(edges)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_sizes() -> None:
    assert {path.stem for path in (ROOT / "lit_rlft").glob("*.py")} <= LOOSE
    assert len((ROOT / "lit_rlft/algorithms/base.py").read_text().splitlines()) <= MAX_BASE
    functions = (
        (module, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert not [own for own in functions if own[2] > MAX_LINES]


def test_helpers_take_what_they_need() -> None:
    """No function of the rooms below the algorithms takes the whole of one."""
    takers = [
        (module, node.name)
        for module, path in MODULES.items()
        if room(module) in ("loop", "evaluation", "cost")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in [*node.args.args, *node.args.kwonlyargs]
        if argument.arg == "tuner" or "RewardFineTuner" in ast.unparse(argument)
    ]
    assert not takers


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, lit_rlft\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'peft', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_modules_of_unix_are_imported_there_alone() -> None:
    """An import at the left margin would end every command on Windows."""
    found = []
    for path in PATHS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name in UNIX]
    assert not found


def unnamed(tree: ast.AST) -> Iterator[str]:
    """Iterate over calls that open a text file in the encoding of the system."""
    for node in ast.walk(tree):
        given = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else set()
        if not isinstance(node, ast.Call) or "encoding" in given or given - OF_OPEN:
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if method else ""
        if name in ("read_text", "write_text"):
            if "METADATA" not in ast.unparse(node):  # of a distribution, which has no encoding
                yield ast.unparse(node)
        elif name in ("open", "fdopen") and owner not in ("Image", "tarfile"):
            place = 0 if method and owner != "os" else 1
            modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[place:]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else ""
            if "b" not in str(mode) and (owner != "os" or name == "fdopen"):
                yield ast.unparse(node)


def test_text_files_have_an_encoding_of_their_own() -> None:
    """Windows would read and write them in that of its country: no "±", no "日"."""
    assert not [
        f"{path.relative_to(ROOT)}: {call}"
        for path in PATHS
        for call in unnamed(ast.parse(path.read_text(encoding="utf-8")))
    ]
