"""Checks the text of config files before the parser reads them, to say where a mistake is."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_rlft.core.checks import UsageError

__all__ = ["check_config"]


def check_config(path: str) -> None:
    """Raise UsageError, with file and line, unless a file is a YAML mapping with different keys."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--config {path} is no text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror})") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        found = next(_repeated(root, set()), None) if root is not None else None
    except yaml.MarkedYAMLError as error:
        raise UsageError(_broken(path, text, error)) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"--config {path} is no YAML ({reason}); save it as text") from error
    except RecursionError as error:
        raise UsageError(f"--config {path} is nested too deeply to be a config") from error
    if root is None:
        raise UsageError(f"--config {path} is empty; leave it out, or write keys with values")
    if not isinstance(root, yaml.MappingNode):
        what = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        raise UsageError(f"--config {path} holds {what}; a config holds keys with values")
    if found is not None:
        line = found.start_mark.line + 1
        raise UsageError(f"--config {path}, line {line}: {found.value} stands twice; keep one")


def _broken(path: str, text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = 0 if mark is None else mark.line
    where = f"--config {path}, line {line + 1}"
    lines = text.splitlines() or [""]
    if "\t" in lines[min(line, len(lines) - 1)]:
        return f"{where} is indented with a tab; use spaces"
    return f"{where} is no YAML: {error.problem}; a bracket, quote or colon may be missing"


def _repeated(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """Iterate over the keys that stand twice in a mapping; the parser would take the last."""
    if id(node) in seen:  # an alias of what stands elsewhere
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _repeated(part, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in names:
                    yield key
                names.add(key.value)
            yield from _repeated(value, seen)
