"""`headwater info` and `delete`: what is in a folder, and rows that are to go from it."""

from __future__ import annotations

import json as as_json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headwater.cli.app import LOOK, YOURS, CheckFailed, Json, Quiet, app, command, print_wrapped
from headwater.cli.stops import kept
from headwater.errors import InvalidSetting


@app.command(group=LOOK)
def info(store: Path, /, *, check: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> None:
    """Say what a folder is and how far it has come: results of a job, sums of a fit, a run of scores, a saved fit, ...

    Needs no model and runs nobody's code.

    Parameters
    ----------
    store
        A folder of headwater's; or a job file, for its results.
    check
        Read every file, and name each that is damaged or missing; exit status 1 if there is any.
    """
    from headwater.store.info import info as look

    found = look(_folder(store), check)
    if json:
        print(as_json.dumps(found.to_dict(), indent=1))
    else:
        print_wrapped(found)
    if check and found.all_damage:
        raise CheckFailed


@app.command(group=YOURS)
def delete(
    store: Path,
    /,
    *ids: str,
    compact: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take train rows out of finished scores; with --compact their bytes are gone, too.

    Runs nobody's code. The fit stays: what these rows added to its sums is in it until the job is fitted without them.

    Parameters
    ----------
    store
        A job file, or the folder of its results, or of a run.
    ids
        Of the rows. None: only --compact what was deleted before.
    compact
        Write the scores again without the rows that were deleted.
    """
    if not ids and not compact:
        raise InvalidSetting("Give the ids of the rows to delete, or --compact for those that are deleted.")
    from headwater.job import delete_rows

    folder = _folder(store)
    with kept(f"The scores in {folder} are whole; the same command goes on: {command.get()}"):
        count = delete_rows(folder, ids, compact, command.get())
    if json:
        print(as_json.dumps({"store": str(folder), "deleted": count, "compacted": compact}))
    elif not quiet:
        out = [f"{count} rows are out of {folder}."] if ids else []
        gone = "The bytes of deleted rows are gone." if compact else "Their bytes are there until --compact."
        print_wrapped(" ".join([*out, gone]))


def _folder(given: Path) -> Path:
    if given.suffix != ".toml" or not given.is_file():
        return given
    from headwater.job import Job

    return Job.read(str(given)).store
