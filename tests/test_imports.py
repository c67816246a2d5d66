"""Who may import whom, and what `import lit_rlft` must not pull in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIELDS = {"diffusers", "transformers", "rdkit", "domains"}
STANDARD = sys.stdlib_module_names
MODULES = sorted([*(ROOT / "lit_rlft").rglob("*.py"), *(ROOT / "domains").rglob("*.py")])


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Iterate over the full names that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{dotted(path)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def allowed(module: str, name: str) -> bool:
    """Return whether a module of this repository may import a name."""
    top = name.partition(".")[0]
    if within(module, "lit_rlft.core"):
        return top in STANDARD or top == "torch" or within(name, "lit_rlft.core")
    if within(module, "lit_rlft.algorithms") and within(name, "lit_rlft.algorithms"):
        own = ".".join(module.split(".")[:3])
        return within(name, own) or within(name, "lit_rlft.algorithms.base")
    if within(module, "lit_rlft"):
        return top not in FIELDS
    if within(name, "domains") and module.count("."):
        return within(name, ".".join(module.split(".")[:2]))
    if within(name, "lit_rlft"):
        return not within(name, "lit_rlft.algorithms")
    return top != "peft" or within(module, "domains.text_to_image")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_import_what_they_may(path: Path) -> None:
    module = dotted(path)
    forbidden = [name for name in imports(path) if not allowed(module, name)]
    assert not forbidden, f"{module} must not import {forbidden}"


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("lit_rlft.core.reward", "torch.nn", True),
        ("lit_rlft.core.reward", "lightning.LightningModule", False),
        ("lit_rlft.core.reward", "lit_rlft.algorithms.base", False),
        ("lit_rlft.algorithms.graft", "lit_rlft.algorithms.base.Draw", True),
        ("lit_rlft.algorithms.graft", "lit_rlft.algorithms.pretrain.Pretrain", False),
        ("lit_rlft.cli.app", "domains.gaussian_mixture", False),
        ("lit_rlft.loop.reference", "peft.LoraConfig", True),
        ("domains.text_to_image.data", "domains.text_to_image.shapes.world", True),
        ("domains.text_to_image.data", "domains.gaussian_mixture.data", False),
        ("domains.text_to_image.data", "lit_rlft.algorithms.graft.GRAFT", False),
    ],
)
def test_the_rules_themselves(module: str, name: str, expected: bool) -> None:
    assert allowed(module, name) is expected


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, lit_rlft\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'peft', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
