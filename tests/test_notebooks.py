"""The tutorials' notebooks say what their pages say, and run."""

import runpy
from pathlib import Path

import pytest

made = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "notebooks.py"))
each_page = pytest.mark.parametrize("page", made["PAGES"], ids=lambda page: page.stem)


@each_page
def test_the_notebook_is_in_step_with_its_page(page):
    kept = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert kept == made["notebook"](page.read_text(encoding="utf-8")), "run: python docs/notebooks.py"


def test_prose_and_code_become_cells_in_turn():
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install headwater[docs]")
    found = nbformat.reads(made["notebook"]("# A\n\n```python\nx = 1\n```\n\nB\n\n```sh\nls\n```\n"), as_version=4)
    nbformat.validate(found)
    assert [(cell.cell_type, cell.source) for cell in found.cells] == [
        ("markdown", "# A"),
        ("code", "x = 1"),
        ("markdown", "B\n\n```sh\nls\n```"),
    ]


@pytest.mark.slow
@each_page
def test_the_notebook_runs(page, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install headwater[docs]")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient: pip install headwater[docs]")
    pytest.importorskip("ipykernel", reason="notebooks run in ipykernel: pip install headwater[docs]")
    cells = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(cells, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [cell for cell in cells.cells if cell.cell_type == "code" and cell.execution_count is None]
