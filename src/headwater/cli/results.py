"""`headwater report`, `export`, `calibrate`, `evaluate`: a job's page and tables, and what retrained models say."""

from __future__ import annotations

import json as as_json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headwater.cli.app import YOURS, Json, Memory, Quiet, SetupOrJob, Store, app
from headwater.cli.job import call_of, how_to_go_on, say
from headwater.cli.stops import kept


@app.command(group=YOURS)
def report(
    job: SetupOrJob,
    /,
    *,
    out: Path | None = None,
    store: Store = None,
    memory: Memory = None,
    show: Annotated[bool, Parameter(name="--open", negative="")] = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page of the job: for each query the rows behind it, and what to trust; scores first, if need be.

    A job's setup is your own code, and is run.

    Parameters
    ----------
    out
        The page, in place of the job's: report.html.
    show
        Open it in a browser.
    """
    call = call_of(job, store, "0/1", quiet, memory)
    with kept(how_to_go_on(call)):
        written = call.report(out)
    say(None, f"Wrote {written}", quiet)
    if show:
        open_page(written)


def open_page(page: Path) -> None:
    import webbrowser

    webbrowser.open(page.resolve().as_uri())


@app.command(group=YOURS)
def export(
    job: SetupOrJob,
    file: Path,
    /,
    *,
    top: int | None = None,
    store: Store = None,
    memory: Memory = None,
    quiet: Quiet = False,
) -> None:
    """Write the scores as a table, a line for each query and train row; scores first, if need be.

    A job's setup is your own code, and is run.

    Parameters
    ----------
    file
        Where to: a name that ends in .parquet or .csv. What was there is replaced.
    top
        Only so many rows at each end of each query's ranking.
    """
    call = call_of(job, store, "0/1", quiet, memory)
    with kept(how_to_go_on(call)):
        written = call.export(file, top)
    say(None, f"Wrote {written}", quiet)


@app.command(group=YOURS)
def calibrate(
    job: SetupOrJob, /, *, store: Store = None, memory: Memory = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Choose the damping that forecasts retraining best: trains a few models again on halves of the rows.

    For that the setup returns a dict that has a function "retrain", too. Models that are trained already are kept.
    Then `[fit] damping = "calibrated"` in the job uses the choice. A job's setup is your own code, and is run.
    """
    call = call_of(job, store, "0/1", quiet, memory)
    with kept(how_to_go_on(call)):
        found = call.calibrate()
    use = "" if call.job.fit.damping == "calibrated" else '\nTo use it: damping = "calibrated" under [fit] in the job.'
    say(as_json.loads(found.to_json()) if json else None, f"{found}{use}", quiet)


@app.command(group=YOURS)
def evaluate(
    job: SetupOrJob, /, *, store: Store = None, memory: Memory = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Say how well the scores forecast retraining (LDS), by models trained again on halves of the rows.

    For that the setup returns a dict that has a function "retrain", too. Models that are trained already are kept.
    A job's setup is your own code, and is run.
    """
    call = call_of(job, store, "0/1", quiet, memory)
    with kept(how_to_go_on(call)):
        found = call.evaluate()
    judged, without = found.lds, found.left_out
    values = {"lds": judged.raw.value, "low": judged.raw.low, "high": judged.raw.high, "ceiling": judged.ceiling}
    values |= {"subsets": judged.subsets}
    if without is not None:
        values |= {"foretold": float(without.foretold.mean()), "measured": float(without.measured.mean())}
    say(values if json else None, str(found), quiet)
