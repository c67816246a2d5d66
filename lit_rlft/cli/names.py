"""Short class names: `--model PGRAFT`, `class_path: CLIPScore`."""

import importlib
import locale
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_rlft.cli.index import Entry, index
from lit_rlft.cli.packages import domain_of
from lit_rlft.cli.paths import packaged_configs
from lit_rlft.cli.texts import ITEM, Key, absolute_files, class_of, edited, scalars, text_of
from lit_rlft.cli.words import Option, nearest, options, rewritten
from lit_rlft.core.checks import UsageError

__all__ = ["with_class_paths"]

_KINDS = {
    "pipeline": ("pipeline",),
    "reward": ("reward",),
    "metrics": ("metric", "reward"),
    "data": ("data",),
    "model": ("algorithm",),
}
"""Kinds of classes in the groups of a config; the first kind that has a name wins."""
_WHOLE = {
    *((group,) for group in _KINDS if group != "metrics"),
    ("metrics", "parts"),
    ("metrics", "parts", ITEM),
    ("trainer", "callbacks"),
    ("trainer", "callbacks", ITEM),
}
"""Keys whose value names a class where it is a single word."""
_BASES = {"RewardFineTuner", "Pipeline", "Metric", "LightningDataModule"}
_NAME = re.compile(r"[A-Z]\w*")
_LOWER = re.compile(r"[a-z][\w-]*")
"""What a class may be mistyped as, or a config taken for one."""


class _Word(NamedTuple):
    """A word that may be a class's name, with its key and its place in a text."""

    key: Key
    name: str
    start: int
    end: int

    @property
    def is_class(self) -> bool:
        """Whether nothing but a class can stand here."""
        return self.key[-1] in ("class_path", "help") or self.key in _WHOLE

    @property
    def is_top(self) -> bool:
        """Whether it is one of the five parts of a run, not something within them."""
        key = self.key[:-1] if self.key[-1] in ("class_path", "help") else self.key
        return key in _WHOLE and key[0] in _KINDS


def with_class_paths(words: Sequence[str]) -> list[str]:
    """Return a command's words with full class paths in place of short names.

    Configs with short names become configs as text; so do those that the parser would read in
    another encoding than UTF-8. Where a word may name a class or something else, the class is
    imported, so that the parser can find it.

    Raises:
        UsageError: A name belongs to no class, or to several; the sentence lists them.
    """
    texts = [(option, *text_of(option)) for option in options(words)]
    found = [(option, text, list(_words(prefix, text))) for option, prefix, text in texts]
    names = [word for _, _, own in found for word in own]
    resolver = _Resolver(_domain(names, texts)) if names else None
    for option, text, own in found:
        paths = [(word.start, word.end, resolver.path(word)) for word in own if resolver]
        edits = [(start, end, path) for start, end, path in paths if path is not None]
        if edits or _is_misread(option, text):
            edits += absolute_files(option, text)
            words = rewritten(words, option, edited(text, edits))
    return list(words)


def _is_misread(option: Option, text: str) -> bool:
    """Return whether the parser, which reads files in the system's encoding, would change one."""
    if option.key != "config" or text.isascii() or text == option.value:
        return False
    return locale.getpreferredencoding(False).lower().replace("-", "") != "utf8"


class _Resolver:
    """Finds the class that a word means.

    Args:
        domain: The pipeline's, which decides between classes of one name, or None.
    """

    def __init__(self, domain: str | None) -> None:
        self.domain, self.entries = domain, index()

    def path(self, word: _Word) -> str | None:
        """Return the class path to write in place of a word, or None to leave it."""
        found = self.candidates(word)
        if not word.is_class:
            for entry in found if len(word.key) > 1 else []:
                importlib.import_module(entry.module)
            return None
        if len(found) == 1:
            return found[0].path
        if found:
            paths = ", ".join(entry.path for entry in found)
            raise UsageError(f"{_flag(word)}: {word.name} may be any of {paths}; give one of these")
        ours = any(entry.name == word.name for entry in self.entries)
        if word.is_top and (ours or not _is_loaded(word.name)):
            raise self._unknown(word)
        return None

    def candidates(self, word: _Word) -> list[Entry]:
        """Return the classes of a name: of the right kind, and of the pipeline's domain."""
        found = [entry for entry in self.entries if entry.name == word.name]
        kinds = _KINDS.get(word.key[0], ())
        if word.is_top:
            found = [entry for entry in found if entry.kind in kinds]
        best = next((kind for kind in kinds if any(e.kind == kind for e in found)), None)
        found = [entry for entry in found if best in (None, entry.kind)]
        near = [entry for entry in found if entry.domain in (None, self.domain)]
        return near or found

    def _unknown(self, word: _Word) -> UsageError:
        kinds = _KINDS[word.key[0]]
        what = "DataModule" if kinds[0] == "data" else kinds[0]
        close = nearest(word.name, [e.name for e in self.entries if e.kind in kinds])
        hint = f"did you mean {close}? " if close else ""
        if any(path.stem == word.name for path in packaged_configs()):
            hint = f"{word.name} is a config: write --config {word.name}; "
        listed = "domains" if kinds[0] in ("pipeline", "data") else f"{kinds[0]}s"
        return UsageError(
            f"{_flag(word)}: there is no {what} {word.name}; {hint}"
            f"`lit-rlft list {listed}` shows them all, and one of yours needs its full class path"
        )


def _flag(word: _Word) -> str:
    return "--" + ".".join(part for part in word.key if part not in (ITEM, "class_path"))


def _domain(names: Sequence[_Word], texts: Sequence[tuple[Option, Key, str]]) -> str | None:
    """Return the domain of the pipeline that is given last, by its short name or its path."""
    given = [word.name for word in names if word.key[0] == "pipeline" and word.is_top]
    short = {entry.name: entry.domain for entry in index() if entry.kind == "pipeline"}
    paths = [class_of("pipeline", prefix, text) for _, prefix, text in texts]
    for path in filter(None, reversed(paths)):
        if domain := domain_of(path):
            return domain
        if path in given:
            return short.get(path)
    return None


def _words(prefix: Key, text: str) -> Iterator[_Word]:
    for key, node in scalars(prefix, text):
        if not node.tag.endswith(":str"):
            continue
        word = _Word(key, node.value, node.start_mark.index, node.end_mark.index)
        mistyped = word.is_top and _LOWER.fullmatch(node.value) and not Path(node.value).exists()
        if mistyped or _NAME.fullmatch(node.value):
            yield word


def _is_loaded(name: str) -> bool:
    """Return whether a program has defined such a class, which the parser then knows by itself."""
    loaded = [getattr(module, "__dict__", {}).get(name) for module in [*sys.modules.values()]]
    return any(
        _BASES & {base.__name__ for base in one.__mro__} for one in loaded if isinstance(one, type)
    )
