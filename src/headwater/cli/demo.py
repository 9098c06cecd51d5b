"""`headwater demo NAME`: what headwater does with a job, shown on images, text and a table."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from cyclopts import App, Parameter

from headwater.cli.app import TRY, Method, Quiet, app, checked_seed, command, print_wrapped
from headwater.cli.results import open_page
from headwater.cli.stops import kept
from headwater.errors import InvalidSetting

demo = App(name="demo", help_format="plaintext", group=TRY)
app.command(demo)

Out = Annotated[Path, Parameter(help="The page to write: one HTML file.")]
Kept = Annotated[Path | None, Parameter(help="A folder that keeps the results; a stopped demo goes on there.")]
Show = Annotated[bool, Parameter(name="--open", negative="", help="Open the page in a browser.")]
PAGE = Path("headwater-report.html")


@demo.default
@demo.command
def digits(
    *,
    out: Out = PAGE,
    seed: int = 0,
    method: Method | None = None,
    store: Kept = None,
    show: Show = False,
    quiet: Quiet = False,
) -> None:
    """Images: trace what a network misreads to the wrong labels that it was taught. Takes about a minute.

    Parameters
    ----------
    seed
        Of all that is drawn: same seed, same numbers.
    method
        How influence is computed, in place of the exact Gauss-Newton curvature: see docs/methods.md.
    """
    _run("digits", out, store, show, quiet, seed=checked_seed(seed), method=method)


@demo.command
def text(*, out: Out = PAGE, store: Kept = None, show: Show = False, quiet: Quiet = False) -> None:
    """Text: trace verses that a classifier puts into a wrong gospel. Needs headwater[demo-text]; under a minute."""
    _run("text", out, store, show, quiet)


@demo.command
def table(*, out: Out = PAGE, store: Kept = None, show: Show = False, quiet: Quiet = False) -> None:
    """A table: trace wrong diagnoses of a logistic regression to patients of its training set. Takes seconds."""
    _run("table", out, store, show, quiet)


def _run(name: str, out: Path, store: Path | None, show: bool, quiet: bool, **options: Any) -> None:
    if out.is_dir():
        raise InvalidSetting(f"--out {out} is a folder; expected the name of a file.")
    if not out.resolve().parent.is_dir():
        raise InvalidSetting(f"--out {out}: there is no folder {out.resolve().parent}.")
    from headwater.demo import run

    with TemporaryDirectory() as passing:
        goes_on = "" if store is None else f"What is finished is kept in {store}; the same command goes on."
        with kept(goes_on):
            found = run(name, store or Path(passing) / "results", out, command.get(), progress=not quiet, **options)
    if not quiet:
        print_wrapped(f"{found}\n\nThe report, with all of them: {out}")
    if show:
        open_page(out)
