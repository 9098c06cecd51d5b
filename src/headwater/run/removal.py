"""Removal with the curvature that goes with the rows: one exact Newton step without them, for each row or group.

1. At the weights w the mean loss has the curvature C. The operators hold A^-1 with A = C + damping I: what is at its
   minimum in w is taken to be (1/N) sum_n l_n + damping / 2 |.|^2, with N the rows' total weight.
2. Take the rows S away, and leave N and the damping as they are. The gradient in w is then -(1/N) g_S, with g_S the sum
   of their gradients, and the curvature A - J^T J / N, with J the gradients whose summed g g^T are the rows' own GGN.
3. One Newton step moves the weights by delta = (1/N) (A - J^T J / N)^-1 g_S, and raises a query's loss, to first order
   in delta, by <g_q, delta>.
4. By Woodbury's identity that needs A^-1 alone: N <g_q, delta> = g_q A^-1 g_S + (g_q A^-1 J^T) (I - H)^-1 h, with the
   leverage H = J A^-1 J^T / N and h = J A^-1 g_S / N. One row with one output: its influence over (1 - leverage).

Least squares and ridge regression are quadratic: there the step is exact leave-one-out. (For the sum of halved squares
plus ridge / 2 |w|^2 the damping is ridge / N, and N stays, so that the ridge does.) Where a method's curvature falls
apart into blocks or parts, so does that of the removed rows. Where it is no GGN (a Hessian, a Fisher information), the
removed rows' share of it is their GGN all the same. One step, and the query's loss to first order along it: with few
rows and little damping neither is near the truth.

How far to trust it: the smallest eigenvalue of I - H is the share of the curvature that stays, in the direction that
loses most, and what the step is divided by. Against refits to the end (logistic regression on breast_cancer with C 1
and 100, on digits with C 1; 400 rows, a tenth mislabelled, 1 to 250 of them removed: at random, by self-influence, of
one class) the forecast's error, as a share of the true changes, has the median 0.12 where at least half stays, 0.26
for a quarter to a half, 0.72 below a quarter (65 groups, NumPy on one core). Below a quarter there is a warning.

Sources: Cook 1977; Koh et al. 2019, arXiv 1905.13289; Basu et al. 2020, arXiv 1911.00418 (groups).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headwater.arrays import Array, identity, namespace, precise, rows_within_memory, to_numpy, transpose
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import (
    BatchMismatch,
    InvalidInput,
    InvalidSetting,
    RoughForecast,
    SingularOperator,
    UnsupportedModel,
)
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.provider import BlockGradients
from headwater.gradients.together import failures_told
from headwater.influence import ComposableInfluence
from headwater.methods.dual import DataInf
from headwater.operators.algebra import LinearOperator, ScaledOperator
from headwater.operators.structured import BlockDiagonalOperator
from headwater.rows import Each, PlacedBatch, sweep_kept
from headwater.run.attribute import Storage, run_identity, stored_columns
from headwater.run.queries import Asked
from headwater.run.rows import FittedRows, check_scores, distinct, sweep_rows
from headwater.run.runners.in_step import open_parts
from headwater.run.runners.turns import Turn, Wanted, take_turns
from headwater.run.tiles import Scorer
from headwater.store.parts import PartStore
from headwater.store.seal import digest
from headwater.types import Batch

ENOUGH = 0.25
"""Share of the curvature, in the direction that loses most, below which a removal is forecast with a warning.

The step is then more than four times what it is with the rows' curvature left in; see above for what was measured."""


@dataclass(frozen=True)
class Region:
    """Parameters whose curvature is inverted by itself: a block, or one part of it."""

    block: str
    part: int | None
    """None for the whole block."""
    inverse: LinearOperator
    scale: float
    """What the region's scores are multiplied by: its model's share in an ensemble."""

    def of(self, grads: BlockGradients) -> BlockGradient:
        """The region's share of the gradients, as its operator sees them."""
        value = grads[self.block]
        if self.part is None:
            return self.inverse.seen(value)
        return BlockGradient(_alone(value.layout.parts[self.part].shape), (value.parts[self.part],))


