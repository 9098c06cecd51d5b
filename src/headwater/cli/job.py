"""`headwater init`, `fit`, `score`, `append`, `top`: a job, from the file that says what it is to its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from headwater.cli.app import YOURS, Json, Memory, Quiet, SetupOrJob, Store, Worker, app, command, print_wrapped
from headwater.cli.stops import kept

if TYPE_CHECKING:
    from headwater.job import Call
    from headwater.store.scores import Scores, TopK

SHOWN = 10
"""Queries that `top` prints unless it is asked for others."""


@app.command(group=YOURS)
def init(file: Path = Path("job.toml"), /) -> None:
    """Write a job to begin with: job.toml, and job.py beside it. It runs as it stands, on digits.

    Parameters
    ----------
    file
        The job to write; its Python file has the same name. Nothing is overwritten.
    """
    from headwater.cli.starter import missing_extra, write_starter

    written = write_starter(file)
    first = f"pip install 'headwater[{missing_extra()}]', then " if missing_extra() else ""
    print_wrapped(f"Wrote {file} and {written.name}. Try: {first}headwater top {file}")


@app.command(group=YOURS)
def fit(
    job: SetupOrJob, /, *, store: Store = None, worker: Worker = "0/1", json: Json = False, quiet: Quiet = False
) -> None:
    """Fit the job's influence to its train rows. What a stopped call finished is kept, and this one goes on there.

    A job's setup is your own code, and is run.
    """
    call = call_of(job, store, worker, quiet)
    with kept(how_to_go_on(call)):
        fitted = call.fit()
    found = {"store": str(call.job.store), "method": fitted.method.describe(), "rows": fitted.n_train}
    say(found if json else None, f"Fitted {found['method']} to {fitted.n_train:g} rows: {call.job.store}", quiet)


@app.command(group=YOURS)
def score(
    job: SetupOrJob,
    /,
    *,
    store: Store = None,
    memory: Memory = None,
    worker: Worker = "0/1",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score all train rows on all queries; fits first, if need be. What a stopped call finished is kept.

    A job's setup is your own code, and is run.
    """
    call = call_of(job, store, worker, quiet, memory)
    with kept(how_to_go_on(call)):
        scores = call.score()
    _tell(call, scores, json, quiet)


@app.command(group=YOURS)
def append(
    job: SetupOrJob,
    /,
    *,
    store: Store = None,
    memory: Memory = None,
    worker: Worker = "0/1",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the rows that the job's train loader has more than when it was scored, at its end; the fit stays.

    A job's setup is your own code, and is run.
    """
    call = call_of(job, store, worker, quiet, memory)
    with kept(how_to_go_on(call)):
        scores = call.append()
    _tell(call, scores, json, quiet)


@app.command(group=YOURS)
def top(
    job: SetupOrJob,
    /,
    *,
    k: int | None = None,
    query: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    store: Store = None,
    memory: Memory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the train rows that help each query most, and those that harm it most; scores first, if need be.

    A job's setup is your own code, and is run.

    Parameters
    ----------
    k
        Rows at each end, in place of the job's.
    query
        A query's id, in place of the first ten queries; may be given several times.
    every
        All queries.
    """
    call = call_of(job, store, "0/1", quiet, memory)
    with kept(how_to_go_on(call)):
        found = call.top(k)
    chosen = _chosen(found, query)
    if json:
        say({"unit": call.job.score.scored_in, "queries": [_as_json(found, q) for q in chosen]}, "", quiet)
        return
    shown = chosen if query or every else chosen[:SHOWN]
    print(found.take(shown).table(get_terminal_size().columns))
    if len(shown) < len(chosen):
        print(f"{len(chosen) - len(shown)} more queries: --all, or --query ID.")


def call_of(job: str, store: Path | None, worker: str, quiet: bool, memory: str | None = None) -> Call:
    from headwater.job import Call, Job
    from headwater.run.runners.environment import worker_of

    return Call(Job.read(job, store, memory), command.get(), worker_of(worker), progress=not quiet)


def how_to_go_on(call: Call) -> str:
    return f"What is finished is kept in {call.job.store}; the same command goes on: {command.get()}"


def _tell(call: Call, scores: Scores, json: bool, quiet: bool) -> None:
    """What was found, and what speaks against it."""
    worries = () if scores.diagnosis is None else scores.diagnosis.worries
    found = {
        "store": str(call.job.store),
        "method": scores.method,
        "unit": scores.unit,
        "queries": scores.shape[0],
        "rows": scores.shape[1],
        "damping": dict(scores.damping),
        "worries": worries,
    }
    words = [f"{scores!r}: {call.job.store}", *(f"WORRYING: {said}" for said in worries)]
    say(found if json else None, "\n".join(words), quiet)


def say(found: object, words: str, quiet: bool) -> None:
    """JSON if there is any; else words, unless they are not wanted."""
    if found is not None:
        print(json.dumps(found, indent=1))
    elif not quiet:
        print_wrapped(words)


def _chosen(found: TopK, wanted: Sequence[str]) -> list[int]:
    """Positions of the queries with these ids. Errors: InvalidInput."""
    from headwater.errors import InvalidInput

    names = [str(name) for name in found.query_ids]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise InvalidInput(f"There is no query {unknown[0]!r}; there are {', '.join(names[:5])}, ...")
    return [names.index(name) for name in wanted] if wanted else list(range(len(names)))


def _as_json(found: TopK, query: int) -> dict[str, Any]:
    def rows(ids: Any, scores: Any) -> list[dict[str, Any]]:
        pairs = zip(ids[query].tolist(), scores[query].tolist(), strict=True)
        return [{"id": name, "score": score} for name, score in pairs]

    return {
        "query": found.query_ids[query].item(),
        "helpful": rows(found.helpful_ids, found.helpful_scores),
        "harmful": rows(found.harmful_ids, found.harmful_scores),
    }
