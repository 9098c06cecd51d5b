"""Which packages may import which, and which libraries each may use.

A package here is a module or folder directly under `headwater`; its own `__init__` is the package "". The folders of
`retraining` and `trajectory`, one for each framework, count one by one where libraries are concerned.
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

MATHS = {
    "gradients",
    "loaders",
    "rows",
    "operators",
    "curvature",
    "mapper",
    "influence",
    "methods",
    "torch",
    "jax",
    "sklearn",
    "hf",
}
RESULTS = {"store", "evaluate", "report"}
FACES = {"headwater.torch", "headwater.sklearn"}  # offer names of `retraining` without importing it: see `moved.py`
FOLDED = {"retraining", "trajectory"}

# A library, or headwater's own package of that name -> the packages that may import it.
HOMES = {
    "torch": {"torch", "hf", "retraining/torch", "trajectory/torch", "trajectory/recorders", "run", "demo", "door"},
    "jax": {"jax", "trajectory/jax", "trajectory/recorders", "door"},
    "flax": {"jax"},
    "equinox": {"jax"},
    "transformers": {"hf", "demo", "trajectory/torch"},
    "peft": {"hf"},
    "datasets": {"hf"},
    "safetensors": {"store"},
    "faiss": {"store"},
    "sklearn": {"sklearn", "retraining/sklearn", "demo", "door"},
    "dask": {"run"},
    "distributed": {"run"},
    "google_crc32c": {"store"},
    "zarr": {"store"},
    "xarray": {"store"},
    "jinja2": {"report"},
    "matplotlib": {"store"},
    "pandas": {"tables", "store", "sklearn", "demo", "retraining/sklearn"},
    "pyarrow": {"store"},
    "rich": {"tables"},
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


def package_of(module: str) -> str:
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
    return [
        found
        for found in imports()
        if found.target.partition(".")[0] == "headwater"
        and not (found.source in FACES and package_of(found.target) == "retraining" and not found.eager)
    ]


def home(module: str) -> str:
    """The package, or the folder within one that has a folder for each framework."""
    first, *rest = module.removeprefix("headwater.").split(".")
    return f"{first}/{rest[0]}" if first in FOLDED and rest else first


def importing(sources: set[str], targets: set[str]) -> list[str]:
    """The imports from packages of the first set of those of the second."""
    return [str(i) for i in inside() if package_of(i.source) in sources and package_of(i.target) in targets]


def test_each_library_is_known_only_in_its_packages():
    misplaced = []
    for found in imports():
        library = home(found.target).removeprefix("retraining/").removeprefix("trajectory/")
        if library in HOMES and home(found.source) not in HOMES[library] | {library}:
            misplaced.append(str(found))
    assert not misplaced


def test_maths_imports_neither_results_nor_what_trains_again():
    above = RESULTS | {"run", "retraining", "trajectory"}
    assert not importing(MATHS, above)


def test_what_trains_again_does_not_import_results():
    above = RESULTS | {"run"}
    assert not [
        str(found)
        for found in inside()
        if package_of(found.source) == "retraining" and package_of(found.target) in above
    ]


def test_results_do_not_import_maths():
    maths = MATHS | {"retraining"}
    assert not importing(RESULTS, maths)


def test_imports_have_no_cycle():
    """Imports within functions, and those for type checkers alone, count as all others do."""
    graph = TopologicalSorter()
    for found in inside():
        if MODULES[found.target].stem != "__init__" and MODULES[found.source].stem != "__init__":  # these gather names
            graph.add(found.source, found.target)
    graph.prepare()  # raises CycleError, which names the cycle


READERS = {
    "headwater.hf.rows": "items of a loader as batches, when they are read",
    "headwater.loaders.forms": "batches that are dicts or frames, as inputs and targets, when they are read",
    "headwater.loaders.batches": "items of a loader unpacked, when they are read",
    "headwater.loaders.unlabelled": "batches without labels, with stand-ins, when they are read",
    "headwater.progress": "items counted on their way",
    "headwater.sklearn.influence": "batches that go through a pipeline once",
}
"""Who reads what users give beside `headwater.rows`, and hands it on: adapters, not passes."""
GIVEN = {"loader", "train_loader", "query_loader", "source", "self.loader", "self.source", "items"}


def loops(tree: ast.AST) -> Iterator[ast.expr]:
    """What is iterated over, without `enumerate`, `track` and their like around it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            over = node.iter
            while isinstance(over, ast.Call) and over.args:
                over = over.args[0]
            yield from (over.body, over.orelse) if isinstance(over, ast.IfExp) else (over,)


def test_a_loader_is_read_in_one_place():
    found = {
        module
        for module, path in MODULES.items()
        if package_of(module) not in {"demo", "testing", "rows"}
        and any(ast.unparse(over) in GIVEN for over in loops(ast.parse(path.read_text())))
    }
    assert found == set(READERS)


def test_the_door_imports_frameworks_of_headwater_alone_and_late():
    found = [i for i in imports() if i.source == "headwater.door" and home(i.target) in HOMES]
    assert found and all(i.target.startswith("headwater.") and not i.eager for i in found)


def test_importing_headwater_brings_no_framework():
    code = f"import sys, headwater; print(*sorted({set(HOMES)} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
