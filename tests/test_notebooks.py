"""Every notebook runs from top to bottom, on its small setting."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

QUICK = "inverse_noise_correction"
"""`make docs` executes all of them, and fails where one does."""
NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem == QUICK else [pytest.mark.slow])
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    assert parameters.source.splitlines()[1:] == ["small = False"]
    parameters.source = "small = True"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
