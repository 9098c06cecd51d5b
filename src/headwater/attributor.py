"""What users call: influence, and the verbs over loaders; each calls the function of its name in `run/`.

Tensors in and tensors out is `ComposableInfluence`, the contract, which knows nothing of runs, files and reports. What
a verb needs is imported when it is called, so that `import headwater.torch` brings no storage and no figures.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from headwater.arrays import as_pandas
from headwater.errors import InvalidInput, InvalidSetting
from headwater.influence import ComposableInfluence, in_own_precision
from headwater.loaders.batches import check_one
from headwater.loaders.places import located
from headwater.loaders.unlabelled import StandIns, with_stand_ins
from headwater.methods.damping import Damping
from headwater.rows import KeptQueryRows, KeptTrainRows, Rows, Runner, first_batch
from headwater.types import InfluenceMode, TensorType

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from headwater.evaluate.verification import Verification
    from headwater.report.figures import Section
    from headwater.report.trust import Check
    from headwater.run.attribute import MakeScorer
    from headwater.run.audit import Audit
    from headwater.run.calibrate import Calibration, Retrained
    from headwater.run.diagnosis import EffectiveDof
    from headwater.run.factors import KeptFactors
    from headwater.run.kept import KeptGradients
    from headwater.run.runners.environment import Worker
    from headwater.status import Status
    from headwater.store.diagnosis import Diagnosis
    from headwater.store.plan import Plan
    from headwater.store.scores import Scores, TopK


class Attributor(ComposableInfluence[TensorType]):
    """Influence of all train rows on all query rows: loaders in, labelled scores out."""

    @in_own_precision
    def fit(
        self,
        loader: Any,
        *others: object,
        progress: bool = False,
        runner: Runner | None = None,
        tile: int | None = None,
        store: str | os.PathLike[str] | None = None,
        worker: Worker = (0, 1),
    ) -> Self:
        """As `ComposableInfluence.fit`; and in a folder, by several workers, or of kept gradients (`gradients`).

        store: a folder for the sums over tiles of rows, so that the same call goes on where a stopped one ended, and
        processes on any machines that see the folder share the work. worker: (number from 0, how many), "number/many",
        or "env" for what torchrun, srun or a SLURM array says; each makes the same call and gets the same fit, to the
        last bit. Methods that keep sums over rows share them (hw.Direct, hw.Kfac, hw.Ekfac, hw.Trak, hw.LoGra, ...);
        those that read rows at every solve (hw.Cg, hw.Dual, ...) fit little, and each worker does. The loader gives its
        rows in one order. See `headwater.run.runners.shared`.
        Errors: InvalidInput for a folder of another fit; InvalidSetting for workers without a folder.
        """
        from headwater.run.runners import shared
        from headwater.run.runners.turns import check_worker

        check_one(others)
        worker = check_worker(worker, store, self.source.together)
        if store is not None:
            if runner is not None:
                raise InvalidSetting("store= has a runner of its own: give one of the two, store= or runner=.")
            runner, tile = shared.shared_folder(self, store, loader, worker), shared.ROWS
        return super().fit(loader, progress=progress, runner=runner, tile=tile)

    @property
    def calibration(self) -> Calibration | None:
        """How the damping was chosen, by `calibrate`; None for a damping that was given, or the method's default."""
        return self._calibration

    @property
    def status(self) -> Status:
        """What is known of this influence: spectrum, damping, what was cut off, solves. `print` shows a table."""
        from headwater.status import status_of

        return status_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep what `fit` found in a folder: JSON, and arrays as safetensors; no code, no pickle. For `load`.

        Errors: NotFittedError; StaleFit; AlreadySaved; NotWritten, of a full disk for example; InvalidSetting for
        hw.Lissa and hw.Astra, whose fit is made of train rows.
        """
        from headwater.store.folder import write_folder

        write_folder(path, *self._taken_apart())

    @in_own_precision
    def load(self, path: str | os.PathLike[str], loader: Iterable[object] | None = None) -> Self:
        """What `save` kept, in place of `fit`: for the same model, weights, blocks and method; damping is free.

        loader: the train rows that were fitted, for methods that read them at every solve (hw.Cg, hw.BlockKrylov,
        hw.Dual, hw.DataInf, hw.Trak(dimension=None)). Errors: NotSaved; DamagedFile, naming the file, where something
        is not as it was written; StaleFit if weights are others now; BlockMismatch; InvalidSetting for another method,
        loss or architecture; NotFittedError, later, if rows are needed and were not given; BatchMismatch, later, for
        other rows.
        """
        from headwater.store.folder import read_folder

        saved, arrays = read_folder(path)
        self._put_together(str(path), saved, arrays, loader)
        return self

    @in_own_precision
    def attribute(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        *,
        unit: str = "influence",
        by_block: bool = False,
        mode: InfluenceMode | str = InfluenceMode.Up,
        normalise: str | None = None,
        explain: str = "label",
        store: str | os.PathLike[str] | None = None,
        memory: int | str | None = None,
        worker: Worker = (0, 1),
        append: bool = False,
        query_error: float | None = None,
        query_rank: int | None = None,
        progress: bool = False,
    ) -> Scores:
        """Scores of all train rows on all query rows, labelled: every row goes through the model once.

        unit: "influence" (what `influences` gives), or "removal" (that over n_train: the predicted increase of the
        query's loss when the row is removed). by_block: keep each block's share. mode: "up", or "perturbation": values
        are then [query, train, *x_shape].
        normalise: directions instead of sizes, which rank rows and forecast nothing: "both", the cosine of query and
        train row in the metric of the inverse curvature; "train", the score over the root of the train row's influence
        on itself. Shares of blocks are those of the whole. A method that solves then solves for each train row. See
        `headwater.run.directions`. Warns: NoDirection for rows without a gradient, which score 0.
        explain: which label a query has, its own ("label": why is the model wrong about it, or right?) or what the
        model predicts ("prediction": why did it say this? Then query rows need no labels: x, (x, None), or batches of
        these), as `scores.explained` says then. Of a model that predicts
        numbers or text there is no such label: see docs/which-label.md for what to ask.

        store: a folder where finished tiles are kept, so that the same call goes on where a stopped one ended; scores
        then stay there, and are read when they are asked for. append: the loader has more rows than the finished run
        in the folder, at its end; only they are computed, and of rows that were not fitted scores say what adding them
        would do. memory: bytes that this process may hold in all (also "2GiB"); tiles are made as small as that takes.
        worker: as in `fit`, of processes that make the same call with the same store: each computes its share of the
        tiles, then what nobody else is at, and returns all scores.
        query_error: None, or which share of the length of each query's factor may be lost, by keeping it as the fewest
        outer products that leave no more: so many queries of a large model fit into memory. A score is then off by at
        most that share of the two lengths' product; `scores.diagnosis` has what was lost. query_rank: at most so many,
        whatever that loses, which the diagnosis says, too; more than a tenth is among its worries.
        Errors: InvalidInput for a folder of another run, or other rows; InvalidSetting for too little memory.
        """
        from headwater.run.attribute import Storage, attribute
        from headwater.run.shortened import Shortening

        storage = Storage.of(self, store, memory, worker, append)
        with self._recorded():
            train = self._scored(train_loader)
            query = self._explained(query_loader, train, explain)
            return attribute(
                self,
                train,
                query,
                unit=unit,
                by_block=by_block,
                mode=mode,
                progress=progress,
                storage=storage,
                explain=explain,
                scorer=self._own_scorer,
                short=Shortening.of(query_error, query_rank),
                normalise=normalise,
            )

    @in_own_precision
    def plan(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        *,
        by_block: bool = False,
        memory: int | str | None = None,
    ) -> Plan:
        """Which tiles `fit(store=)` and `attribute(store=, memory=)` are made of, before anything is computed.

        Plain data, the same for any number of workers; `print` says how many, `save` keeps it as JSON. Loaders are read
        once to count their rows; kept gradients stand for the train loader, kept factors do not for queries.
        Errors: InvalidSetting for too little memory.
        """
        from headwater.run.plan import plan

        with located():
            train, query = self._scored(train_loader), self.query_rows(query_loader)
            return plan(self, train, query, by_block=by_block, memory=memory)

    @in_own_precision
    def top(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        k: int = 5,
        *,
        unit: str = "influence",
        normalise: str | None = None,
        explain: str = "label",
        store: str | os.PathLike[str] | None = None,
        memory: int | str | None = None,
        worker: Worker = (0, 1),
        append: bool = False,
        query_error: float | None = None,
        progress: bool = False,
        queries_as: str = "each",
        groups: Sequence[Any] | Mapping[Any, Any] | None = None,
        of: str = "sum",
    ) -> TopK:
        """The k most helpful and the k most harmful train rows of each query, without the matrix of scores in memory.

        normalise, explain, store, memory, worker, append, query_error: as in `attribute`; the folder is one run for
        both. Directions of groups, and of all queries as one, are those of the "mean".

        queries_as: "each" query by itself, or all of them as one, their "mean" or "sum", which is then its name.
        groups: a label for each train row (by source, author, ...), in the loader's order, or a mapping from what rows
        are called; the result then names groups, by the "sum" or the "mean" (`of`) of their rows' scores.
        Errors: InvalidSetting; InvalidInput for labels that do not fit the rows.
        """
        from headwater.run.attribute import Storage, top
        from headwater.run.ranking import Ranking
        from headwater.run.shortened import Shortening

        storage = Storage.of(self, store, memory, worker, append)
        ranking = Ranking(k, queries_as, groups, of)
        with self._recorded():
            train = self._scored(train_loader)
            query = self._explained(query_loader, train, explain)
            return top(
                self,
                train,
                query,
                k,
                unit=unit,
                progress=progress,
                storage=storage,
                ranking=ranking,
                explain=explain,
                scorer=self._own_scorer,
                short=Shortening.of(query_error, None),
                normalise=normalise,
            )

    @in_own_precision
    def self_influence(
        self,
        train_loader: Iterable[object],
        *,
        store: str | os.PathLike[str] | None = None,
        memory: int | str | None = None,
        worker: Worker = (0, 1),
        append: bool = False,
        progress: bool = False,
    ) -> np.ndarray:
        """<Op g_n, g_n> for each row, without the N x N matrix: [n].

        store, memory, worker, append: as in `attribute`.
        """
        from headwater.run.attribute import Storage, self_influence

        storage = Storage.of(self, store, memory, worker, append)
        with self._recorded():
            return self_influence(self, self._scored(train_loader), progress=progress, storage=storage)

    @property
    def _own_scorer(self) -> MakeScorer | None:
        """What computes scores in place of operators and gradients; None where these do."""
        return None

    def _scored(self, loader: Iterable[object]) -> Rows:
        """Train rows that need only be scored: a loader's, or kept gradients. Errors: as `KeptGradients`."""
        if isinstance(loader, KeptTrainRows):
            self.check_weights()
            return loader.train_rows(self)
        return self.train_rows(loader)

    def _explained(self, loader: Iterable[object], train: Rows, explain: str) -> Iterable[object]:
        """Query rows that need only be scored: a loader's, or kept factors. Errors: as `KeptFactors`."""
        if isinstance(loader, KeptQueryRows):
            return loader.query_rows(self)
        return self.query_rows(self._labelled(loader, self._stand_ins(train), explain))

    def _labelled(self, loader: Any, labels: StandIns, explain: str) -> Any:
        """The query loader, with labels that stand in for those that the model will say, where a row has none."""
        if explain != "prediction" or isinstance(loader, (Rows, KeptQueryRows)):
            return loader
        return with_stand_ins(as_pandas(loader), labels, self._form)

    def _stand_ins(self, train: Rows) -> StandIns:
        """Labels like the first train row's."""
        return StandIns(lambda: self._first_label(train))

    def _first_label(self, train: Rows) -> Any:
        """Errors: InvalidInput where nothing shows what labels look like."""
        if train.is_kept:
            raise InvalidInput(
                "The query rows have no labels, and kept gradients do not show what labels look like: give the train "
                "rows' loader, or the query rows any label."
            )
        return self.source.labels_of(first_batch(self.provider, train).y)

    @in_own_precision
    def factors(
        self,
        query_loader: Iterable[object],
        *,
        store: str | os.PathLike[str],
        dtype: str = "float32",
        worker: Worker = (0, 1),
        progress: bool = False,
    ) -> KeptFactors:
        """The query rows' factors, Op(gradient), kept in a folder: they stand for the loader in `attribute` and `top`.

        They are good for this fit at this damping. dtype: as in `gradients`. The same call goes on where a stopped one
        ended. worker: (number from 0, how many) of processes that make the same call. Errors: NotFittedError;
        StaleFit; InvalidSetting; InvalidInput for a folder of other factors, naming what differs; NotWritten.
        """
        from headwater.run.factors import keep_factors

        with self._recorded():
            return keep_factors(self, query_loader, store=store, dtype=dtype, worker=worker, progress=progress)

    @in_own_precision
    def gradients(
        self,
        train_loader: Iterable[object],
        *,
        store: str | os.PathLike[str],
        form: str = "auto",
        rank: int | None = None,
        dtype: str = "float32",
        worker: Worker = (0, 1),
        progress: bool = False,
    ) -> KeptGradients:
        """The train rows' gradients, kept in a folder, where they stand for the loader: one pass, and none afterwards.

        form: "outer" (outer products of inputs and output-gradients, as they come), "dense", "low_rank" (each row's
        gradient of a layer cut to `rank` by its singular values), "projected" (what a fitted projecting method sees),
        or "auto": projected where the method projects, else of the first two the smaller. dtype: "float32", "float64",
        "bfloat16", or "int8" with a scale for each row and array. The method need not be fitted, unless it projects.
        A fit takes them too, where it asks nothing else of rows; see docs/scale.md.

        The same call goes on where a stopped one ended. worker: (number from 0, how many) of processes that make the
        same call. Errors: InvalidSetting; InvalidInput for a folder of other gradients, naming what differs;
        NotWritten.
        """
        from headwater.run.kept import keep_gradients

        with located():
            self.look(train_loader)
            return keep_gradients(
                self, train_loader, store=store, form=form, rank=rank, dtype=dtype, worker=worker, progress=progress
            )

    @in_own_precision
    def removal(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        groups: Iterable[object] | None = None,
        *,
        explain: str = "label",
        store: str | os.PathLike[str] | None = None,
        worker: Worker = (0, 1),
        progress: bool = False,
    ) -> np.ndarray:
        """The rise of each query's loss when a row, or a group, is removed: [q, n] or [q, groups].

        Score / n_train, and what the removed rows' own curvature adds: one Newton step without them. groups: for each
        its rows' positions in the loader, or ids where batches carry them. explain, store, worker: as in `attribute`;
        of groups, those that are complete are kept. See `headwater.run.removal`.
        """
        from headwater.run.attribute import Storage
        from headwater.run.removal import removal

        storage = Storage.of(self, store, None, worker)
        with self._recorded():
            train = self.train_rows(train_loader)
            query = self.query_rows(self._labelled(query_loader, self._stand_ins(train), explain))
            return removal(self, train, query, groups, progress=progress, storage=storage, explain=explain)

    @in_own_precision
    def calibrate(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object] | None = None,
        bank: Retrained | None = None,
        *,
        dampings: Sequence[Damping] | None = None,
        by_block: bool = False,
        subsets: int = 10,
        seed: int = 0,
        progress: bool = False,
        normalise: str | None = None,
    ) -> Self:
        """The same influence at the damping that forecasts retraining best; `calibration` says how sure that is.

        bank: models retrained on subsets of the train rows: a `headwater.evaluate.Bank`, masks and outputs (keep
        [m, n], outputs [m, runs, q]), or a function (indices of rows kept, seed) -> outputs [q], which is then called
        for `subsets` random halves of the rows. Outputs are what is explained (losses, unless there is a measurement)
        of the rows of query_loader. Ten models are enough to see where the optimum is. None: without retraining, by
        the evidence of the Laplace approximation (no query_loader), which knows less and is labelled so; it takes the
        loss for minus a log-likelihood.

        dampings: the path, all relative or all absolute; None for seven decades of mean eigenvalues. by_block: a
        damping for each block, kept only if subsets that were not looked at speak for it. normalise: the damping is for
        directions, as in `attribute`; there is a pass over the train rows for each damping then. Derivations are in
        `headwater.run.calibrate`. Errors: InvalidInput for a bank of other rows or queries, and for queries without a
        bank; InvalidSetting for a method without damping.
        """
        from headwater.run.calibrate import calibrate

        with located():
            train = self.train_rows(train_loader)
            query = None if query_loader is None else self.query_rows(query_loader)
            found = calibrate(
                self,
                train,
                query,
                bank,
                dampings=dampings,
                by_block=by_block,
                subsets=subsets,
                seed=seed,
                progress=progress,
                normalise=normalise,
            )
        return self.calibrated(found)

    def calibrated(self, found: Calibration) -> Self:
        """The same influence at a damping that `calibrate` chose before. Errors: as `with_damping`."""
        from headwater.run.calibrate import in_unit

        chosen = {name: in_unit(amount, found.unit) for name, amount in found.chosen.items()}
        return self.with_damping(chosen)._changed(_calibration=found)

    @in_own_precision
    def verify(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        *,
        rows: int = 8,
        queries: int = 4,
        seed: int = 0,
        tolerance: float | None = None,
        progress: bool = False,
    ) -> Verification:
        """Recompute random pairs the slow plain way, on this model and these rows, and compare; `print` shows a table.

        rows: train rows for each of the `queries`. tolerance: how far scores may be off, relative to the largest; None
        for what the dtype allows. train_loader gives the rows that were fitted. See `headwater.run.verify`.
        """
        from headwater.run.verify import verify

        with located():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return verify(
                self, train, query, rows=rows, queries=queries, seed=seed, tolerance=tolerance, progress=progress
            )

    @in_own_precision
    def audit(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        *,
        queries: int = 20,
        k: int = 10,
        level: float = 0.9,
        tolerance: float | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Audit:
        """How far an approximation is from the exact damped inverse of what it approximates; `print` shows a table.

        Random queries are solved exactly and scored against all train rows; what is found bounds the error for
        one more query with probability `level`, whatever the distribution. k: of top-k overlap. tolerance: relative
        residual of the exact solves, None for what the dtype allows. train_loader gives the rows that were fitted.
        Errors: InvalidSetting for a method that approximates no inverse. See `headwater.run.audit`.
        """
        from headwater.run.audit import audit

        with located():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return audit(
                self,
                train,
                query,
                queries=queries,
                k=k,
                level=level,
                tolerance=tolerance,
                seed=seed,
                progress=progress,
            )

    @in_own_precision
    def diagnose(self, train_loader: Iterable[object], *, progress: bool = False) -> Diagnosis:
        """What gives reason to doubt the scores: weights that are no minimum, negative curvature, missed solves, ...

        What `attribute` tells on the way (`scores.diagnosis`), and what costs more: a pass over the train rows,
        products for the ends of the spectrum, and for effective degrees of freedom. Solves are those of the last call.
        Errors: NotFittedError; StaleFit.
        """
        from headwater.run.diagnosis import diagnose

        with located():
            return diagnose(self, self.train_rows(train_loader), progress=progress)

    @in_own_precision
    def report(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        path: str | os.PathLike[str],
        *,
        rows: Any = None,
        queries: Any = None,
        k: int = 5,
        explain: str = "label",
        normalise: str | None = None,
        title: str | None = None,
        lead: str = "",
        groups: Any = None,
        predictions: Any = None,
        scores: Scores | None = None,
        checks: Sequence[Check] = (),
        sections: Sequence[Section] = (),
        self_influence: bool = True,
        verify: bool | None = None,
        token_scores: bool | None = None,
        made: Mapping[str, object] | None = None,
        progress: bool = False,
    ) -> Path:
        """One HTML page: for each query the rows behind it, who influences most, suspicious rows, what to trust.

        rows, queries, k, title, groups, predictions, checks, made: as in `Scores.report`; rows and queries of None are
        shown as the loaders give them: data frames, entries of data sets that are dicts, images, numbers. explain,
        normalise: as in `attribute`. scores: of these loaders, if they are there already; else they are computed, as
        forecasts of removal where the method makes these. lead: what stands below the title. sections: of your own
        (`headwater.report.Section`).
        self_influence: whether each train row's is computed too, in the pass that takes their losses: of a method that
        solves, a solve for each. verify: whether a dozen random pairs are computed again the slow plain way; None
        where that is quick, and then beside an exact inverse only if that is dense. token_scores: whether each token of
        a language model's row has the colour of what it adds to the score, beside the queries that are shown
        (`tokenizer=` makes tokens words again); None where that is quick. Errors: as `attribute` and `Scores.report`;
        UnsupportedModel and InvalidSetting for token scores that were asked for, where tokens have none, and
        InvalidInput where the loaders lack their rows.
        """
        from headwater.report.cases import TITLE, Known
        from headwater.run.report import described_by, report

        own, own_rows = queries is None, rows is None  # then what the model says can be compared with their labels
        train_loader, query_loader = as_pandas(train_loader), as_pandas(query_loader)  # once for all who read them
        rows = described_by(train_loader) if rows is None else rows
        queries = described_by(query_loader) if queries is None else queries
        known = Known(
            rows, queries, k, title or TITLE, lead, groups, predictions, checks=checks, made=made, sections=sections
        )
        options: dict[str, Any] = {"self_influence": self_influence, "verified": verify, "progress": progress}
        options |= {"explain": explain, "own_rows": own_rows, "own_labels": own, "normalise": normalise}
        options |= {"token_scores": token_scores}
        with located():
            train = self._scored(train_loader)
            options["stand_ins"] = labels = self._stand_ins(train)
            query = self.query_rows(self._labelled(query_loader, labels, explain))
            return report(self, train, query, path, known, scores=scores, **options)

    @in_own_precision
    def effective_dof(
        self, dampings: Sequence[Damping] | None = None, *, probes: int = 8, seed: int = 0
    ) -> OrderedDict[str, EffectiveDof]:
        """tr(C (C + damping)^-1) of each block, and its standard error: how many directions the data decide.

        Exact (standard error zero) where the method's curvature has a spectrum; by random vectors and Lanczos where
        there are only products (`probes` of them, two dozen products each). dampings: in place of the influence's own,
        each absolute or relative; values and errors are then arrays [dampings], from one decomposition. Of a low-rank
        or projected method it is that of what the method inverts. NaN where the damped curvature is not positive.
        Errors: NotFittedError; StaleFit; InvalidSetting for a method that inverts no curvature.
        """
        from headwater.run.diagnosis import effective_dof

        return effective_dof(self, dampings, probes=probes, seed=seed)
