"""The command line: few verbs. What goes wrong is one line on the error stream, and exit status 2."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

import headwater
from headwater.errors import HeadwaterError, InvalidSetting

app = App(
    name="headwater",
    help="Which training examples made the model do this, and by how much?",
    version=headwater.__version__,
)

Method = Literal["ekfac", "kfac", "direct", "grad-dot", "grad-cos"]


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
        How the influence of a training row is computed; direct is exact within each layer, and takes longer.
    show
        Open the report in a browser.
    quiet
        No progress bars and no tables; only the report.
    """
    from headwater.demo import Settings, explore, report, tell

    if seed < 0:
        raise InvalidSetting(f"--seed {seed}: expected a whole number of at least 0.")
    if out.is_dir():
        raise InvalidSetting(f"--out {out} is a folder; expected the name of a file.")
    if not out.resolve().parent.is_dir():
        raise InvalidSetting(f"--out {out}: there is no folder {out.resolve().parent}.")
    found = explore(Settings(seed=seed, method=method, quiet=quiet))
    out.write_text(report(found), encoding="utf-8")
    if not quiet:
        print(f"{tell(found)}\n\nThe report, with pictures: {out}")
    if show:
        webbrowser.open(out.resolve().as_uri())


@app.command
def version() -> None:
    """Print the version."""
    print(headwater.__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when all went well, 2 with one line on the error stream when not."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, HeadwaterError, OSError) as error:
        print(f"headwater: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
