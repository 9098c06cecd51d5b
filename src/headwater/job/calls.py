"""The verbs on a job. Every one goes on where a stopped one ended, and does first what it needs: `score` fits, ..."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from headwater.arrays import working_memory
from headwater.attributor import Attributor
from headwater.errors import AlreadySaved, InvalidInput, InvalidSetting
from headwater.evaluate.bank import Bank, Plan, plan_subsets
from headwater.evaluate.calibration import Calibration
from headwater.evaluate.lds import Lds, lds
from headwater.evaluate.left_out import LeftOut, left_out, plan_left_out
from headwater.job.settings import CALIBRATED, Job
from headwater.report.retrained import left_out_section
from headwater.run.queries import Asked
from headwater.settings import bytes_of
from headwater.setup_file import Setup
from headwater.store.draft import write_whole
from headwater.store.identity import IDENTITY
from headwater.store.record import (
    CALIBRATE_AGAIN,
    CALIBRATING,
    CALIBRATION,
    EVALUATING,
    FIT,
    FITTED,
    LEAVING_OUT,
    SCORES,
    Record,
    now,
    read_record,
    write_record,
)
from headwater.store.scores import Scores, TopK
from headwater.store.seal import sealed, unsealed


@dataclass(frozen=True)
class Evaluation:
    """What models that were trained again say of the scores; `print` says it in words."""

    lds: Lds
    left_out: LeftOut | None = None
    """Of queries whose blamed rows were left out; None where nobody asked."""

    def __str__(self) -> str:
        return str(self.lds) if self.left_out is None else f"{self.lds}\n\n{self.left_out}"


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
            return self._scores(setup, self._damped(setup, self._fitted(setup)))

    def append(self) -> Scores:
        """Scores of the rows that the train loader has more than before, at its end, by the fit of those before."""
        setup = self._loaded_with_queries()
        known = read_record(self.job.store)
        influence = setup.influence if setup.influence.is_fitted else self._loaded_fit(setup)
        if known is not None:  # until it has ended, the run has not
            write_record(self.job.store, known.with_call("score", finished=None))
        with self._working(), self._recorded("append") as found:
            scores = self._scores(setup, self._damped(setup, influence), append=True)
            found["rows"] = scores.shape[1]
        return scores

    def top(self, k: int | None = None) -> TopK:
        """Both ends of every query's ranking, from the same tiles. k: in place of the job's."""
        job = self.job
        many = job.top.k if k is None else k
        if self._has_deleted():
            return Scores.open(job.scores).top(many)
        self._check_none_comes_back()
        setup = self._loaded_with_queries()
        with self._working():
            influence = self._damped(setup, self._fitted(setup))
            if job.score.by_block:  # a run with blocks is another one to `influence.top`
                return self._scores(setup, influence).top(many).attach(setup.rows, setup.queries)
            with self._recorded("score") as found:
                ends = influence.top(
                    setup.train,
                    setup.query_loader,
                    many,
                    unit=job.score.unit,
                    normalise=job.score.normalise,
                    explain=job.score.explain,
                    progress=self.progress,
                    store=job.scores,
                    memory=job.score.memory,
                    worker=self.worker,
                )
                found |= {"method": influence.method.describe(), "queries": len(ends.query_ids)}
            return ends.attach(setup.rows, setup.queries)

    def export(self, file: Path, k: int | None = None) -> Path:
        """All scores, or the `k` rows at each end of each query's ranking, as a table in a file, .parquet or .csv.

        Errors: InvalidSetting for another ending; MissingExtra; NotWritten.
        """
        from headwater.store import frames

        frames.check_ending(file)
        if k is not None:
            frames.export_top(self.top(k), file)
        elif self._has_deleted():
            frames.export(Scores.open(self.job.scores), file)
        else:
            setup = self._loaded_with_queries()
            with self._working():
                scores = self._scores(setup, self._damped(setup, self._fitted(setup)))
            frames.export(scores.attach(setup.rows, setup.queries), file)
        return file

    def calibrate(self) -> Calibration:
        """The damping that forecasts retrained models best, kept in the job's folder: `[fit] damping = "calibrated"`.

        Models that are trained already are not trained again. Errors: InvalidSetting for a setup without `retrain`.
        """
        setup = self._loaded_with_queries()
        _ = setup.retraining
        self._check_all_rows()
        with self._working():
            return self._calibration(setup, self._fitted(setup))

    def evaluate(self) -> Evaluation:
        """Do the scores forecast what retraining does? Judged by models that no damping was chosen on.

        Errors: InvalidSetting for a setup without `retrain`.
        """
        setup = self._loaded_with_queries()
        _ = setup.retraining
        self._check_all_rows()
        with self._working(), self._recorded("evaluate") as found:
            influence = self._damped(setup, self._fitted(setup))
            judged = self._judged(setup, influence, self._scores(setup, influence))
            found |= {"said": str(judged)}
        return judged

    def report(self, file: Path | None = None) -> Path:
        """One HTML page of the scores, what they are of, and what is known of them. Nothing is trained again for it.

        file: in place of the job's. Errors: NotWritten.
        """
        setup = self._loaded_with_queries()
        settings = self.job.report
        place = self.job.folder / settings.file if file is None else file
        with self._working(), self._recorded("report") as found:
            influence = self._damped(setup, self._fitted(setup))
            scores = self._scores(setup, influence)
            judged = self._judged_before(setup, influence, scores)
            written = influence.report(
                setup.train,
                setup.query_loader,
                place,
                rows=setup.rows,
                queries=setup.queries,
                k=settings.k,
                title=settings.title,
                lead=settings.lead,
                token_scores=settings.token_scores,
                predictions=setup.predictions,
                scores=scores,
                explain=self.job.score.explain,
                checks=[] if judged is None else [judged.lds],
                sections=[] if judged is None or judged.left_out is None else [left_out_section(judged.left_out)],
                made={"command": self.command or None, "job": self.job.name or None},
                progress=self.progress,
            )
            found |= {"file": str(written)}
        return written

    def _judged_before(self, setup: Setup, influence: Attributor, scores: Scores) -> Evaluation | None:
        """What `evaluate` found of these scores, if it was asked for: no model is trained now."""
        known = read_record(self.job.store)
        if setup.retrain is None or known is None or not known.verbs.get("evaluate", {}).get("finished"):
            return None
        if self._has_deleted():
            return None
        with suppress(Untrained, InvalidInput):  # or of a model that has changed since
            return self._judged(replace(setup, retrain=_untrained), influence, scores)
        return None

    def _judged(self, setup: Setup, influence: Attributor, scores: Scores) -> Evaluation:
        settings, matrix = self.job.retrain, scores[:]  # in the order of the loaders, as banks are
        if settings.leave_out and scores.is_ranking:
            raise InvalidSetting(
                f"leave_out compares what leaving rows out does with a forecast, and scores of unit {scores.unit!r} "
                "are none: set [retrain] leave_out = 0, or leave [score] normalise out."
            )
        if scores.unit == "influence":  # what is foretold is what removal does
            matrix = matrix / scores.n_train
        queries, rows = matrix.shape
        plan = plan_subsets(rows, subsets=settings.evaluate, repeated=settings.repeated, seed=settings.seed + 1)
        recipe = self._recipe(setup, influence)
        judged = lds(matrix, *self._bank(setup, EVALUATING, plan, queries, recipe))
        if not settings.leave_out:
            return Evaluation(judged)
        asked = np.random.default_rng(settings.seed).permutation(queries)[: settings.leave_out]
        removals = plan_left_out(matrix, asked, settings.removed, runs=settings.runs, seed=settings.seed)
        _, outputs = self._bank(setup, LEAVING_OUT, removals, queries, recipe)
        return Evaluation(judged, left_out(matrix, asked, settings.removed, outputs))

    def _calibration(self, setup: Setup, fitted: Attributor) -> Calibration:
        file, settings = self.job.store / CALIBRATION, self.job.retrain
        recipe = self._recipe(setup, fitted)
        normalise = self.job.score.normalise  # files from before have none, which is None
        chosen_for = {**recipe, "method": fitted.method.describe(), "number of models": settings.calibrate}
        chosen_for["normalise"] = normalise
        if file.is_file():
            known, _ = unsealed(file, remedy=CALIBRATE_AGAIN)
            changed = [name for name, value in chosen_for.items() if known["recipe"].get(name) != value]
            if changed:
                raise InvalidInput(f"{file} was chosen for another {' and '.join(changed)}. {CALIBRATE_AGAIN}")
            return Calibration.from_json(known["found"])
        with self._recorded("calibrate") as found:
            sizes = fitted.plan(setup.train, setup.query_loader)
            plan = plan_subsets(sizes.train_rows, subsets=settings.calibrate, repeated=0, seed=settings.seed)
            bank = self._bank(setup, CALIBRATING, plan, sizes.query_rows, recipe)
            damped = fitted.calibrate(
                setup.train, setup.query_loader, bank, normalise=normalise, progress=self.progress
            )
            chosen = damped.calibration
            assert chosen is not None
            write_whole(file, json.dumps(sealed({"recipe": chosen_for, "found": chosen.to_json()}), indent=1).encode())
            found |= {"said": str(chosen)}
        return chosen

    def _bank(self, setup: Setup, name: str, plan: Plan, queries: int, recipe: Mapping[str, Any]) -> Bank:
        """Models trained again as the plan says, those that are not there yet."""
        # A folder for each plan: that of leaving out depends on the scores, others on the job's settings.
        bank = Bank(self.job.store / name / f"{_digest(plan.keep, plan.seeds):08x}", plan, queries, recipe)
        return bank.fill(setup.retraining, progress=self.progress)

    def _recipe(self, setup: Setup, fitted: Attributor) -> dict[str, Any]:
        """What retrained models belong to. Training that was changed gives another model, too, as a rule."""
        known, rows = fitted.identity(), fitted.fitted_keys
        return {
            "setup": self.job.setup,
            "code": self.job.code(),
            "model": [known["architecture"], known["fingerprint"]],
            "train rows": None if rows is None else _digest(rows),
            "queries": _digest(Asked.of(fitted, fitted.query_rows(setup.query_loader)).keys),
        }

    def _damped(self, setup: Setup, fitted: Attributor) -> Attributor:
        """At the job's damping, which is calibrated first if it says so."""
        settings = self.job.fit
        if settings.damping == CALIBRATED:
            return fitted.calibrated(self._calibration(setup, fitted))
        return fitted if settings.amount is None else fitted.with_damping(settings.amount)

    def _has_deleted(self) -> bool:
        """Whether rows were taken out of the scores: the loader may still have them."""
        known = read_record(self.job.store)
        return known is not None and "delete" in known.verbs and self.job.scores.is_dir()

    def _check_none_comes_back(self) -> None:
        """Errors: InvalidSetting for scores at a new damping, where rows were taken out at the others."""
        known = read_record(self.job.store)
        if known is not None and "delete" in known.verbs and not self.job.scores.is_dir():
            raise InvalidSetting(
                f"Rows were deleted from the scores in {self.job.store}, but the fitted loader still has them: "
                f"scoring at another damping, in {self.job.scores.name}, would bring them back. Take them out of the "
                "loader, and fit and score in another --store; or score at all dampings before rows are deleted."
            )

    def _check_all_rows(self) -> None:
        """Errors: InvalidSetting where rows were taken out: `retrain` counts those of the loader."""
        if self._has_deleted():
            raise InvalidSetting(
                f"Rows were deleted from {self.job.scores}, and retrain(rows, seed) counts the rows of the loader. "
                "Take them out of the loader, and score in another --store."
            )

    def _loaded_with_queries(self) -> Setup:
        setup = self.job.load()
        _ = setup.query_loader  # refused before hours of fitting, not after
        return setup

    def _fitted(self, setup: Setup) -> Attributor:
        if setup.influence.is_fitted:
            return setup.influence
        known = read_record(self.job.store)
        if known is not None and "append" in known.verbs:  # the loader has more rows than were fitted
            return self._loaded_fit(setup)
        with self._recorded("fit") as found:
            folder = self.job.store / FIT
            anew = not (folder / IDENTITY).exists()
            fitted = setup.influence.fit(setup.train, store=folder, worker=self.worker, progress=self.progress)
            # For rows that are appended; a fit that is made of rows cannot be saved, and needs none.
            if anew:  # that of a fit that is no more
                rmtree(self.job.store / FITTED, ignore_errors=True)
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
        self._check_none_comes_back()
        with self._recorded("score") as found:
            scores = influence.attribute(
                setup.train,
                setup.query_loader,
                unit=self.job.score.unit,
                normalise=self.job.score.normalise,
                explain=self.job.score.explain,
                by_block=self.job.score.by_block,
                store=self.job.scores,
                memory=self.job.score.memory,
                worker=self.worker,
                append=append,
                progress=self.progress,
            )
            found |= {
                "folder": self.job.scores.name,
                "method": scores.method,
                "queries": scores.shape[0],
                "rows": scores.shape[1],
            }
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
            settings |= {name: known.settings[name] for name in ("score", "top") if name in known.settings}
        facts = {"command": self.command, "worker": list(self.worker), "started": now()}

        def write(known: Record | None, **more: object) -> None:
            mine = Record(self.job.name, settings, verbs={} if known is None else known.verbs)
            write_record(store, mine.with_call(verb, **facts, **more))

        if known is None:
            write(None, finished=None)
        yield found
        write(read_record(store), finished=now(), **found)  # verbs within this one have written theirs


def _digest(*arrays: np.ndarray) -> int:
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))


class Untrained(Exception):
    """A model that would have to be trained."""


def _untrained(rows: Any, seed: int) -> Any:
    raise Untrained


def delete_rows(folder: Path, names: Sequence[str], compact: bool, command: str = "") -> int:
    """Take train rows out of the scores in a folder, a job's or a run's, and say how many are out in all.

    names: ids as they are printed. compact: write the scores again without them; until then their bytes are there.
    Errors: InvalidInput, naming an id that is not there; as `headwater.store.runs.delete`.
    """
    from headwater.store import runs

    known = read_record(folder)
    # Of a job, at every damping that it was scored at.
    every = [folder] if known is None else sorted(file.parent for file in folder.glob(f"{SCORES}*/{IDENTITY}"))
    count = 0
    for run in every or [folder / SCORES]:
        ids = {str(each): each for each in Scores.open(run).train_ids.tolist()}
        # Unknown names go on as they are: the store's own error names them.
        count = runs.delete(run, [ids.get(name, name) for name in names]) if names else count
        if compact:
            runs.compact(run)
    if known is not None:
        write_record(folder, known.with_call("delete", command=command, finished=now(), rows=count))
    return count
