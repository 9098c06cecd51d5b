"""The command line: few verbs. What goes wrong is one line on the error stream, and exit status 2; `verify` exits with
status 1 when scores are off.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

import headwater
from headwater.errors import HeadwaterError, InvalidSetting

app = App(
    name="headwater",
    help="Which training examples made the model do this, and by how much?",
    version=headwater.__version__,
)

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(entry.name for entry in headwater.METHODS)]


@app.command
def demo(
    *,
    out: Path = Path("headwater-report.html"),
    seed: int = 0,
    method: Method = "ekfac",
    show: Annotated[bool, Parameter(name="--open", negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
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
    found = explore(Settings(seed=_seed(seed), method=method, quiet=quiet))
    out.write_text(report(found), encoding="utf-8")
    if not quiet:
        print(f"{tell(found)}\n\nThe report, with pictures: {out}")
    if show:
        webbrowser.open(out.resolve().as_uri())


@app.command
def verses(
    *,
    out: Path = Path("headwater-verses"),
    passages: int = 3000,
    queries: int = 300,
    method: Literal["logra", "grad-dot", "grad-cos", "ekfac"] = "logra",
    quiet: Annotated[bool, Parameter(negative="")] = False,
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


@app.command
def verify(
    setup: str | None = None,
    /,
    *,
    demo: Annotated[bool, Parameter(negative="")] = False,
    method: Method = "ekfac",
    rows: int = 8,
    queries: int = 4,
    tolerance: float | None = None,
    seed: int = 0,
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Recompute random scores the slow plain way, on your model and rows, and compare. Exit status 1 if they differ.

    Parameters
    ----------
    setup
        A Python file that defines influence (fitted or not), train and query (loaders), or a function setup() that
        returns the three; also file.py:function or module:function.
    demo
        Verify the digits demo instead.
    method
        Of the demo.
    rows
        Train rows for each query.
    queries
        Queries.
    tolerance
        How far scores may be off, relative to the largest; by default what the dtype allows.
    seed
        Of the sample, and of the demo.
    quiet
        No progress bars.
    """
    if demo == (setup is not None):
        raise InvalidSetting("Give either a setup file or --demo." if demo else "Give a setup file, or --demo.")
    from headwater.setup_file import Setup, load_setup

    if demo:
        from headwater.demo import Settings
        from headwater.demo.ready import ready

        given = Setup(*ready(Settings(seed=_seed(seed), method=method, quiet=quiet)))
    else:
        given = load_setup(str(setup))
        if not given.influence.is_fitted:
            given.influence.fit(given.train, progress=not quiet)
    found = given.influence.verify(
        given.train, given.query, rows=rows, queries=queries, tolerance=tolerance, seed=_seed(seed), progress=not quiet
    )
    print(found)
    if not found.passed:
        sys.exit(1)


def _seed(seed: int) -> int:
    if seed < 0:
        raise InvalidSetting(f"--seed {seed}: expected a whole number of at least 0.")
    return seed


@app.command
def version() -> None:
    """Print the version."""
    print(headwater.__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when all went well, 1 when a verification failed, 2 with one line on the error stream
    when something went wrong.
    """
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, HeadwaterError, OSError) as error:
        print(f"headwater: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
