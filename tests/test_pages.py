"""The pages for people who carry on say what is so: the picture, links, files, versions, checksums."""

import hashlib
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from test_architecture import MODULES, inside, package_of

import headwater

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
BOARD = ROOT / "benchmarks" / "leaderboard"
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

picture = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
DRAWN = picture["read"](picture["TEXT"].read_text())


def test_the_picture_is_drawn_from_its_text():
    assert picture["SVG"].read_text() == picture["draw"](DRAWN), "run: python docs/architecture.py"


def test_the_picture_has_every_package():
    packages = {package_of(module) for module in MODULES} - {""}
    drawn = [name for layer in DRAWN.layers for name in layer]
    assert sorted(drawn) == sorted(packages)


def test_imports_run_as_the_picture_shows():
    height = {name: -k for k, layer in enumerate(DRAWN.layers) for name in layer}
    upward = [
        found
        for found in inside()
        if package_of(found.source)
        and package_of(found.target)
        and height[package_of(found.target)] > height[package_of(found.source)]
    ]
    assert not [str(f) for f in upward]


def test_a_step_that_does_not_go_on_is_refused():
    with pytest.raises(ValueError, match="does not go on"):
        picture["read"]("step a -> b\nstep c -> d")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    assert not [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]


def test_the_extras_that_the_readme_names_are_those_there_are():
    text = (ROOT / "README.md").read_text()
    sentence = re.search(r"The extras are (.*?)[;.]", text, re.S)[1]
    assert set(re.findall(r"`([\w-]+)`", sentence)) == set(PROJECT["optional-dependencies"]) - {
        "demo",
        "dev",
        "docs",
        "verses",
    }


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]*)`", text)
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_line_of_data_names_files_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    assert not [name for name in named if not (ROOT / "src" / "headwater" / name).exists()]


def test_one_version_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited and PROJECT["version"] == headwater.__version__ == cited[1]


def test_the_leaderboards_binaries_have_the_checksums_that_are_kept():
    kept = dict(reversed(line.split("  ")) for line in (BOARD / "SHA256SUMS").read_text().splitlines())
    binaries = [path for path in BOARD.rglob("*") if path.suffix in (".npz", ".safetensors")]
    found = {path.relative_to(BOARD).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in binaries}
    assert found == kept
