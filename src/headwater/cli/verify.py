"""`headwater verify`: are the scores right on a user's own model?"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from headwater.cli.app import LOOK, CheckFailed, Quiet, app, checked_seed, print_wrapped
from headwater.errors import InvalidSetting


@app.command(group=LOOK)
def verify(
    setup: str | None = None,
    /,
    *,
    demo: Annotated[bool, Parameter(negative="")] = False,
    rows: int = 8,
    queries: int = 4,
    tolerance: float | None = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Recompute random scores the slow plain way, on your model and rows, and compare. Exit status 1 if they differ.

    Runs the setup file: your own code.

    Parameters
    ----------
    setup
        A Python file that defines influence (fitted or not), train and query (loaders), or a function setup() that
        returns the three; also file.py:function, module:function, or a job (job.toml).
    demo
        Verify `headwater demo digits` instead.
    rows
        Train rows for each query.
    queries
        Queries.
    tolerance
        How far scores may be off, relative to the largest; by default what the dtype allows.
    seed
        Of the sample.
    """
    if demo == (setup is not None):
        raise InvalidSetting("Give either a setup file or --demo." if demo else "Give a setup file, or --demo.")
    from headwater.job import Job

    given = Job.read("headwater.demo.digits:setup" if demo else str(setup)).load()
    if not given.influence.is_fitted:
        given.influence.fit(given.train, progress=not quiet)
    found = given.influence.verify(
        given.train,
        given.query_loader,
        rows=rows,
        queries=queries,
        tolerance=tolerance,
        seed=checked_seed(seed),
        progress=not quiet,
    )
    print_wrapped(found)
    if not found.passed:
        raise CheckFailed
