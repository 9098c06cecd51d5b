"""Gradients and second-order products of a fitted linear model, in closed form."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import issparse

from headwater.arrays import rows_within_memory
from headwater.blocks import Block, Layout, Parameter, Part, Piece, Structure, partition
from headwater.errors import BatchMismatch, BlockMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer
from headwater.gradients.provider import BlockGradients, Fisher, Kind, OutputFunction, StructuredGradientProvider
from headwater.loaders.frames import missing_column
from headwater.random import row_numbers
from headwater.sklearn.batch import FeatureBatch, SklearnBatch, bad_rows, column_names
from headwater.sklearn.families import FEW, Array, Family, of_output
from headwater.sklearn.hashing import StepsHasher
from headwater.sklearn.linear import LinearModel, attribute_of, last_step, read
from headwater.sklearn.measurements import Measurement, RowFunction, measurement_named
from headwater.types import field_values

NAMES = ("coef", "intercept")
FISHERS = ("auto", "exact", "sampled", "empirical")


class SklearnGradientProvider(StructuredGradientProvider[SklearnBatch, Array]):
    """Per-sample gradients of a fitted estimator's own loss, as outer products of one position. All in float64.

    Parameters are "coef" [o, features] and, where there is one, "intercept" [o]; o is the number of outputs: one, the
    classes of a multinomial model, or the targets. For a Pipeline the inputs are the transformed features, and x may be
    raw rows. The estimator is never changed, and always read as it is now.

    A train row's weight is its own times that of its class. Where the estimator's objective is a mean (generalised
    linear models, SGD), a train row's gradient holds its share of the penalty, which it takes along when it leaves;
    its loss, and gradients of queries, do not. `penalty` is what the objective adds to the curvature of the rows.

    estimator: see `headwater.sklearn.linear`. blocks: "full", "parameter", or {name: ["coef", "intercept"]}.
    measurement: a number to explain about query rows, in place of the loss: "probability", "log_probability",
    "margin" (log p/(1-p)) or "logit" of the row's label; or "output" (the decision function, or linear predictor) or
    "prediction" (of a regression), whatever the label. Positive scores: the train row raises it.
    class_weight: {label: weight} in place of the estimator's, if that is "balanced". names: what the two parameters are
    called; random projections depend on it, so ("weight", "bias") draws the numbers of torch.nn.Linear. plain: the slow
    truth, gradients of one row at a time, by numerical differences of its loss.
    Errors: EstimatorNotFittedError; UnsupportedModel; InvalidSetting.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        blocks: Structure = "full",
        measurement: Measurement | None = None,
        class_weight: Mapping[Any, float] | None = None,
        names: tuple[str, str] = NAMES,
        plain: bool = False,
    ):
        self.estimator, self._plain = estimator, plain
        self._blocks, self._measurement, self._class_weight = blocks, measurement, class_weight
        self._names = names
        self._function: OutputFunction | None = None
        model = self.model
        model.class_weights(class_weight)
        if measurement is not None:
            measurement_named(measurement, model.family, model.outputs)
        self._layouts = _layouts(model, blocks, names)

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> LinearModel:
        """The estimator's last step, as it is now."""
        return read(self.estimator)

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self._layouts

    @property
    def explained(self) -> str:
        return "loss" if self._measurement is None else f"negative_{self._measurement}"

    @property
    def normalisation(self) -> str:
        return "none"

    @property
    def dtype(self) -> str:
        return "float64"

    @property
    def coverage_fraction(self) -> float:
        return self.n_parameters / self.model.weights.size

    def fingerprint(self) -> tuple[int, ...]:
        """Checksums of coefficients, intercept, penalty, class weights, loss, and of a pipeline's steps before."""
        model = self.model
        arrays = [model.coef, model.penalty.strength, model.intercept, model.class_weights(self._class_weight)]
        penalty = (model.penalty.per_row, model.penalty.intercept)
        # repr of sorted fields: the same text in every process, as a hash of an object is not.
        loss = repr((model.family.name, sorted((f.name, value) for f, value in field_values(model.family)), penalty))
        # A scaler that was fitted again changes what the linear model meets.
        steps = StepsHasher(hash_name="md5").hash(last_step(self.estimator)[1])
        numbers = [b"" if a is None else np.ascontiguousarray(a).tobytes() for a in arrays]
        return tuple(zlib.crc32(given) for given in [*numbers, loss.encode(), str(steps).encode()])

    def parameters(self, block: str) -> Array:
        model, kinds = self.model, self._kinds(block)
        matrix = model.weights[:, _columns(model, kinds)]
        return self.layouts[block].merge([matrix[None]])[0]

    def in_float64(self) -> SklearnGradientProvider:
        found = SklearnGradientProvider(
            self.estimator, measurement=self._measurement, **{**self._options, "plain": True}
        )
        found._function = self._function
        return found

    def of_output(self, function: OutputFunction) -> SklearnGradientProvider:
        of_output(self.model.family, function)
        found = type(self)(self.estimator, **self._options)
        found._function = function
        return found

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "blocks": self._blocks,
            "class_weight": self._class_weight,
            "names": self._names,
            "plain": self._plain,
        }

    def penalty(self, block: str, weight: float) -> Array | None:
        """[D_block]: strength / weight, or strength where the objective is a mean; None where it is zero."""
        model, kinds = self.model, self._kinds(block)
        # The margin or the logit is another function than the objective, which the penalty belongs to.
        if self._function is not None:
            return None
        own = model.penalty.beside_mean(weight)
        matrix = own.diagonal(model.features, model.intercept is not None)[:, _columns(model, kinds)]
        return self.layouts[block].merge([matrix[None]])[0] if matrix.any() else None

    # Batches ------------------------------------------------------------------------------------------------------

    def as_batch(self, x: object, y: object) -> FeatureBatch:
        return self.prepared(SklearnBatch(x, y))

    def prepared(self, batch: SklearnBatch) -> FeatureBatch:
        """Through the pipeline's steps, with labels as numbers, and checked.

        Errors: InvalidInput for other features, names or labels than at fit; ShapeMismatch; NonFiniteValue.
        """
        if isinstance(batch, FeatureBatch):
            return batch
        if batch.x is None or batch.y is None:
            raise InvalidInput(missing_column("x" if batch.x is None else "y"))
        if len(batch) == 0:
            raise BatchMismatch("The batch has no rows.")
        model = self.model
        weights = None if batch.weights is None else np.asarray(batch.weights, dtype=np.float64)
        return FeatureBatch(self.features(batch.x), model.encode(batch.y), weights, batch.ids)

    def features(self, x: Any) -> Array:
        """What the linear model meets: [n, features] in float64. Sparse rows become dense. Errors: as `prepared`."""
        check_names(self.estimator, x)
        _, before = last_step(self.estimator)
        found = x if before is None else before.transform(x)
        found = np.asarray(found.toarray() if issparse(found) else found)
        expected = self.model.features
        if found.ndim != 2 or found.shape[1] != expected:
            raise ShapeMismatch(f"x has shape {found.shape}; {self.model.name} was fitted to {expected} features.")
        if found.dtype.kind not in "iufbO":
            raise InvalidInput(f"x has dtype {found.dtype}; {self.model.name} takes numbers.")
        try:
            found = np.ascontiguousarray(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"x has entries that are no numbers, which {self.model.name} takes: {error}.") from error
        if not np.isfinite(found).all():
            raise NonFiniteValue("x has NaN or infinity.", bad_rows(found))
        return found

    def row_weights(self, batch: SklearnBatch) -> Array | None:
        batch = self.prepared(batch)
        # Of the targets as numbers: class c's weight is entry c.
        of_classes = self.model.class_weights(self._class_weight)
        own = None if of_classes is None else of_classes[batch.y]
        if batch.weights is None:
            return own
        return batch.weights if own is None else batch.weights * own

    def rows_at_once(self, batch: SklearnBatch) -> int:
        model = self.model
        return rows_within_memory(4 * (model.features + model.outputs), model.coef)

    def host_arrays(self, batch: SklearnBatch, weighted: bool = False) -> list[np.ndarray]:
        return super().host_arrays(self.prepared(batch), weighted)

    # Gradients ----------------------------------------------------------------------------------------------------

    def _family(self, model: LinearModel) -> Family:
        return model.family if self._function is None else of_output(model.family, self._function)

    def _asked(self, model: LinearModel, query: bool) -> RowFunction:
        """What is differentiated of these rows."""
        if not query or self._measurement is None or self._function is not None:
            return self._family(model)
        return measurement_named(self._measurement, model.family, model.outputs)

    def grads(self, batch: SklearnBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        model, batch = self.model, self.prepared(batch)
        if self._plain:
            return self._as_asked(model, batch, self._plain_grads(model, batch, query), query, weighted)
        gradients = self._asked(model, query).gradient(model.output(batch.x), batch.y)
        return self._as_asked(model, batch, self._pulled_back(batch, [gradients])[0], query, weighted)

    def _plain_grads(self, model: LinearModel, batch: FeatureBatch, query: bool) -> BlockGradients:
        """One row's loss at a time, differentiated numerically by its output."""
        family, rows = self._asked(model, query), []
        for k in range(len(batch)):
            # No array code of the fast path: this is what it is compared with.
            inputs = [*batch.x[k], *([] if model.intercept is None else [1.0])]
            gradient = _numerical_gradient(family, model.output(batch.x[k : k + 1]), batch.y[k : k + 1])
            rows.append([[s * entry for entry in inputs] for s in gradient])
        matrices = np.array(rows)
        found: BlockGradients = OrderedDict()
        for name, layout in self.layouts.items():
            found[name] = BlockGradient(layout, (Dense(matrices[:, :, _columns(model, self._kinds(name))]),))
        return found

    def _as_asked(
        self, model: LinearModel, batch: FeatureBatch, found: BlockGradients, query: bool, weighted: bool
    ) -> BlockGradients:
        """With the penalty's shares of train rows, and weighted."""
        if not query and self._function is None:
            found = self._with_shares(model, found)
        weights = batch.weights if query else self.row_weights(batch)
        if weights is None or not weighted:
            return found
        return OrderedDict((name, value.weighted(weights)) for name, value in found.items())

    def _pulled_back(self, batch: FeatureBatch, cotangents: list[Array]) -> list[BlockGradients]:
        """Gradients of the output along cotangents [n, o]; all share their inputs."""
        for one in cotangents:
            if not np.isfinite(one).all():
                raise NonFiniteValue("A row's gradient is not finite.", bad_rows(one))
        found: list[BlockGradients] = [OrderedDict() for _ in cotangents]
        ones = np.ones((len(batch), 1, 1))
        for name, layout in self.layouts.items():
            kinds = self._kinds(name)
            inputs = batch.x[:, None, :] if "coef" in kinds else ones
            for blocks, one in zip(found, cotangents, strict=True):
                # A linear model's gradient is one outer product: one position a row, the intercept as a column of ones.
                value: Gradient = Outer(inputs, one[:, None, :], ones=len(kinds) == 2)
                blocks[name] = BlockGradient(layout, (value,))
        return found

    def _with_shares(self, model: LinearModel, grads: BlockGradients) -> BlockGradients:
        """Besides, each row's share of a penalty that goes with the rows."""
        if not model.penalty.per_row or model.penalty.is_zero:
            return grads
        # Dense, one for all rows: sums of losses with a penalty each, as SGD and the generalised models have it.
        pull = model.penalty.diagonal(model.features, model.intercept is not None) * model.weights
        return OrderedDict(
            (
                name,
                BlockGradient(
                    value.layout, (Dense(value.parts[0].dense() + pull[:, _columns(model, self._kinds(name))]),)
                ),
            )
            for name, value in grads.items()
        )

    def fisher_grads(
        self, batch: SklearnBatch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        """Errors: InvalidSetting; NonFiniteValue naming the rows."""
        if fisher not in FISHERS:
            raise InvalidSetting(f"fisher is {fisher!r}; expected one of {', '.join(map(repr, FISHERS))}.")
        if fisher == "empirical":
            return [self.grads(batch, weighted=False)]
        model, batch = self.model, self.prepared(batch)
        family, z = self._family(model), model.output(batch.x)
        # Up to FEW outputs enumerating costs no more than a few draws, and has no noise.
        if fisher == "exact" or (fisher == "auto" and model.outputs <= FEW):
            return self._pulled_back(batch, family.exact(z, batch.y))
        keys, scale = self.row_keys(batch), 1.0 / np.sqrt(len(draws))
        sampled = [family.sampled(z, batch.y, partial(row_numbers, keys, number, seed)) * scale for number in draws]
        return self._pulled_back(batch, sampled)

    def ggn_grads(self, batch: SklearnBatch) -> list[BlockGradients] | None:
        model, batch = self.model, self.prepared(batch)
        roots = self._family(model).roots(model.output(batch.x), batch.y)
        return None if roots is None else self._pulled_back(batch, roots)

    def losses(self, batch: SklearnBatch, *, query: bool = False) -> Array:
        model, batch = self.model, self.prepared(batch)
        return self._asked(model, query).losses(model.output(batch.x), batch.y)

    def predicted(self, batch: SklearnBatch) -> FeatureBatch:
        model, batch = self.model, self.prepared(batch)
        return FeatureBatch(batch.x, model.family.predicted(model.output(batch.x)), batch.weights, batch.ids)

    def labels_of(self, y: Any) -> Any:
        return y if self.model.classes is None else self.model.classes[np.asarray(y)]

    # Second order -------------------------------------------------------------------------------------------------

    def curvature_product(self, batch: SklearnBatch, block: str, vectors: Array, kind: Kind) -> Array:
        """The model is linear in its parameters, so that the GGN and the Hessian are one.

        vectors (K, D_block). Errors: ShapeMismatch; NonFiniteValue.
        """
        model, batch, layout = self.model, self.prepared(batch), self._layout(block)
        if vectors.ndim != 2 or vectors.shape[1] != layout.size:
            raise ShapeMismatch(f"Expected vectors (K, {layout.size}), got {tuple(vectors.shape)}.")
        family, kinds, z = self._family(model), self._kinds(block), model.output(batch.x)
        weights = self.row_weights(batch)
        found: list[Any] = []
        for piece in _pieces(vectors, 3 * len(batch) * model.outputs):
            change = family.hessian_product(z, batch.y, self._forward(batch.x, layout.split(piece)[0], kinds))
            change = change if weights is None else change * weights[:, None]
            columns = [np.swapaxes(change, 1, 2) @ batch.x] if "coef" in kinds else []
            # J^T on the ones' column is a sum over rows.
            columns += [change.sum(axis=1)[:, :, None]] if "intercept" in kinds else []
            found.append(layout.merge([np.concatenate(columns, axis=2)]))
        product = np.concatenate(found) if found else vectors.copy()
        if not np.isfinite(product).all():
            raise NonFiniteValue(f"A product with the {kind} of block {block!r} is not finite.")
        return product

    def mixed_prod(self, batch: SklearnBatch, factors: Mapping[str, Array]) -> Array:
        """factors (K, D_block) by block; (K, N, features). Errors: NonFiniteValue."""
        model, batch = self.model, self.prepared(batch)
        family, z, weights = self._family(model), model.output(batch.x), self.row_weights(batch)
        gradient = family.gradient(z, batch.y)
        count = len(next(iter(factors.values())))
        pushed = np.zeros((count, len(batch), model.outputs))
        found = np.zeros((count, len(batch), model.features))
        for block, factor in factors.items():
            if not np.isfinite(factor).all():
                raise NonFiniteValue(f"The factors of block {block!r} are not finite.")
            kinds = self._kinds(block)
            matrices: Any = self._layout(block).split(factor)[0]
            pushed += self._forward(batch.x, matrices, kinds)
            if "coef" in kinds:
                # d/dx of <v, gradient b x^T>: through x itself ...
                found += gradient @ matrices[:, :, : model.features]
        # ... and through the output z = W x, by which the loss's gradient changes with H.
        found += family.hessian_product(z, batch.y, pushed) @ model.coef
        return found if weights is None else found * weights[:, None]

    def _forward(self, x: Array, matrices: Any, kinds: tuple[str, ...]) -> Array:
        """Outputs of linear models [K, o, i] of this block's parameters: [K, n, o]."""
        if kinds == ("intercept",):
            return np.broadcast_to(np.swapaxes(matrices, 1, 2), (len(matrices), len(x), matrices.shape[1]))
        z = x @ np.swapaxes(matrices[:, :, : x.shape[1]], 1, 2)
        return z + matrices[:, None, :, -1] if len(kinds) == 2 else z

    def _layout(self, block: str) -> Layout:
        if block not in self.layouts:
            raise BlockMismatch(f"There is no block {block!r}; the blocks are {list(self.layouts)}.")
        return self.layouts[block]

    def _kinds(self, block: str) -> tuple[str, ...]:
        """Which of "coef" and "intercept" the block has."""
        names = [p.name for p in self._layout(block).block.parameters]
        return tuple(own for own, name in zip(NAMES, self._names, strict=True) if name in names)


def _numerical_gradient(family: RowFunction, z: Array, y: Array) -> Array:
    """The loss's derivatives by the outputs of one row [1, o], by central differences of fourth order: [o]."""
    found = []
    for unit in np.eye(z.shape[1]):
        size = 1e-3 * max(1.0, float(np.abs(z @ unit)[0]))
        step = size * unit
        near, far = (family.losses(z + k * step, y)[0] - family.losses(z - k * step, y)[0] for k in (1, 2))
        # (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / 12 h: off by order h^4.
        found.append((8 * near - far) / (12 * size))
    return np.array(found)


def check_names(estimator: object, x: object) -> None:
    """Columns that have names must be those of the fit, in that order. Errors: InvalidInput."""
    known, given = attribute_of(estimator, "feature_names_in_"), column_names(x)
    if known is None or given is None:
        return
    expected, found = list(known), list(given)
    if found == expected:
        return
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        said = [f"{what} are {names}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise InvalidInput(f"x has other features than the fit: {', '.join(said)}.")
    raise InvalidInput(f"x has the features of the fit in another order: {found}; expected {expected}.")


def _columns(model: LinearModel, kinds: tuple[str, ...]) -> slice:
    """Where these are in `LinearModel.weights`."""
    return slice(0 if "coef" in kinds else model.features, None if "intercept" in kinds else model.features)


def _pieces(vectors: Array, numbers_each: int) -> Iterator[Array]:
    step = rows_within_memory(numbers_each, vectors)
    for start in range(0, len(vectors), step):
        yield vectors[start : start + step]


def _layouts(model: LinearModel, structure: Structure, names: tuple[str, str]) -> OrderedDict[str, Layout]:
    o, i = model.outputs, model.features
    weight, bias = Piece(names[0], 0, (o, i)), Piece(names[1], 0, (o, 1))
    parameters = [Parameter(names[0], (o, i))]
    parameters += [] if model.intercept is None else [Parameter(names[1], (o,))]

    def part(block: Block) -> Part:
        """The intercept is the last column."""
        if len(block.parameters) == 2:
            return Part(weight, bias)
        return Part(weight if block.parameters[0].name == names[0] else bias)

    blocks = partition(parameters, structure)
    return OrderedDict((name, Layout(block, (part(block),))) for name, block in blocks.items())
