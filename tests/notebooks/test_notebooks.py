"""The notebooks run from top to bottom, and what is saved in them is what a reader should find."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
ON_GEMMA = ("molt_against_transcoder", "reading_one_transform")
PLOTLY = "application/vnd.plotly.v1+json"
MAX_BYTES = 400_000
PRIVATE = re.compile(r"/(home|root|tmp|Users|private|var|work)/|[A-Z]:\\\\")
"""Paths of whoever saved the notebook."""


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures(notebook: nbformat.NotebookNode) -> int:
    return sum(PLOTLY in output.get("data", {}) for output in outputs(notebook))


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.id, cell.source) for cell in notebook.cells]


def marked(path: Path) -> object:
    marks = [pytest.mark.slow, *([pytest.mark.gemma] if path.stem in ON_GEMMA else [])]
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    notebook = read(copy)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert figures(notebook) == figures(read(path))
    assert sources(notebook) == sources(read(path))  # ids are the file's own: a rerun shows as a change of outputs only


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_saved(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert figures(notebook) >= 1
    for cell in cells:
        shows = ".show()" in cell.source or re.search(r"^(print|display)\(", cell.source, re.MULTILINE)
        assert cell.outputs or not shows, f"{cell.id} has no saved output"
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", f"a warning or a progress bar: {output.text}"
    ids = [cell.id for cell in notebook.cells]
    assert ids == [f"{path.stem.replace('_', '-')}-{i:02d}" for i in range(1, len(ids) + 1)]
    assert 8 <= len(ids) <= 30
    assert notebook.cells[0].cell_type == notebook.cells[-1].cell_type == "markdown"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_files_are_small_and_name_no_folder_of_their_maker(path):
    assert path.stat().st_size < MAX_BYTES
    found = PRIVATE.search(path.read_text())
    assert found is None, path.read_text()[found.start() - 60 : found.end() + 60] if found else None


def test_the_readme_names_each_of_them():
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        assert f"analysis/notebooks/{path.name}" in readme
