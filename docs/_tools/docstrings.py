"""Docstrings write formulas as Sphinx does; Markdown writes them between dollars."""

import re
from textwrap import dedent
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]*)`")
_BLOCK = re.compile(r"^( *)\.\. math::[ ]*(.*)\n((?:\1 +.*\n|[ ]*\n)*)", re.MULTILINE)


class Formulas(griffe.Extension):
    """Rewrites the formulas of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite those of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring with Sphinx's formulas written as Markdown's."""
    text = _BLOCK.sub(_display, text + "\n").rstrip("\n")
    return _INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text)


def _display(match: re.Match[str]) -> str:
    indent, first, rest = match.groups()
    lines = [line for line in [first, *dedent(rest).splitlines()] if line.strip()]
    body = "\n".join(indent + line for line in lines)
    return f"{indent}$$\n{body}\n{indent}$$\n\n"
