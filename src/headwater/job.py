"""A job: one small file that says what to work on and where the results go, and the verbs on it.

    setup = "job.py:setup"    a function that returns influence, train and query
    store = "results"         a folder, for all that is found

    [fit]
    [score]
    [top]

Every verb goes on where a stopped one ended, and does first what it needs: `score` fits, `top` scores.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.arrays import working_memory
from headwater.attributor import Attributor
from headwater.errors import AlreadySaved, InvalidSetting
from headwater.settings import bytes_of, check_whole, check_word
from headwater.setup_file import Setup, load_setup, split_target
from headwater.store.record import FIT, FITTED, SCORES, Record, now, read_record, write_record

if TYPE_CHECKING:
    from headwater.store.scores import Scores, TopK

STORE = "results"


@dataclass(frozen=True)
class FitSettings:
    """[fit]"""

    working_memory: str = "64MiB"
    """For the temporary arrays of a batch, in all verbs; to rounding, the numbers do not depend on it."""

    def __post_init__(self) -> None:
        bytes_of(self.working_memory, "working_memory")


@dataclass(frozen=True)
class ScoreSettings:
    """[score]"""

    unit: str = "influence"
    """"influence", or "removal": the predicted rise of the query's loss when the row is removed."""
    by_block: bool = False
    """Keep each block's share."""
    memory: str | int | None = None
    """Bytes that a process may hold in all, "2GiB"; None for no budget."""

    def __post_init__(self) -> None:
        if self.memory is not None:
            bytes_of(self.memory)
        check_word("unit", self.unit, ("influence", "removal"))
        if not isinstance(self.by_block, bool):
            raise InvalidSetting(f"by_block is {self.by_block!r}; expected true or false.")


@dataclass(frozen=True)
class TopSettings:
    """[top]"""

    k: int = 10
    """Rows at each end of a query's ranking."""

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)


TABLES = {"fit": FitSettings, "score": ScoreSettings, "top": TopSettings}


