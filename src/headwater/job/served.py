"""What `headwater serve` shows: a job's scores with its rows, or the scores in a folder, by what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, NotSaved
from headwater.job.settings import Job, ReportSettings
from headwater.report.cases import TITLE, Known
from headwater.report.live import Live
from headwater.store.described import Described
from headwater.store.identity import IDENTITY
from headwater.store.kinds import kind_of
from headwater.store.record import SCORES, read_record
from headwater.store.scores import HEAD, Scores


def served(target: str, k: int | None = None, command: str = "") -> Live:
    """Of a job, whose setup is run for what its rows are; or of a folder: a job's results, a run, saved scores.

    Scores stay on disk, and are not computed here. k: rows at each end, in place of the job's.
    Errors: NotSaved where there are no finished scores, and how to have them; those of `Job.read` and of `Live`.
    """
    if Path(target).is_dir():
        return _of_folder(Path(target), k, command)
    if not target.endswith((".toml", ".py")) and ":" not in target:
        raise NotSaved(f"There is no {target}; expected a job file, or a folder of results, of a run or of scores.")
    return _of_job(Job.read(target), k, command)


def _of_folder(folder: Path, k: int | None, command: str) -> Live:
    record = read_record(folder)
    if record is None:
        run, name, settings = (folder / SCORES if (folder / SCORES / IDENTITY).is_file() else folder), None, {}
    else:
        run, name = folder / record.verbs.get("score", {}).get("folder", SCORES), record.job or None
        settings = record.settings.get("report", {})
    if not any((run / head).is_file() for head in (HEAD, IDENTITY)):
        raise NotSaved(f"There are no scores at {run}{kind_of(run)}.")
    shown = ReportSettings(**settings)
    made = {"command": command or None, "job": name}
    return Live(Scores.open(run), Known(k=k or shown.k, title=shown.title or TITLE, lead=shown.lead, made=made))


def _of_job(job: Job, k: int | None, command: str) -> Live:
    try:
        scores = Scores.open(job.scores)  # before anything of the user's is run
    except NotSaved as error:
        raise NotSaved(f"{error} To have them: headwater score {job.name}") from error
    setup, shown = job.load(), job.report
    asked, called = scores.are_positions
    known = Known(
        rows=_of_batches(setup.train, scores.train_ids, called) if setup.rows is None else setup.rows,
        queries=_of_batches(setup.query, scores.query_ids, asked) if setup.queries is None else setup.queries,
        k=k or shown.k,
        title=shown.title or TITLE,
        lead=shown.lead,
        predictions=setup.predictions,
        made={"command": command or None, "job": job.name or None},
    )
    return Live(scores, known)


def _of_batches(loader: Iterable[object] | None, ids: np.ndarray, positions: bool) -> Any:
    """A list of batches says what its rows are; of other loaders nothing is read. None where it does not."""
    if not isinstance(loader, Sequence):
        return None
    try:
        Described.of(loader, ids, positions=positions)
    except (InvalidInput, InvalidSetting):
        return None
    return loader
