"""Damping, chosen by measuring: see `ComposableInfluence.calibrate`.

The forecast of a subset is minus the summed scores of its rows, and scores are linear in train gradients, as the
operator sees them. So those of each subset are summed first, in one pass over the train rows, and every damping on the
path takes the queries' side alone: m subsets cost what m train rows would.

Without retraining, the damping is a prior precision: with N rows and weights w, the evidence of the Laplace
approximation is stationary where damping = tr(C (C + damping)^-1) / (N |w|^2), for each block by itself. It knows the
fit and the curvature, and nothing of the training. It takes the loss for minus a log-likelihood in nats: another unit
(a loss times ten, squares of errors whose variance is not one) gives another damping. The leaderboard shows where it
lies beside what retraining chooses.

Sources: MacKay 1992 (evidence); Immer et al. 2021, arXiv 2104.04975 (with the GGN of networks).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import Array, device, namespace, to_numpy, transpose
from headwater.errors import HeadwaterError, InvalidInput, InvalidSetting, NotConverged, SingularOperator
from headwater.evaluate.bank import Bank, check_rows, plan_subsets
from headwater.evaluate.calibration import EVIDENCE, choose_damping
from headwater.evaluate.calibration import Calibration as Calibration
from headwater.evaluate.checks import mean_over_runs, places, query_outputs, retrained_outputs
from headwater.evaluate.correlation import mean_correlation, spearman
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.methods.damping import Damping, Relative, relative
from headwater.operators.iterative import recorded_solves
from headwater.rows import Each, PlacedBatch, Total, Visitor
from headwater.run.directions import check_inverse, inverse_lengths
from headwater.run.rows import FittedRows, distinct, sweep_rows
from headwater.settings import check_word
from headwater.store.score_matrix import NORMALISE

PATH = tuple(relative(float(amount)) for amount in np.round(np.logspace(-3, 4, 15), 10))
"""Seven decades of mean eigenvalues, two dampings in each."""
WORSE, IN_A_ROW = 0.1, 2
"""Dampings that are solved for are tried from the largest down, until so many in a row are so much below the best."""

Measure = Callable[[np.ndarray, int], Any]
Retrained = Bank | tuple[Any, Any] | Measure


def calibrate(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object] | None,
    bank: Retrained | None,
    *,
    dampings: Sequence[Damping] | None,
    by_block: bool,
    subsets: int,
    seed: int,
    progress: bool,
    normalise: str | None = None,
) -> Calibration:
    """See `ComposableInfluence.calibrate`.

    Errors: InvalidSetting; InvalidInput for outputs of other rows or queries than the loaders have.
    """
    influence.ready()
    if not influence.method.predicts_removal:
        raise InvalidSetting(f"{influence.method.describe()} has no damping to calibrate.")
    path, unit = _path(dampings)
    if normalise is not None:
        check_word("normalise", normalise, tuple(NORMALISE))
        if by_block or bank is None:
            raise InvalidSetting(
                "normalise= divides by lengths over all blocks, at one damping for all, and the evidence knows no "
                "ranking: give a bank, and leave by_block out."
            )
    if bank is None:
        if query_loader is not None:
            raise InvalidInput(
                "There are queries, and no bank of retrained models: pass it, as bank=; or the train loader alone, to "
                "choose by the evidence, which takes no queries and knows less."
            )
        return _by_evidence(influence, path, unit)
    if query_loader is None:
        raise InvalidInput("query_loader is None; the bank's outputs are those of queries: pass their loader.")
    if not isinstance(bank, Bank) and callable(bank):
        rows = len(_ids(influence, train_loader, progress))
        lengths = Total[PlacedBatch, int](lambda piece: len(piece.batch))
        asked = sweep_rows(influence.provider, query_loader, lengths, "queries", progress, "query")
        bank = _retrain(bank, rows, asked, subsets, seed)
    keep, outputs = _retrained(bank)
    options: dict[str, Any] = {"dampings": dampings, "directions": normalise is not None, "progress": progress}
    along = path_forecasts(influence, train_loader, query_loader, keep, outputs, **options)
    found = choose_damping(along.path, along.forecasts, outputs, unit=along.unit, by_block=by_block, seed=seed)
    ranked = () if normalise is None else (f"for directions, normalise={normalise!r}",)
    return replace(found, notes=(*found.notes, *along.notes, *ranked))


@dataclass(frozen=True, eq=False)
class PathForecasts:
    """What each damping on a path forecasts."""

    path: list[float]
    unit: str
    forecasts: dict[str, np.ndarray]
    """By block: [k, m, q], NaN where a damping was not tried."""
    notes: list[str]
    """Why not."""


def path_forecasts(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    keep: np.ndarray,
    outputs: np.ndarray,
    *,
    dampings: Sequence[Damping] | None = None,
    directions: bool = False,
    progress: bool = False,
) -> PathForecasts:
    """Forecasts of subsets keep [m, n], along the path. outputs, of the first subsets or all, say where to stop.

    directions: each train row's score is over its length at that damping, for which there is a pass over the train rows
    at each of them. (A query's own length is the same for all subsets.)
    Errors: InvalidInput for subsets of other rows, or outputs of other queries.
    """
    path, unit = _path(dampings)
    ids = _ids(influence, train_loader, progress)
    if keep.shape[1] != len(ids):
        raise InvalidInput(f"The bank's subsets are of {keep.shape[1]} rows, and the train loader has {len(ids)}.")
    kept = keep[:, places(ids)]
    plain = None if directions else _subset_sums(influence, train_loader, kept, progress)

    def right(damped: ComposableInfluence) -> dict[str, Array]:
        if plain is not None:
            return plain
        check_inverse(damped)
        return _subset_sums(damped, train_loader, kept, progress, directions)

    left = _queries(influence, query_loader, progress)
    rows = next(iter(left.values())).rows
    if outputs.shape[2] != rows:
        raise InvalidInput(f"The bank has outputs of {outputs.shape[2]} queries, and the query loader has {rows}.")
    forecasts, notes = _forecasts(influence, path, unit, left, right, outputs, len(keep))
    return PathForecasts(path, unit, forecasts, notes)


def _path(dampings: Sequence[Damping] | None) -> tuple[list[float], str]:
    """Amounts, ascending, and their unit. Errors: InvalidSetting for a path of both kinds, or of fewer than two."""
    given = list(PATH if dampings is None else dampings)
    kinds = {isinstance(damping, Relative) for damping in given}
    if len(kinds) != 1:
        raise InvalidSetting(f"dampings are {given}; expected hw.relative(...) all, or numbers all, and two at least.")
    amounts = sorted(d.factor if isinstance(d, Relative) else float(d) for d in given)
    if len(set(amounts)) < max(2, len(amounts)) or not (amounts[0] > 0 and np.isfinite(amounts[-1])):
        raise InvalidSetting(f"dampings are {given}; expected two or more, all above zero and each of them once.")
    return amounts, "mean eigenvalues" if kinds == {True} else "absolute"


def in_unit(amount: float, unit: str) -> Damping:
    """A damping of that amount."""
    return relative(amount) if unit == "mean eigenvalues" else amount


# What was retrained ---------------------------------------------------------------------------------------------------


def _retrain(measure: Measure, rows: int, queries: int, subsets: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """keep [m, n] and outputs [m, 1, q] of random halves of the rows.

    Errors: ShapeMismatch, NonFiniteValue, BatchMismatch.
    """
    check_rows(measure, rows)
    plan = plan_subsets(rows, subsets=subsets, repeated=0, seed=seed)
    # One run each: more subsets say more about a damping than more runs of fewer.
    outputs = np.empty((subsets, 1, queries))
    for subset, kept in enumerate(plan.keep):
        found = measure(np.flatnonzero(kept), int(plan.seeds[subset, 0]))
        outputs[subset, 0] = query_outputs(found, queries, f"outputs of retraining on subset {subset}")
    return plan.keep, outputs


def _retrained(bank: Bank | tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """keep [m, n] and outputs [m, r, q]."""
    kept, runs, _ = retrained_outputs(*bank)
    return kept, runs


# Forecasts ------------------------------------------------------------------------------------------------------------


def _ids(influence: ComposableInfluence, loader: Iterable[object], progress: bool) -> np.ndarray:
    """Of the train rows, in the loader's order."""
    names = sweep_rows(influence.provider, loader, FittedRows(influence, forecast=True), "train rows", progress)
    return distinct(names, "train")


def _subset_sums(
    influence: ComposableInfluence,
    loader: Iterable[object],
    keep: np.ndarray,
    progress: bool,
    directions: bool = False,
) -> dict[str, Array]:
    """Summed gradients of each subset, as the operators see them, by block: [m, D]; keep in the loader's order."""
    sums = SubsetSums(influence, keep, directions)
    return sweep_rows(influence.provider, loader, sums, "sums over subsets", progress)


@dataclass(frozen=True, eq=False)
class SubsetSums(Visitor[PlacedBatch, dict[str, Array], dict[str, Array]]):
    """See `_subset_sums`."""

    influence: ComposableInfluence
    keep: np.ndarray
    directions: bool = False
    """Whether each row counts with one over its length, at the influence's damping."""

    def of(self, item: PlacedBatch) -> dict[str, Array]:
        found: dict[str, Array] = {}
        operators, rows = self.influence.block_mapper.operators, slice(item.start, item.start + len(item.batch))
        grads = self.influence.provider.grads(item.batch)
        shares = self.keep[:, rows].astype(np.float64)
        if self.directions:
            shares = shares * inverse_lengths(self.influence, grads)
        for name, value in grads.items():
            xp, like = namespace(value.like), value.like
            # Sums over each subset in the same pass: [m, D] numbers, and no score of a single row.
            mask = xp.asarray(shares, device=device(like))
            found[name] = operators[name].seen(value).combine(xp.astype(mask, like.dtype))
        return found

    def merge(self, one: dict[str, Array], other: dict[str, Array]) -> dict[str, Array]:
        for name, share in other.items():
            one[name] = one[name] + share
        return one


def _queries(influence: ComposableInfluence, loader: Iterable[object], progress: bool) -> dict[str, BlockGradient]:
    """Gradients of the queries by block, in the order of the data."""
    provider = influence.provider
    each = Each[PlacedBatch, tuple[np.ndarray, BlockGradients]](
        lambda p: (p.names, provider.grads(p.batch, query=True))
    )
    ids, grads = zip(*sweep_rows(provider, loader, each, "query gradients", progress, "query"), strict=True)
    # The bank has outputs in the order of its data; a loader with ids may give another.
    order = np.argsort(places(distinct(np.concatenate(ids), "query")))
    return {name: _reordered(stack([piece[name] for piece in grads]), order) for name in grads[0]}


def _reordered(queries: BlockGradient, order: np.ndarray) -> BlockGradient:
    return queries.take(namespace(queries.like).asarray(order, device=device(queries.like)))


def _forecasts(
    influence: ComposableInfluence,
    path: Sequence[float],
    unit: str,
    left: Mapping[str, BlockGradient],
    right: Callable[[ComposableInfluence], Mapping[str, Array]],
    outputs: np.ndarray,
    subsets: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Of each block: [k, m, q], NaN where a damping was left out; and why any was."""
    found = {name: np.full((len(path), subsets, outputs.shape[2]), np.nan) for name in left}
    truth = mean_over_runs(outputs)
    best, worse, solved, missed = -1.0, 0, False, []
    # From the largest damping down: solves grow dearer, and one may stop early.
    for k in reversed(range(len(path))):
        try:
            damped = influence.with_damping(in_unit(path[k], unit))
            operators, sums = damped.ready().operators, right(damped)
            with recorded_solves() as log, warnings.catch_warnings():
                warnings.simplefilter("ignore", NotConverged)
                for name, value in left.items():
                    operator = operators[name]
                    found[name][k] = -to_numpy(_through(operator, value, sums[name]))
        except SingularOperator as error:
            for values in found.values():
                values[k] = np.nan
            # Singular at the largest damping of all: there is nothing to choose from.
            if k == len(path) - 1:
                raise
            return found, [f"no damping of {path[k]:.2g} or less was tried: {_first(error)}"]
        solved = solved or bool(log)
        if not all(report.converged.all() for report in log):
            missed.append(path[k])
        total = np.sum([values[k] for values in found.values()], axis=0)
        figure = mean_correlation(spearman(total[: len(truth)], truth))
        # In a row: an LDS over few subsets goes up and down by chance.
        best, worse = max(best, figure), worse + 1 if figure < best - WORSE else 0
        if solved and worse >= IN_A_ROW and k:
            return found, [f"dampings below {path[k]:.2g} were not tried: their LDS falls, and they are dear to solve"]
    return found, [f"solves missed their tolerance at {', '.join(f'{d:.2g}' for d in missed)}"] if missed else []


def _through(operator: Any, queries: BlockGradient, sums: Array) -> Array:
    """<Op g_q, summed gradients>: [m, q]."""
    # Summed scores are scores of the sum: <A^-1 g_q, sum g_n>.
    return transpose(operator.apply_block(operator.seen(queries)).project(sums))


def _first(error: HeadwaterError) -> str:
    return str(error).split(". ")[0]


# Without retraining ---------------------------------------------------------------------------------------------------


def _by_evidence(influence: ComposableInfluence, path: Sequence[float], unit: str) -> Calibration:
    """Of each block: where the path crosses damping = dof(damping) / (N |w|^2), from below.

    Errors: InvalidSetting for a curvature of products alone, whose degrees of freedom are not known.
    """
    chosen = {}
    for name, curvature in influence.curvature.items():
        weights = influence.provider.parameters(name)
        # MacKay 1992: at the evidence's maximum, damping N |w|^2 equals the effective degrees of freedom.
        size = float(namespace(weights).sum(weights * weights)) * influence.n_train
        scale = curvature.mean_eigenvalue() if unit == "mean eigenvalues" else 1.0
        absolute = np.asarray(path) * scale
        dof = curvature.effective_dof(absolute.tolist()) if scale > 0 else np.zeros(len(path))
        if dof is None:
            raise InvalidSetting(
                f"The spectrum of block {name!r} is not known ({influence.method.describe()}), so that the evidence is "
                "not: give a bank of retrained models, or calibrate hw.Ekfac() or hw.Direct() and take its damping."
            )
        # In logarithms: the path is geometric, and the gap falls nearly along a line.
        gap = np.log(np.maximum(dof, 1e-300) / max(size, 1e-300)) - np.log(np.maximum(absolute, 1e-300))
        chosen[name] = _crossing(path, gap)
    return Calibration(tuple(path), unit, chosen, EVIDENCE)


def _crossing(path: Sequence[float], gap: np.ndarray) -> float:
    """Where a falling gap is zero, between points of the path; an end of the path where it is nowhere zero."""
    where = np.log(path)
    if gap[0] <= 0:
        return float(path[0])
    if gap[-1] >= 0:
        return float(path[-1])
    k = int(np.argmax(gap <= 0))
    share = gap[k - 1] / (gap[k - 1] - gap[k])
    return float(np.exp(where[k - 1] + share * (where[k] - where[k - 1])))
