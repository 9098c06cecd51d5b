"""What the documents show works: every Python snippet runs, every command exists.

The snippets of one document run in order and share one namespace, as a reader would type them, in an empty folder
and with warnings as errors. A snippet that follows the comment `<!-- not run -->` is only read; commands that follow
`<!-- run -->` are run.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

from headwater import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
PROGRAMS = {"headwater": Path(sys.executable).with_name("headwater"), "./dev": ROOT / "dev"}

FENCED = re.compile(r"(?P<skip><!-- not run -->\s*)?^ *```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^ *```", re.M | re.S)
RUN = re.compile(r"^<!-- run -->\s*^```sh\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^\s*(?:\$ )?(?P<program>headwater|\./dev) (?P<verb>[a-z][\w-]*)", re.M)

SLOW = (
    "docs/evaluation.md",
    "docs/jax.md",
    "docs/trajectory.md",
    "docs/trust.md",
    "docs/tutorials/images.md",
    "docs/tutorials/text.md",
)  # they train dozens of networks, or compile for long


def named(path):
    return path.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)
each_document_in_its_time = pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=pytest.mark.slow if named(path) in SLOW else ()) for path in DOCUMENTS],
    ids=named,
)


def blocks(document, *languages):
    return (block for block in FENCED.finditer(document.read_text()) if block["language"] in languages)


@cache
def help_of(program):
    return subprocess.run([PROGRAMS[program], "--help"], capture_output=True, text=True, check=True).stdout


@each_document
def test_python_snippets_are_python(document):
    """Those that are only read, too."""
    for block in blocks(document, "python"):
        compile(textwrap.dedent(block["body"]), document, "exec", dont_inherit=True)


@each_document_in_its_time
def test_python_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        if not block["skip"]:
            lines_before = block.string.count("\n", 0, block.start("body"))
            code = "\n" * lines_before + textwrap.dedent(block["body"])  # a traceback names the document's own line
            exec(compile(code, document, "exec", dont_inherit=True), namespace)


@each_document
def test_commands_after_the_comment_run_are_run(document, tmp_path, monkeypatch, capsys):
    """In an empty folder, in order, each with exit status 0."""
    monkeypatch.chdir(tmp_path)
    for block in RUN.findall(document.read_text()):
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "headwater"
            cli.main(arguments)  # exits where something is wrong
            assert capsys.readouterr().out


@each_document
def test_commands_exist(document):
    commands = {
        match.groups() for block in blocks(document, "console", "sh") for match in COMMAND.finditer(block["body"])
    }
    unknown = [
        f"{program} {verb}"
        for program, verb in sorted(commands)
        if not re.search(rf"^\W*(dev )?{verb}\b", help_of(program), re.M)
    ]
    assert not unknown
