"""What mkdocs does beside building pages: pages from outside docs/, links that lead out of it, the shell's help.

The sources read well by themselves, with links that are right on a disk; here they become links of the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from griffe import Alias, Extension, Module, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from headwater.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
FROM_OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
HELP = re.compile(r"^<!-- help(?P<arguments>[\w -]*) -->$", re.M)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in FROM_OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    sources = {page: source for source, page in FROM_OUTSIDE.items()}
    path = page.file.src_uri
    source = sources.get(path, f"docs/{path}")
    return HELP.sub(lambda found: help_of(found["arguments"]), links_of_the_site(markdown, source, path))


def links_of_the_site(markdown: str, source: str, page: str) -> str:
    """A file's links become the site's; what is no page of the site is named, without a link."""

    def replaced(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        target = FROM_OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return found["text"]
        relative = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"[{found['text']}]({relative}{found['anchor'] or ''})"

    return "".join(
        part if part.startswith("`") else LINK.sub(replaced, part)
        for part in re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    )


@cache
def help_of(arguments: str) -> str:
    """What `headwater ... --help` prints, as a block of text."""
    command = [sys.executable, "-m", "headwater", *arguments.split(), "--help"]
    settings = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    printed = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"```text\n{printed.strip()}\n```"


class Names(Extension):
    """Names as readers type them, and docstrings as they were meant."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Methods are looked up when they are first used; who only reads the source is told where they are."""
        if pkg.path == "headwater":
            for entry in METHODS:
                home = f"headwater.methods.{entry.module}.{entry.class_name}"
                pkg.set_member(entry.class_name, Alias(entry.class_name, home, parent=pkg))

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Docstrings write <a, b> for an inner product; Markdown would take that for a tag."""
        if obj.docstring:
            parts = CODE.split(obj.docstring.value)
            obj.docstring.value = "".join(part if part.startswith("`") else escape(part, quote=False) for part in parts)
