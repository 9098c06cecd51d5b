"""`headwater info`: what is in a folder."""

from __future__ import annotations

import json as as_json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headwater.cli.app import LOOK, Json, app


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
    json
        Print JSON.
    """
    from headwater.store.info import info as look

    found = look(_folder(store), check)
    print(as_json.dumps(found.to_dict(), indent=1) if json else found)
    if check and found.all_damage:
        sys.exit(1)


def _folder(given: Path) -> Path:
    if given.suffix != ".toml" or not given.is_file():
        return given
    from headwater.job import Job

    return Job.read(str(given)).store
