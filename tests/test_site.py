"""The site of the documents: every page can be reached, every public name is explained, nothing is fetched."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwater

yaml = pytest.importorskip("yaml", reason="the site's settings are YAML: pip install headwater[docs]")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PUBLIC = (
    "headwater",
    "headwater.evaluate",
    "headwater.hf",
    "headwater.jax",
    "headwater.job",
    "headwater.report",
    "headwater.retraining.sklearn",
    "headwater.retraining.torch",
    "headwater.sklearn",
    "headwater.torch",
)
NOT_BY_THAT_NAME = {"headwater.__version__", "headwater.errors", "headwater.NotConverged"}  # errors have a page
ON_ANOTHER_PAGE = {"headwater.retraining.sklearn": "headwater.sklearn"}
EXPLAINED = [
    name for page in sorted((DOCS / "api").glob("*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
]
OUTSIDE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}


def in_the_navigation(entry):
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inside for page in in_the_navigation(part)]


def public_names(package):
    """Read, not imported: four frameworks take half a minute."""
    if package == "headwater":
        return importlib.import_module(package).__all__
    source = ast.parse((ROOT / "src" / package.replace(".", "/") / "__init__.py").read_text())
    return next(
        ast.literal_eval(line.value)
        for line in source.body
        if isinstance(line, ast.Assign) and line.targets[0].id == "__all__"
    )


def test_every_page_is_in_the_navigation():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(OUTSIDE)
    navigated = in_the_navigation(SETTINGS["nav"])
    assert sorted(navigated) == sorted(pages)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_explained(package):
    home = ON_ANOTHER_PAGE.get(package, package)
    names = {f"{home}.{name}" for name in public_names(package)}
    missing = sorted(names - NOT_BY_THAT_NAME - set(EXPLAINED))
    assert not missing, "each belongs on a page of docs/api, after :::"


def test_every_error_is_explained():
    errors = importlib.import_module("headwater.errors")
    public = {
        kind.__name__
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.HeadwaterError)
    }
    assert not {f"headwater.errors.{name}" for name in public} - set(EXPLAINED)


def test_every_verb_of_the_command_line_is_explained():
    app = importlib.import_module("headwater.cli").app
    verbs = {name for name in app if not name.startswith("-") and app[name].show} - {"version"}
    told = set(re.findall(r"^<!-- help ([\w -]+) -->$", (DOCS / "api" / "command-line.md").read_text(), re.M))
    assert told == verbs


def test_every_name_that_is_explained_is_there():
    """Of packages without a framework; building the site finds all."""
    framework = re.compile(r"headwater\.(trajectory\.)?(torch|jax|sklearn|hf|retraining)\.")
    for name in EXPLAINED:
        if not framework.match(name):
            module, _, member = name.rpartition(".")
            assert inspect.getattr_static(importlib.import_module(module), member, None) or member in headwater.__all__


def test_no_name_is_explained_twice():
    assert len(EXPLAINED) == len(set(EXPLAINED))


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs mkdocs: pip install headwater[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    fetched = re.compile(r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=["']?(?:https?:)?//""")
    for page in tmp_path.rglob("*.html"):
        assert not fetched.search(page.read_text()), page
    anchors = {
        name
        for page in tmp_path.rglob("api/*.html")
        for name in re.findall(r'id="(headwater[\w.]+)"', page.read_text())
    }
    assert not set(EXPLAINED) - anchors
