"""The notebooks are run on their small setting and shown with what they print and draw."""

import base64
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FOLDER = re.compile(r"/tmp/tmp\w+")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the notebooks in the navigation."""
    for entry in config.nav or []:
        if entry.get("Notebooks") == "NOTEBOOKS":
            entry["Notebooks"] = [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the notebooks, two at a time, and add a page and the pictures of each."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        for path, notebook in zip(NOTEBOOKS, pool.map(_executed, NOTEBOOKS), strict=True):
            text = "\n".join(_text(notebook, path.stem, files, config))
            files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


@cache
def _executed(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    parameters.source = "small = True"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources=resources,
            extra_arguments=["--log-level=ERROR"],
        ).execute()
    return notebook


def _text(notebook: Any, name: str, files: Files, config: MkDocsConfig) -> Iterator[str]:
    link = f"`notebooks/{name}.ipynb`"
    note = (
        f"!!! note\n    {link}, run on its small setting: the numbers show the form, no result.\n"
    )
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield f"{cell.source}\n"
            if number == 0:
                yield note
            continue
        yield f"```python\n{cell.source}\n```\n"
        for output in cell.outputs:
            yield from _output(output, name, files, config)


def _output(output: Any, name: str, files: Files, config: MkDocsConfig) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        taken = sum(file.src_uri.startswith(f"notebooks/{name}_") for file in files)
        uri = f"notebooks/{name}_{taken}.png"
        files.append(File.generated(config, uri, content=base64.b64decode(data["image/png"])))
        yield f"![what the cell above draws]({name}_{taken}.png)\n"
        return
    # Progress and warnings are on the other stream.
    text = data.get("text/plain") or (output.get("text") if output.get("name") == "stdout" else "")
    if text:
        plain = _FOLDER.sub("/tmp/run", _COLOUR.sub("", text)).rstrip()
        yield f"```text\n{plain}\n```\n"
