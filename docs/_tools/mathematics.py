"""Formulas become MathML while the site is built, so that browsers show them offline.

`pymdownx.arithmatex` marks them in pages and docstrings alike.
"""

import html
import re
from functools import cache
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the marked formulas of a page."""
    return _MARKED.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    block = match[1] == "div"
    formula = _convert(html.unescape(match[2]).strip(), "block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula


@cache
def _convert(latex: str, display: str) -> str:
    formula = convert(latex, display=display)
    if "\\" in html.unescape(formula):
        raise PluginError(f"a command of this formula is not known: {latex}")
    return formula
