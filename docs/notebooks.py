"""The tutorials as notebooks: prose and code of docs/tutorials/*.md, cell by cell. Run: python docs/notebooks.py

Notebooks hold no outputs; a test says whether they are in step with their pages, and another runs them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```\n?", re.M | re.S)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(page: str) -> str:
    """A page as the JSON of a notebook, format 4.5."""
    parts = SNIPPET.split(page)  # prose and code in turn
    cells = [
        _cell(number, "code" if number % 2 else "markdown", part.strip())
        for number, part in enumerate(parts)
        if part.strip()
    ]
    found = {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict[str, object]:
    cell: dict[str, object] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": text.splitlines(keepends=True)}


if __name__ == "__main__":
    for page in PAGES:
        page.with_suffix(".ipynb").write_text(notebook(page.read_text(encoding="utf-8")), encoding="utf-8")
