"""A reward in place of a config's takes none of its arguments.

The parser would keep those whose names both classes know: the `pretrained` of a CLIPScore for a
PickScore, the `scale` of one quantity for another.
"""

from collections.abc import Sequence

import yaml

from lit_rlft.cli.texts import Edit, absolute_files, class_of, edited, text_of
from lit_rlft.cli.words import options, rewritten

__all__ = ["without_old_arguments"]

_GROUP = "reward"


def without_old_arguments(words: Sequence[str]) -> list[str]:
    """Return a command's words; configs whose reward gives way to another class lose its arguments.

    Args:
        words: Configs first.
    """
    texts = [(option, *text_of(option)) for option in options(words)]
    paths = [class_of(_GROUP, prefix, text) for _, prefix, text in texts]
    named = [path and path.rpartition(".")[2] for path in paths]  # a class may have several paths
    for i, (option, _, text) in enumerate(texts):
        other = any(name not in (None, named[i]) for name in named[i + 1 :])
        if option.key != "config" or named[i] is None or not other:
            continue
        for start, end, nothing in _emptied(text):
            files = [edit for edit in absolute_files(option, text) if not start <= edit[0] < end]
            words = rewritten(words, option, edited(text, [(start, end, nothing), *files]))
    return list(words)


def _emptied(text: str) -> list[Edit]:
    """Return the edits that leave the reward's class without arguments."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    reward = _value(root, _GROUP)
    arguments = _value(reward, "init_args")
    if not isinstance(arguments, yaml.MappingNode) or not arguments.value:
        return []
    start, end = arguments.start_mark, arguments.end_mark
    # A block ends where the next one starts, behind its indentation.
    rest = "" if arguments.flow_style else "\n" + " " * end.column
    return [(start.index, end.index, "{}" + rest)]


def _value(node: yaml.Node | None, name: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)
