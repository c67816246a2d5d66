"""Pages that are made while the site is built: the reference of every package, root documents.

Packages are found on disk, so moving a module needs no change here.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages of the repository's root that are pages of the site too."""
_FETCHED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(https?:[^\"'> ]+)"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(https?:[^\"'> ]+)"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the reference pages in the navigation."""
    pages = {name: _page(name) for name in _packages()}
    for entry in config.nav or []:
        if entry.get("Reference") == "REFERENCE":
            entry["Reference"] = [{name: page} for name, page in pages.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name in _packages():
        text = f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n"
        files.append(File.generated(config, _page(name), content=text))
    for source, page in DOCUMENTS.items():
        # Links of the root's documents into docs/ are links between the site's pages.
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, own in DOCUMENTS.items():
            text = text.replace(f"]({other})", f"]({own})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to documents of the repository's root to the site's pages of them."""
    up = "../" * page.file.src_uri.count("/")
    for source, own in DOCUMENTS.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{re.escape(source)}", f"]({up}{own}", markdown)
    return markdown


def _packages() -> list[str]:
    """Return the packages below `lit_rlft`, its modules for users, and the domains."""
    folders = sorted(path.parent for path in (ROOT / "lit_rlft").glob("*/__init__.py"))
    modules = ["lit_rlft.distributed", "lit_rlft.optimizers"]
    domains = sorted(path.parent for path in (ROOT / "domains").glob("*/__init__.py"))
    packages = [f"{folder.parent.name}.{folder.name}" for folder in folders]
    own = [name for name in modules if (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    return [*packages, *own, *(f"domains.{folder.name}" for folder in domains)]


def _page(name: str) -> str:
    return f"reference/{name}.md"


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Raise where a page would fetch something from elsewhere: it is read offline too."""
    fetched = _FETCHED.search(output)
    if fetched:
        raise PluginError(f"{page.file.src_uri} fetches {fetched[1] or fetched[2]}")
    return output
