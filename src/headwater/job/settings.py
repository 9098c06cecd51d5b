"""A job: one small file that says what to work on, how, and where the results go.

setup = "job.py:setup"    a function that returns influence, train and query
store = "results"         a folder, for all that is found

[fit]                     and [score], [top], [report], [retrain]: see their classes
"""

from __future__ import annotations

import tomllib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headwater.errors import InvalidSetting
from headwater.gradients.provider import EXPLAIN
from headwater.methods.damping import Damping, relative
from headwater.settings import bytes_of, check_whole, check_word
from headwater.setup_file import Setup, load_setup, split_target
from headwater.store.record import scores_at

STORE = "results"
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class FitSettings:
    """[fit]"""

    working_memory: str = "64MiB"
    """For the temporary arrays of a batch, in all verbs; to rounding, the numbers do not depend on it."""

    damping: float | str | None = None
    """In place of the setup's: a number, "0.1 relative" (in mean eigenvalues), or "calibrated" by retrained models."""

    def __post_init__(self) -> None:
        bytes_of(self.working_memory, "working_memory")
        _ = self.amount

    @property
    def amount(self) -> Damping | None:
        """The damping as methods take it; None for the setup's own, or one that is calibrated first."""
        if self.damping is None or self.damping == CALIBRATED:
            return None
        number, _, unit = str(self.damping).partition(" ")
        try:
            found = float(number)
        except ValueError:
            found = -1.0
        if found < 0 or isinstance(self.damping, bool) or unit not in ("", "relative"):
            raise InvalidSetting(
                f'damping is {self.damping!r}; expected a number of at least 0, "0.1 relative" or "{CALIBRATED}".'
            )
        return relative(found) if unit else found


@dataclass(frozen=True)
class ScoreSettings:
    """[score]"""

    unit: str = "influence"
    """"influence", or "removal": the predicted rise of the query's loss when the row is removed."""
    normalise: str | None = None
    """Directions instead of sizes, which only rank: "both" sides, or that of the "train" rows."""
    explain: str = "label"
    """Whose label a query has: its own ("label"), or the model's ("prediction", for which queries need none)."""
    by_block: bool = False
    """Keep each block's share."""
    memory: str | int | None = None
    """Bytes that a process may hold in all, "2GiB"; None for no budget."""

    def __post_init__(self) -> None:
        if self.memory is not None:
            bytes_of(self.memory)
        check_word("unit", self.unit, ("influence", "removal"))
        check_word("explain", self.explain, EXPLAIN)
        _ = self.scored_in
        if not isinstance(self.by_block, bool):
            raise InvalidSetting(f"by_block is {self.by_block!r}; expected true or false.")

    @property
    def scored_in(self) -> str:
        """The unit of the scores. Errors: InvalidSetting."""
        from headwater.store.score_matrix import unit_of

        return unit_of(self.unit, self.normalise)


@dataclass(frozen=True)
class TopSettings:
    """[top]"""

    k: int = 10
    """Rows at each end of a query's ranking."""

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)


@dataclass(frozen=True)
class ReportSettings:
    """[report]"""

    file: str = "report.html"
    """The page, relative to the job file."""
    title: str | None = None
    """None for one that fits any job."""
    lead: str = ""
    """What stands below it."""
    k: int = 5
    """Rows at each end of a query's ranking."""
    token_scores: bool | None = None
    """Whether the tokens of a language model's rows are coloured by what they add; None where that is quick."""

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)
        if self.token_scores is not None and not isinstance(self.token_scores, bool):
            raise InvalidSetting(f"token_scores is {self.token_scores!r}; expected true or false.")
        for name, given in (("file", self.file), ("title", self.title or "-")):
            if not isinstance(given, str) or not given:
                raise InvalidSetting(f"{name} is {given!r}; expected text.")


@dataclass(frozen=True)
class RetrainSettings:
    """[retrain]: models trained again on random halves of the rows, by the setup's `retrain`."""

    calibrate: int = 10
    """How many choose the damping."""
    evaluate: int = 20
    """How many others judge the scores."""
    repeated: int = 5
    """Of these, how many are trained twice, to see how far retraining agrees with itself."""
    leave_out: int = 0
    """For how many queries, at random, the rows blamed for them are left out, and as many at random."""
    removed: int = 20
    """Rows left out for each."""
    runs: int = 2
    """Of each, with seeds of their own."""
    seed: int = 0

    def __post_init__(self) -> None:
        leasts = {"calibrate": 4, "evaluate": 4, "repeated": 0, "leave_out": 0, "removed": 1, "runs": 1, "seed": 0}
        for name, least in leasts.items():
            check_whole(name, asdict(self)[name], least)
        if self.repeated > self.evaluate:
            raise InvalidSetting(f"repeated is {self.repeated}; expected at most evaluate, {self.evaluate}.")


TABLES = {
    "fit": FitSettings,
    "score": ScoreSettings,
    "top": TopSettings,
    "report": ReportSettings,
    "retrain": RetrainSettings,
}


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
    report: ReportSettings = field(default_factory=ReportSettings)
    retrain: RetrainSettings = field(default_factory=RetrainSettings)
    name: str = ""
    """What was read: the job file, or the setup."""
    given: Callable[[], Setup] | None = None
    """In place of running `setup`, which is then what it is called."""

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
    def tables(self) -> list[tuple[str, Any]]:
        """In the order of TABLES."""
        return list(zip(TABLES, (self.fit, self.score, self.top, self.report, self.retrain), strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, as they are written beside the results."""
        return {"setup": self.setup, "store": str(self.store), **{name: asdict(each) for name, each in self.tables}}

    @property
    def scores(self) -> Path:
        """The folder of the scores at the job's damping."""
        return self.store / scores_at(self.fit.damping)

    def code(self) -> int | None:
        """Of the setup's file, a checksum; None for a module."""
        place, _ = split_target(self.setup)
        return zlib.crc32((self.folder / place).read_bytes()) if place.endswith(".py") else None

    def load(self) -> Setup:
        """Run the user's code. Errors: as `load_setup`."""
        return load_setup(self.setup, self.folder) if self.given is None else self.given()


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
