"""Who may know what: the rooms of the house and the directions in which they import.

A room is a module or folder directly under `headwater`; the package's own `__init__` is the room "".
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src"

MATHS = {"gradients", "operators", "curvature", "mapper", "influence", "methods", "torch", "jax", "sklearn", "hf"}
RESULTS = {"store", "evaluate", "report"}

# A library, or headwater's own room of that name -> the rooms that may import it.
HOMES = {
    "torch": {"torch", "hf", "run", "demo"},
    "jax": {"jax"},
    "transformers": {"hf", "demo"},
    "peft": {"hf"},
    "datasets": {"hf"},
    "safetensors": {"store"},
    "sklearn": {"sklearn", "demo"},
    "dask": {"run"},
    "zarr": {"store"},
    "xarray": {"store"},
    "matplotlib": {"report"},
}


class Import(NamedTuple):
    source: str
    target: str
    eager: bool  # runs when the source is imported: not in a function, not for type checkers only

    def __str__(self) -> str:
        return f"{self.source} imports {self.target}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((SOURCE / "headwater").rglob("*.py"))}


def room(module: str) -> str:
    return module.removeprefix("headwater").lstrip(".").partition(".")[0]


def statements(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, eager
        yield from statements(child, eager and not later)


def targets(module: str, path: Path, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        ancestors = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*ancestors, *filter(None, [node.module])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


@cache
def imports() -> list[Import]:
    return [
        Import(module, target, eager)
        for module, path in MODULES.items()
        for node, eager in statements(ast.parse(path.read_text()))
        for target in targets(module, path, node)
    ]


def inside() -> list[Import]:
    return [found for found in imports() if found.target.partition(".")[0] == "headwater"]


def test_each_library_is_known_only_in_its_rooms():
    strangers = []
    for found in imports():
        library = found.target.removeprefix("headwater.").partition(".")[0]
        if library in HOMES and room(found.source) not in HOMES[library] | {library}:
            strangers.append(str(found))
    assert not strangers


def test_maths_does_not_import_results():
    assert not [str(f) for f in inside() if room(f.source) in MATHS and room(f.target) in RESULTS | {"run"}]


def test_results_do_not_import_maths():
    assert not [str(found) for found in inside() if room(found.source) in RESULTS and room(found.target) in MATHS]


def test_imports_have_no_cycle():
    """Imports within functions, and those for type checkers alone, count as all others do."""
    graph = TopologicalSorter()
    for found in inside():
        if MODULES[found.target].stem != "__init__" and MODULES[found.source].stem != "__init__":  # these gather names
            graph.add(found.source, found.target)
    graph.prepare()  # raises CycleError, which names the circle


def test_importing_headwater_brings_no_framework():
    code = f"import sys, headwater; print(*sorted({set(HOMES)} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
