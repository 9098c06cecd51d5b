"""Every method has a line in the registry, and that line is all that it needs."""

import subprocess
import sys
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import get_args

import headwater
from headwater import cli
from headwater.methods import registry
from headwater.methods.base import Method
from headwater.methods.registry import costs_table


def test_the_command_line_names_every_method():
    assert get_args(cli.Method) == tuple(entry.name for entry in headwater.METHODS)


def test_the_page_on_methods_has_a_row_for_every_method():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert costs_table() in page


def test_every_method_class_is_in_the_registry():
    """In the package's files, abstract ones aside: each has a line, and a type checker knows it by its name."""
    classes = {
        found
        for path in Path(registry.__file__).parent.glob("[a-z]*.py")
        for found in vars(import_module(f"headwater.methods.{path.stem}")).values()
        if isinstance(found, type) and issubclass(found, Method) and not isabstract(found)
    }
    assert {entry.cls for entry in headwater.METHODS} == classes
    seen = Path(registry.__file__).read_text()
    assert all(f"import {entry.class_name} as {entry.class_name}" in seen for entry in headwater.METHODS)


def test_one_line_in_the_registry_is_all_that_a_method_needs():
    """A method from elsewhere, registered: the demo, the command line and the docs' table know it."""
    code = """
import sys, types
from dataclasses import dataclass
from headwater.methods import registry
from headwater.methods.grad_dot import GradDot

@dataclass(frozen=True)
class Half(GradDot):
    seed: int = 0
    def invert(self, curvature, damping):
        return super().invert(curvature, damping) * 0.5

there = types.ModuleType("headwater.methods.half")
there.Half = Half
sys.modules[there.__name__] = there
costs = registry.Costs("none", "nothing", "nothing", "o i", "none")
registry.METHODS += (registry.MethodEntry("half", "Half", "half", "half of it", costs),)
for name in [name for name in sys.modules if name == "headwater"]:
    del sys.modules[name]
import headwater as hw
assert hw.Half is Half and "Half" in hw.__all__ and "`hw.Half()`" in registry.costs_table()
from headwater.door import method_of
from headwater.cli import app
assert isinstance(method_of("half"), Half)
app(["demo", "--help"])
"""
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "half" in shown.stdout
