"""The texts of a command's options and configs: where their values stand, and how they change."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lit_rlft.cli.words import Option

__all__ = ["ITEM", "Edit", "Key", "absolute_files", "class_of", "edited", "scalars", "text_of"]

ITEM = "*"
"""In a key, any place of a list."""

_CONFIGS = (".yaml", ".yml", ".json")

Key = tuple[str, ...]
Edit = tuple[int, int, str]
"""Start and end of a part of a text, and what takes its place."""


def text_of(option: Option) -> tuple[Key, str]:
    """Return the key of an option's value, and its text; for a config, that of its file."""
    if option.key != "config":
        return tuple(option.key.split(".")), option.value
    path = Path(option.value)
    if "\n" in option.value or not path.is_file():
        return (), option.value
    return (), path.read_text(encoding="utf-8", errors="replace")


def edited(text: str, edits: Sequence[Edit]) -> str:
    """Return a text with some parts changed, none of which holds another."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def absolute_files(option: Option, text: str) -> list[Edit]:
    """Return edits of the files that a config names beside itself: as a text it has no place."""
    if option.key != "config" or "\n" in option.value:
        return []
    folder = Path(option.value).absolute().parent
    return [
        (node.start_mark.index, node.end_mark.index, str(folder / node.value))
        for _, node in scalars((), text)
        if node.value.endswith(_CONFIGS) and (folder / node.value).is_file()
    ]


def class_of(group: str, prefix: Key, text: str) -> str | None:
    """Return the class that a text gives to a group of the config, by path or name, if any."""
    keys = ((group,), (group, "class_path"))
    found = [str(node.value) for key, node in scalars(prefix, text) if key in keys]
    return found[-1] if found else None


def scalars(prefix: Key, text: str) -> Iterator[tuple[Key, yaml.ScalarNode]]:
    """Iterate over the single values of a YAML text; the parser reports a broken one."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    if root is not None and (prefix or not isinstance(root, yaml.ScalarNode)):
        yield from _below(prefix, root, set())


def _below(key: Key, node: yaml.Node, seen: set[int]) -> Iterator[tuple[Key, yaml.ScalarNode]]:
    if id(node) in seen:  # an alias of what stands elsewhere
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _below((*key, str(name.value).removesuffix("+")), value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _below((*key, ITEM), value, seen)
    elif isinstance(node, yaml.ScalarNode):
        yield key, node