@dataclass(frozen=True)
class Rows:
    """Some train rows in one region, with their weights."""

    grads: BlockGradient
    """Of their losses."""
    outputs: tuple[BlockGradient, ...]
    """Their own curvature: the GGN in one gradient for each output, or the row's gradient for an empirical Fisher."""


def removal(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    groups: Iterable[object] | None,
    *,
    progress: bool,
    storage: Storage | None = None,
    explain: str = "label",
) -> np.ndarray:
    """See `Attributor.removal` and the derivation above: [q, n] or [q, groups], and positive for what helps.

    Rows go batch by batch; of an unfinished group its rows' gradients are kept, in their structured form.
    Errors: InvalidSetting for a method that predicts no removal, or whose operators are not symmetric; UnsupportedModel
    for rows whose GGN has no gradients; SingularOperator where nothing holds the weights once rows are gone;
    InvalidInput for groups that are empty or name rows that are not there; RowsNotFitted for other rows than the fit's.
    Warns: RoughForecast where less than `ENOUGH` of the curvature stays.
    """
    influence.ready()
    regions = _regions(influence)
    asked, storage = Asked.of(influence, query_loader, explain), storage or Storage()
    queries = _queries(influence, regions, asked, progress)
    if groups is None:
        return _each_row(influence, regions, queries, asked, train_loader, storage, progress)
    return _each_group(influence, regions, queries, asked, train_loader, _named_groups(groups), storage, progress)


def _regions(influence: ComposableInfluence) -> list[Region]:
    if not influence.method.predicts_removal:
        raise InvalidSetting(f"{influence.method.describe()} predicts no change of loss, only similarity.")
    if isinstance(influence.method, DataInf):
        raise InvalidSetting("hw.DataInf() inverts each row by itself: there is no curvature to take a row out of.")
    found = []
    for name, operator in influence.block_mapper.operators.items():
        scale = influence.provider.block_scale(name)
        # The share of an ensemble is no curvature: it would be taken for more of it, and is multiplied in at the end.
        inverse = operator.inner if scale != 1.0 and isinstance(operator, ScaledOperator) else operator
        if not inverse.symmetric:
            raise InvalidSetting(f"The operator of block {name!r} is not symmetric: it is no inverse of a curvature.")
        if isinstance(inverse, BlockDiagonalOperator):
            parts = zip(inverse.layout.parts, inverse.operators, strict=True)
            # An inverse part by part says that parts do not act on each other: each is solved without its rows by
            # itself.
            alone = [BlockDiagonalOperator(_alone(part.shape), [own]) for part, own in parts]
            found += [Region(name, k, own, scale) for k, own in enumerate(alone)]
        else:
            found.append(Region(name, None, inverse, scale))
    return found


def _alone(shape: tuple[int, int]) -> Layout:
    """A part as a block of its own, flattened row by row."""
    return Layout(Block("part", (Parameter("part", shape),)), (Part(Piece("part", 0, shape)),))


def _queries(
    influence: ComposableInfluence, regions: Sequence[Region], asked: Asked, progress: bool
) -> list[BlockGradient]:
    """A^-1 of all query gradients, region by region."""

    def factors(piece: PlacedBatch) -> list[BlockGradient]:
        grads = influence.provider.grads(piece.batch, query=True)
        mine = [region.of(grads) for region in regions]
        solved = [region.inverse.apply_block(own) for region, own in zip(regions, mine, strict=True)]
        return [one.cheapest_form(own) for one, own in zip(solved, mine, strict=True)]

    pieces = sweep_kept(asked.pieces, Each(factors), "query factors", progress)
    return [stack(own) for own in zip(*pieces, strict=True)]


