"""One HTML file out of templates that escape by themselves: no network, no other file, light and dark.

Whatever is put into a template goes through `visible`, then through Jinja2's escaping; the data for the page's script
is JSON in an element that no browser runs. The page's own policy allows the one script and the one style sheet by their
hashes, and pictures that are in the page; a browser refuses everything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from headwater.report.text import MINUS, visible


def render(live: bool = False, **shown: Any) -> str:
    """The whole page as text. shown: what `templates/page.html.j2` names; live: of a server, as `live.html.j2` says."""
    style, script = _file("page.css"), _script(live)
    return (
        _environment()
        .get_template("live.html.j2" if live else "page.html.j2")
        .render(
            **{**shown, "data": in_script(shown["data"])},
            minus=MINUS,
            style=Markup(style),
            script=Markup(script),
            policy=policy(live),
        )
    )


def policy(live: bool = False) -> str:
    """The Content-Security-Policy of a page: its own style and script, pictures in it, and its own server."""
    own = [f"style-src '{_hash(_file('page.css'))}'", f"script-src '{_hash(_script(live))}'"]
    asks = ["connect-src 'self'"] if live else []
    return "; ".join(["default-src 'none'", "img-src data:", *own, *asks, "base-uri 'none'", "form-action 'none'"])


def in_script(data: Any) -> Markup:
    """JSON that no HTML parser takes for markup and no JavaScript parser for the end of a line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _file(name: str) -> str:
    return (files("headwater.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _script(live: bool) -> str:
    """What draws a case, and what finds it: in the page, or by asking the page's server."""
    return f'"use strict";\n(() => {{\n{_file("cards.js")}\n{_file("live.js" if live else "page.js")}}})();\n'


def _hash(text: str) -> str:
    """As a Content-Security-Policy names a text that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("headwater.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