@dataclass(frozen=True)
class Job:
    """What to work on, how, and where the results go."""

    setup: str
    """"FILE.py", "FILE.py:function" or "module:function": the user's own code, which gives influence, train, query."""
    folder: Path
    """What `setup` is relative to."""
    store: Path
    fit: FitSettings = field(default_factory=FitSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    top: TopSettings = field(default_factory=TopSettings)
    name: str = ""
    """What was read: the job file, or the setup."""

    @classmethod
    def read(cls, target: str, store: Path | None = None, memory: str | None = None) -> Job:
        """A job file, "job.toml"; or a setup alone, which has the default settings.

        store, memory: in place of the job's own. Errors: InvalidSetting, naming the key, the file and what is expected.
        """
        if target.endswith(".toml"):
            found = _from_values(_read_toml(Path(target)), Path(target))
        else:
            place, _ = split_target(target)
            beside = Path(place).parent if place.endswith(".py") else Path()
            found = cls(target, Path(), beside / STORE, name=target)
        if memory is not None:
            found = replace(found, score=replace(found.score, memory=memory))
        return found if store is None else replace(found, store=store)

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, as they are written beside the results."""
        tables = {"fit": asdict(self.fit), "score": asdict(self.score), "top": asdict(self.top)}
        return {"setup": self.setup, "store": str(self.store), **tables}

    def load(self) -> Setup:
        """Run the user's code. Errors: as `load_setup`."""
        return load_setup(self.setup, self.folder)


@dataclass(frozen=True)
class Call:
    """A verb on a job, as one worker of several, kept in the record. command: as it was typed."""

    job: Job
    command: str = ""
    worker: tuple[int, int] = (0, 1)
    progress: bool = False

    def fit(self) -> Attributor:
        """The fitted influence. Its sums are in the job's folder, unless the setup gives it fitted."""
        setup = self.job.load()
        with self._working():
            return self._fitted(setup)

    def score(self) -> Scores:
        """All scores; their tiles are in the job's folder."""
        setup = self._loaded_with_queries()
        with self._working():
            return self._scores(setup, self._fitted(setup))

    def append(self) -> Scores:
        """Scores of the rows that the train loader has more than before, at its end, by the fit of those before."""
        setup = self._loaded_with_queries()
        known = read_record(self.job.store)
        influence = setup.influence if setup.influence.is_fitted else self._loaded_fit(setup)
        if known is not None:  # until it has ended, the run has not
            write_record(self.job.store, known.with_call("score", finished=None))
        with self._working(), self._recorded("append") as found:
            scores = self._scores(setup, influence, append=True)
            found["rows"] = scores.shape[1]
        return scores

    def top(self, k: int | None = None) -> TopK:
        """Both ends of every query's ranking, from the same tiles. k: in place of the job's."""
        job, known = self.job, read_record(self.job.store)
        many = job.top.k if k is None else k
        if known is not None and "delete" in known.verbs:  # the loader may still have these rows
            from headwater.store.scores import Scores

            return Scores.open(job.store / SCORES).top(many)
        setup = self._loaded_with_queries()
        with self._working():
            influence = self._fitted(setup)
            if job.score.by_block:  # a run with blocks is another one to `influence.top`
                return self._scores(setup, influence).top(many)
            with self._recorded("score") as found:
                ends = influence.top(
                    setup.train,
                    setup.queries,
                    many,
                    unit=job.score.unit,
                    progress=self.progress,
                    store=job.store / SCORES,
                    memory=job.score.memory,
                    worker=self.worker,
                )
                found |= {"method": influence.method.describe(), "queries": len(ends.query_ids)}
            return ends

    def _loaded_with_queries(self) -> Setup:
        setup = self.job.load()
        _ = setup.queries  # refused before hours of fitting, not after
        return setup

    def _fitted(self, setup: Setup) -> Attributor:
        if setup.influence.is_fitted:
            return setup.influence
        known = read_record(self.job.store)
        if known is not None and "append" in known.verbs:  # the loader has more rows than were fitted
            return self._loaded_fit(setup)
        with self._recorded("fit") as found:
            folder = self.job.store / FIT
            fitted = setup.influence.fit(setup.train, store=folder, worker=self.worker, progress=self.progress)
            # For rows that are appended; a fit that is made of rows cannot be saved, and needs none.
            with suppress(AlreadySaved, InvalidSetting):
                fitted.save(self.job.store / FITTED)
            found |= {"method": fitted.method.describe(), "rows": fitted.n_train}
        return fitted

    def _loaded_fit(self, setup: Setup) -> Attributor:
        """Errors: InvalidSetting where there is none."""
        saved = self.job.store / FITTED
        if not saved.exists():
            raise InvalidSetting(f"There is no saved fit {saved}, whose scores could be appended to: score first.")
        return setup.influence.load(saved)

    def _scores(self, setup: Setup, influence: Attributor, append: bool = False) -> Scores:
        with self._recorded("score") as found:
            scores = influence.attribute(
                setup.train,
                setup.queries,
                unit=self.job.score.unit,
                by_block=self.job.score.by_block,
                store=self.job.store / SCORES,
                memory=self.job.score.memory,
                worker=self.worker,
                append=append,
                progress=self.progress,
            )
            found |= {"method": scores.method, "queries": scores.shape[0], "rows": scores.shape[1]}
        return scores

    @contextmanager
    def _working(self) -> Iterator[None]:
        with working_memory(bytes_of(self.job.fit.working_memory)):
            yield

    @contextmanager
    def _recorded(self, verb: str) -> Iterator[dict[str, Any]]:
        """The settings are beside the results from the first call on, and those of a call that was refused are not."""
        store, found = self.job.store, dict[str, Any]()
        known = read_record(store)
        settings = self.job.settings
        if verb == "fit" and known is not None:  # how it is scored is what was scored, until it is scored again
            settings |= {name: known.settings[name] for name in ("score", "top")}
        mine = Record(self.job.name, settings, verbs={} if known is None else known.verbs)
        facts = {"command": self.command, "worker": list(self.worker), "started": now()}
        if known is None:
            write_record(store, mine.with_call(verb, **facts, finished=None))
        yield found
        write_record(store, mine.with_call(verb, **facts, finished=now(), **found))


def delete_rows(folder: Path, names: Sequence[str], compact: bool, command: str = "") -> int:
    """Take train rows out of the scores in a folder, a job's or a run's, and say how many are out in all.

    names: ids as they are printed. compact: write the scores again without them; until then their bytes are there.
    Errors: InvalidInput, naming an id that is not there; as `headwater.store.runs.delete`.
    """
    from headwater.store import runs
    from headwater.store.scores import Scores

    known = read_record(folder)
    run = folder if known is None else folder / SCORES
    ids = {str(each): each for each in Scores.open(run).train_ids.tolist()}
    # Unknown names go on as they are: the store's own error names them.
    count = runs.delete(run, [ids.get(name, name) for name in names]) if names else 0
    if compact:
        runs.compact(run)
    if known is not None:
        write_record(folder, known.with_call("delete", command=command, finished=now(), rows=count))
    return count


# The file -------------------------------------------------------------------------------------------------------------


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidSetting(f"There is no job file {file}; headwater init {file} writes one.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{file} is not TOML: {error}") from error


def _from_values(values: Mapping[str, Any], file: Path) -> Job:
    _check_keys(values, ("setup", "store", *TABLES), file)
    for name in ("setup", "store"):
        if not isinstance(given := values.get(name, STORE), str) or not given:
            raise InvalidSetting(f"{file}: {name} is {given!r}; expected text.")
    if "setup" not in values:
        raise InvalidSetting(f'{file} has no setup; expected a line such as setup = "job.py:setup".')
    tables = {name: _table(file, name, make, values.get(name, {})) for name, make in TABLES.items()}
    folder = file.parent
    return Job(values["setup"], folder, folder / values.get("store", STORE), name=str(file), **tables)


def _table(file: Path, name: str, make: Callable[..., Any], values: object) -> Any:
    if not isinstance(values, dict):
        raise InvalidSetting(f"{file}: {name} is {values!r}; expected a table, [{name}].")
    _check_keys(values, [each.name for each in fields(TABLES[name])], file, f"[{name}] ")
    try:
        return make(**values)
    except InvalidSetting as error:
        raise InvalidSetting(f"{file}: [{name}] {error}") from error


def _check_keys(values: Mapping[str, Any], known: Any, file: Path, where: str = "") -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InvalidSetting(
                f"{file}: there is no key {where}{key}; did you mean {near}? There are {', '.join(known)}."
            )