def _train_rows(influence: ComposableInfluence, regions: Sequence[Region], batch: Batch) -> list[Rows]:
    """A batch's gradients, region by region, and what its rows put into the method's kind of curvature.

    Errors: UnsupportedModel for rows whose GGN has no gradients.
    """
    provider = influence.provider
    if influence.method.approximates == "empirical_fisher":
        outputs: list[Any] | None = provider.fisher_grads(batch, "empirical")
    else:
        outputs = provider.ggn_grads(batch)
    if outputs is None:
        raise UnsupportedModel(
            "removal() takes each row's own curvature away, in one gradient for each output; here rows have many "
            "outputs, or a loss that is not convex in them. Use attribute(unit='removal'), which leaves it in."
        )
    weights, grads = provider.row_weights(batch), provider.grads(batch)
    # The curvature is sum w g g^T: roots on its gradients, whole weights on the loss's.
    roots = None if weights is None else namespace(weights).sqrt(weights)
    return [Rows(r.of(grads), tuple(_weighted(r.of(draw), roots) for draw in outputs)) for r in regions]


def _weighted(value: BlockGradient, weights: Array | None) -> BlockGradient:
    return value if weights is None else value.weighted(namespace(weights).astype(weights, value.like.dtype))


# Every row by itself --------------------------------------------------------------------------------------------------


def _each_row(
    influence: ComposableInfluence,
    regions: Sequence[Region],
    queries: Sequence[BlockGradient],
    asked: Asked,
    loader: Iterable[object],
    storage: Storage,
    progress: bool,
) -> np.ndarray:
    columns, fitted = _Columns(influence, regions, queries), FittedRows(influence, forecast=True)
    if storage.store is None:
        visitor = fitted & Each[PlacedBatch, np.ndarray](lambda piece: columns.scores(piece)[0])
        names, found = sweep_rows(influence.provider, loader, visitor, "removal", progress)
        changes = np.concatenate(found, axis=1)
    else:
        ids = np.array([*map(str, asked.ids), STAYS])
        names, changes = stored_columns(
            influence, loader, columns, ids, fitted, "removal", storage, progress, query_keys=asked.keys
        )
    _warn_if_rough(changes[-1], [f"row {name}" for name in distinct(names, "train")])
    return changes[:-1]


STAYS = "share of the curvature that stays"
"""What the row below those of the queries is."""


class _Columns(Scorer):
    """The change of each query's loss, and below them the share of the curvature that stays: [1, q + 1, n]."""

    def __init__(
        self, influence: ComposableInfluence, regions: Sequence[Region], queries: Sequence[BlockGradient]
    ) -> None:
        self.influence, self.regions, self.queries = influence, regions, queries

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        found = self._of(piece.batch, piece.names)
        check_scores(found[0, :-1], range(found.shape[1] - 1), piece.names, self.influence)
        return found

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        batch = piece.batch if piece.batch.weights is None else replace(piece.batch, weights=None)
        return self._of(batch, np.arange(len(batch)))

    def _of(self, batch: Batch, ids: np.ndarray) -> np.ndarray:
        rows, n_train = _train_rows(self.influence, self.regions, batch), self.influence.n_train
        shares = [_rows_share(*given, n_train, ids) for given in zip(self.regions, self.queries, rows, strict=True)]
        changes = np.sum([change for change, _ in shares], axis=0)
        return np.concatenate([changes, np.min([stays for _, stays in shares], axis=0)[None]])[None]


def _rows_share(
    region: Region, queries: BlockGradient, rows: Rows, n_train: float, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What one region adds to the change of each query's loss, for each row's removal: [q, n]; what stays: [n]."""
    # One solve for the loss's gradient and the outputs' together.
    gram = precise(_own_gram(region.inverse, rows)) / n_train
    # Woodbury: without the row, (A - J^T J / n)^-1 g = A^-1 g + A^-1 J^T (I - J A^-1 J^T / n)^-1 J A^-1 g / n.
    shares, left = _solve_without(gram[:, 1:, 1:], gram[:, 1:, :1], rows.grads.like, [f"row {name}" for name in ids])
    change = precise(queries.inner(rows.grads))
    for k, output in enumerate(rows.outputs):
        change = change + precise(queries.inner(output)) * shares[:, k, 0]
    return to_numpy(change) * (region.scale / n_train), left


def _own_gram(inverse: LinearOperator, rows: Rows) -> Array:
    """<A^-1 u, v> for u, v the loss's and the outputs' gradients of one row: [n, 1 + outputs, 1 + outputs]."""
    values, xp = (rows.grads, *rows.outputs), namespace(rows.grads.like)
    # Flat vectors of some rows, their solves, and what the solve needs beside.
    step = rows_within_memory(3 * len(values) * inverse.input_size, rows.grads.like)
    found = []
    for start in range(0, rows.grads.rows, step):
        flat = xp.stack([value.take(slice(start, start + step)).flat() for value in values], axis=1)
        found.append(inverse.apply(flat) @ transpose(flat))
    return xp.concat(found, axis=0)


def _solve_without(leverage: Array, right: Array, like: Array, names: Sequence[str]) -> tuple[Array, np.ndarray]:
    """(I - leverage)^-1 right for each of the names; leverage [n, m, m], right [n, m, 1], to the precision of `like`.

    Also the smallest eigenvalue of each I - leverage: [n].
    Errors: SingularOperator, naming the first whose removal leaves a direction without curvature, or below zero.
    """
    xp = namespace(leverage)
    # Symmetric but for rounding of the solves; eigvalsh reads one triangle only.
    left = identity(int(leverage.shape[1]), leverage) - (leverage + transpose(leverage)) / 2
    lowest = xp.linalg.eigvalsh(left)[:, 0]
    # eps of the gradients' dtype: the leverages are sums of rounded products, also where they are kept in float64.
    enough = lowest > 1e4 * float(xp.finfo(like.dtype).eps)
    if not bool(xp.all(enough)):
        first = int(np.argmin(to_numpy(enough)))
        raise SingularOperator(
            f"Without {names[first]} the curvature has no inverse: it has the leverage {1 - float(lowest[first]):.6g}, "
            "and from 1 on nothing else holds some direction of the weights (or the method's approximation has less of "
            "it than the row by itself). Use more damping, or an exact method such as hw.Cg(); of a group remove fewer "
            "rows at a time."
        )
    return xp.linalg.solve(left, right), to_numpy(lowest)


def _warn_if_rough(left: np.ndarray, names: Sequence[str]) -> None:
    """left: the share of the curvature that stays without each of the names. Warns: RoughForecast, once for all."""
    rough, worst = int((left < ENOUGH).sum()), int(np.argmin(left))
    if rough:
        said = (
            f"Without {names[worst]} only {left[worst]:.2g} of the curvature stays in some direction ({rough} of "
            f"{len(left)} removals leave less than {ENOUGH:g}): one Newton step forecasts such a change only where the "
            "loss is quadratic. Remove fewer rows at a time, use more damping, or retrain without them; sums of "
            "attribute(unit='removal') leave the curvature in, and do not grow like that."
        )
        warnings.warn(RoughForecast(said), stacklevel=2)


# Rows together --------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Rows that are removed together: their names, and those that have been seen, by region."""

    number: int
    names: np.ndarray
    seen: int = 0
    rows: list[list[Rows]] = field(default_factory=list)
    keys: list[tuple[Any, int]] = field(default_factory=list)
    """Of the rows that have been seen: each name, and what the row is known by."""

    def add(self, regions: Sequence[Rows], index: np.ndarray) -> bool:
        """Keep these rows of a batch; whether the group is complete."""
        self.rows.append([_take(rows, index) for rows in regions])
        self.seen += len(index)
        return self.seen == len(self.names)

    def meet(self, piece: PlacedBatch, index: np.ndarray) -> None:
        """Note what these rows of a batch are known by."""
        if piece.keys is not None:
            self.keys += zip(piece.names[index].tolist(), piece.keys.weighted[index].tolist(), strict=True)

    @property
    def digest(self) -> str:
        """Of its rows, in whatever order they came."""
        return digest(repr(sorted(self.keys)).encode())

    def __str__(self) -> str:
        return (
            f"group {self.number} (rows {', '.join(map(str, self.names[:5]))}{' ...' if len(self.names) > 5 else ''})"
        )


def _named_groups(groups: Iterable[object]) -> list[Group]:
    # NumPy takes a set for one object; the order within a group changes nothing.
    listed = [sorted(names) if isinstance(names, (set, frozenset)) else names for names in groups]
    found = [Group(number, np.atleast_1d(np.asarray(names))) for number, names in enumerate(listed)]
    for group in found:
        if group.names.ndim != 1 or not len(group.names):
            raise InvalidInput(f"Group {group.number} has shape {group.names.shape}; expected one or more rows' names.")
        # True and False would be taken for the names 1 and 0.
        if group.names.dtype == np.bool_:
            raise InvalidInput(f"Group {group.number} is a mask; give the rows' positions: numpy.flatnonzero(mask).")
        if len(np.unique(group.names)) < len(group.names):
            raise BatchMismatch(f"A row is in {group} more than once.")
    if not found:
        raise InvalidInput("There are no groups; pass groups=None for every row by itself.")
    return found


def _each_group(
    influence: ComposableInfluence,
    regions: Sequence[Region],
    queries: Sequence[BlockGradient],
    asked: Asked,
    loader: Iterable[object],
    groups: Sequence[Group],
    storage: Storage,
    progress: bool,
) -> np.ndarray:
    if storage.store is None:
        found = _group_columns(influence, regions, queries, loader, groups, FittedRows(influence, True), progress)
        columns = [found[group.number] for group in groups]
    else:
        columns = _stored_groups(influence, regions, queries, asked, loader, groups, storage, progress)
    rises = np.stack([column for column, _ in columns], axis=1)
    check_scores(rises, range(len(rises)), [str(group) for group in groups], influence)
    _warn_if_rough(np.array([left for _, left in columns]), [str(group) for group in groups])
    return rises


Column = tuple[np.ndarray, float]
"""The change of each query's loss [q], and the share of the curvature that stays."""


def _group_columns(
    influence: ComposableInfluence,
    regions: Sequence[Region],
    queries: Sequence[BlockGradient],
    loader: Iterable[object],
    groups: Sequence[Group],
    fitted: FittedRows,
    progress: bool,
    wanted: Collection[int] | None = None,
    done: Callable[[Group, Column], None] = lambda group, column: None,
) -> dict[int, Column]:
    """By the group's number. wanted: numbers of those to compute, None for all; of the others rows are met. done: told
    of each group when it is complete.
    """
    columns: dict[int, Column] = {}

    def meet(piece: PlacedBatch) -> None:
        inside = [(group, np.flatnonzero(np.isin(piece.names, group.names))) for group in groups]
        found = [(group, index) for group, index in inside if len(index)]
        for group, index in found:
            group.meet(piece, index)
        if wanted is not None:
            found = [(group, index) for group, index in found if group.number in wanted]
        # A batch without rows of any group costs no gradients.
        rows = _train_rows(influence, regions, piece.batch) if found else []
        for group, index in found:
            if group.add(rows, index):
                columns[group.number] = _group_column(group, regions, queries, influence.n_train)
                done(group, columns[group.number])
                # Gradients of complete groups are not needed again: memory holds unfinished ones only.
                group.rows.clear()

    names, _ = sweep_rows(influence.provider, loader, fitted & Each(meet), "removal of groups", progress)
    distinct(names, "train")
    missing = [group for group in groups if len(group.keys) < len(group.names)]
    if missing:
        raise InvalidInput(f"Not every row of {missing[0]} is in the train loader: {len(missing[0].keys)} were found.")
    return columns


def _stored_groups(
    influence: ComposableInfluence,
    regions: Sequence[Region],
    queries: Sequence[BlockGradient],
    asked: Asked,
    loader: Iterable[object],
    groups: Sequence[Group],
    storage: Storage,
    progress: bool,
) -> list[Column]:
    """One part for each group, computed by whichever worker is at it."""
    assert storage.store is not None
    members = [[str(name) for name in np.sort(group.names)] for group in groups]
    identity = run_identity(influence, asked) | {"verb": "removal of groups", "groups": members}
    together, train = influence.source.together, influence.train_rows(loader)
    with failures_told(together):
        store = open_parts(storage.store, identity, together)
        return _shared_groups(influence, regions, queries, train, groups, store, storage.worker, progress)


def _shared_groups(
    influence: ComposableInfluence,
    regions: Sequence[Region],
    queries: Sequence[BlockGradient],
    train: Iterable[object],
    groups: Sequence[Group],
    store: PartStore,
    worker: tuple[int, int],
    progress: bool,
) -> list[Column]:

    def visit(wanted: Wanted) -> tuple[list[Turn], list[int]]:
        # Anew: rows that a broken pass has left in a group are none of this one's.
        mine = [Group(group.number, group.names) for group in groups]
        names = [f"groups/{group.number}" for group in mine]
        own = {n for n, name in enumerate(names) if wanted(n, name) and store.claims.claim(name)}

        def keep(group: Group, column: Column) -> None:
            store.write(names[group.number], group.digest, {"changes": column[0], "left": column[1]})
            store.claims.release(names[group.number])

        try:
            # All rows are met, also where nothing is to be computed: a part is of these very rows, or none.
            fitted = FittedRows(influence, forecast=True)
            _group_columns(influence, regions, queries, train, mine, fitted, progress, own, keep)
        finally:
            for n in own:
                store.claims.release(names[n])
        return [Turn(name, group.digest) for name, group in zip(names, mine, strict=True)], sorted(own)

    def read(turn: Turn) -> Column | None:
        found = store.read(turn.name, turn.rows)
        return None if found is None else (found["changes"], float(found["left"]))

    there = lambda _, turn: read(turn) is not None  # noqa: E731
    turns = take_turns(visit, store.has, there, store.claims, worker, store.path)
    columns = [read(turn) for turn in turns]
    return [column for column in columns if column is not None]


def _group_column(
    group: Group, regions: Sequence[Region], queries: Sequence[BlockGradient], n: float
) -> tuple[np.ndarray, float]:
    """The change of each query's loss: [q]; and the share of the curvature that stays."""
    pieces = zip(*group.rows, strict=True)
    shares = [_group_share(*given, n, str(group)) for given in zip(regions, queries, pieces, strict=True)]
    return np.sum([change for change, _ in shares], axis=0), min(left for _, left in shares)


def _group_share(
    region: Region, queries: BlockGradient, pieces: Sequence[Rows], n: float, name: str
) -> tuple[np.ndarray, float]:
    grads = stack([piece.grads for piece in pieces])
    outputs = stack([output for piece in pieces for output in piece.outputs])
    xp, like = namespace(grads.like), grads.like
    # The group's summed gradient: one solve, however many rows it has.
    total = grads.combine(xp.ones_like(grads.squared_norms())[None, :])
    along = outputs.project(region.inverse.apply(total))
    # [m, m] over all outputs of all rows: rows of one group act on each other's curvature.
    gram = xp.concat([outputs.project(region.inverse.apply(flat)) for flat in outputs.flat_chunks()], axis=1)
    shares, left = _solve_without(precise(gram)[None] / n, precise(along)[None] / n, like, [name])
    change = precise(queries.project(total)) + precise(queries.inner(outputs)) @ shares[0]
    return to_numpy(change)[:, 0] * (region.scale / n), float(left[0])


def _take(rows: Rows, index: np.ndarray) -> Rows:
    """Some rows, by position."""
    where = namespace(rows.grads.like).asarray(index)
    return Rows(rows.grads.take(where), tuple(output.take(where) for output in rows.outputs))
