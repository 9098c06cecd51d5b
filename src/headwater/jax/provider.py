"""Per-sample gradients and second-order products of a JAX function, as values of the gradient algebra."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from headwater.arrays import is_array, rows_within_memory
from headwater.blocks import Layout, Structure
from headwater.errors import BlockMismatch, InvalidInput, InvalidSetting, ShapeMismatch
from headwater.gradients.algebra import Gradient
from headwater.gradients.block import rows_in_blocks
from headwater.gradients.coverage import Coverage
from headwater.gradients.identity import identity_of, name_of
from headwater.gradients.likelihoods import (
    Bernoulli,
    CrossEntropy,
    Elementwise,
    Likelihood,
    OwnHessian,
    SquaredError,
    fisher_cotangents,
    ggn_cotangents,
    predicted_labels,
)
from headwater.gradients.measurements import measurement_of, negative_logit, negative_margin
from headwater.gradients.provider import BlockGradients, Fisher, Kind, OutputFunction, StructuredGradientProvider
from headwater.gradients.rowwise import differing
from headwater.jax import derivatives, plain
from headwater.jax.batch import JaxBatch, differentiable_input, host_leaves, rounded
from headwater.jax.check import (
    check_finite_factors,
    check_finite_grads,
    check_independence,
    check_rows,
    close,
    first_look,
    first_outputs,
)
from headwater.jax.derivatives import Model
from headwater.jax.losses import JaxOutputLoss, Loss, check_finite, find_likelihood, normalisation
from headwater.jax.plan import Place, make_plan
from headwater.jax.tree import Leaves, checksums, take_tree, wide
from headwater.loaders.frames import in_numbers
from headwater.random import row_keys, row_numbers
from headwater.types import Batch

Apply = Callable[[Any, Any], Any]

NEUTRAL = (CrossEntropy, Bernoulli, SquaredError, Elementwise, OwnHessian)
"""Likelihoods that call no function of a user's with arrays."""

SMALL, SMALL_WORK = 256, 2**25
"""Rows, and multiply-adds of their gradients, some CPU ms, up to which padding is cheaper than compiling again: that
takes a CPU second."""


class JaxGradientProvider(StructuredGradientProvider[JaxBatch, jax.Array]):
    """Per-sample gradients of a function of parameters and rows.

    The loss of a row is `loss(apply(params, row), target)` on a batch of that row alone, summed if it is not reduced;
    `measurement`, a function of the same kind, or the name of one in `gradients.measurements` ("probability", "margin",
    "output", ...), takes its place for query rows. Parameters that are weights of products, convolutions and tables
    keep that structure; all others get plain per-sample gradients. On the first rows that it sees, the provider
    compares the two, and refuses rows that act on each other.

    apply: a pure function (params, x) -> output, traceable by JAX, rows along the first axis of x and of the output.
    params: a pytree of arrays; its floating-point leaves are attributed, and named by their paths
    ("params.Dense_0.kernel"). loss: any traceable function of (output, target). blocks: "full", "layer", "parameter"
    or {name: [parameter or module names]}. likelihood: the distribution behind the loss, where it is not known by
    itself ("cross_entropy", "binary_cross_entropy", "squared_error", or a `Likelihood`). example: some input rows;
    the parameters' structure is learned from them, or else from the first batch. plain: the slow truth, for
    parameters in float64: gradients and curvature of one row at a time; see `jax/plain.py`.
    Errors: InvalidSetting; BlockMismatch; on the first rows RowsInteract, UnsupportedLoss, InvalidInput.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        loss: Loss,
        *,
        blocks: Structure = "full",
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        example: Any = None,
        plain: bool = False,
    ):
        measurement = measurement_of(measurement)
        for name, function in (("apply", apply), ("loss", loss), ("measurement", measurement or loss)):
            if not callable(function):
                raise InvalidSetting(f"{name} is {function!r:.60}; expected a function.")
        tree, self._leaves = take_tree(params)
        # Static arguments of jit: compiled code is found again by their hash.
        self._model = Model(_hashable(apply), tree, _hashable(loss))
        self._measured = self._model if measurement is None else Model(self._model.apply, tree, _hashable(measurement))
        self.likelihood = find_likelihood(loss, likelihood)
        self._structure = blocks
        self._plan = make_plan(tree, blocks)
        self._traced = False
        self._checked = 0
        self._measured_rows = 0
        self._distrusted: frozenset[str] = frozenset()
        self._normalisation: str | None = None
        self._numbers_per_row: int | None = None
        self._work_per_row: int | None = None
        self._fingerprint: tuple[int, ...] | None = None
        self._plain = plain
        self._in_numpy = False
        if plain and self._like.dtype != jnp.float64:
            raise InvalidSetting(
                f"plain=True takes parameters in float64, not {self.dtype}; in_float64() makes a copy."
            )
        if example is not None:
            self._learn(jax.tree.map(lambda v: v[:1], example))

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def needs_rows(self) -> bool:
        return not self._traced

    @property
    def params(self) -> Any:
        """The parameters, as a pytree like the one that was given."""
        return self._model.tree.build(self._leaves)

    @property
    def leaves(self) -> Leaves:
        """All parameters, by name."""
        return self._leaves

    @property
    def trained_model(self) -> Model:
        """The function with its form of parameters and its loss."""
        return self._model

    @property
    def explained_model(self) -> Model:
        """The same with the measurement in the loss's place, where there is one."""
        return self._measured

    def with_params(self, params: object) -> Self:
        """The same function, loss and blocks at other parameters. Errors: InvalidInput for another architecture."""
        tree, leaves = take_tree(params)
        if tree != self._model.tree:
            raise InvalidInput(
                f"The parameters are of another architecture: {_difference(tree.names, tree.shapes)} in place of "
                f"{_difference(self._model.tree.names, self._model.tree.shapes)}."
            )
        # The plan stays: it depends on the function and the shapes, not on the numbers.
        return self._changed(_leaves=leaves, _fingerprint=None, _checked=0, _measured_rows=0)

    def in_numpy(self) -> Self:
        """The same, with NumPy's arrays where JAX's lie in the host's memory: they are views, and nothing is copied.

        JAX compiles each operation of the gradient algebra anew for each shape, 50 to 150 CPU ms apiece; NumPy has them
        at hand. On another device arrays stay JAX's.
        """
        return self._changed(_in_numpy=self._like.sharding.device_set == {_host_device()})

    def in_jax(self) -> Self:
        """The same, with JAX's arrays."""
        return self._changed(_in_numpy=False)

    def _given(self, values: Any) -> Any:
        """What compiled functions gave, as the caller gets it."""
        return jax.tree.map(np.asarray, values) if self._in_numpy else values

    def asked(self, array: Any) -> Any:
        """An array of the caller's, in the same form."""
        return np.asarray(array) if self._in_numpy else jnp.asarray(array)

    def _changed(self, **changes: Any) -> Self:
        other = copy.copy(self)
        # A copy with changes: what JAX has compiled for the model serves it, too.
        vars(other).update(changes)
        return other

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self._plan.by_name

    @property
    def coverage(self) -> Coverage:
        """Attributed parameters, of all that are floating point."""
        inside = {p.name for layout in self.layouts.values() for p in layout.block.parameters}
        return Coverage.of(self._model.tree.parameters, inside)

    @property
    def coverage_fraction(self) -> float:
        return self.coverage.fraction

    @property
    def _like(self) -> jax.Array:
        """An attributed parameter: the dtype and device of the model."""
        return self._leaves[self._model.tree.parameters[0].name]

    @property
    def dtype(self) -> str:
        return str(self._like.dtype)

    @property
    def explained(self) -> str:
        if self._measured.loss is self._model.loss:
            return "loss"
        return name_of(self._measured.loss)

    @property
    def normalisation(self) -> str | None:
        return self._normalisation

    @property
    def device(self) -> Any:
        places = self._like.devices()
        return next(iter(places)) if len(places) == 1 else None

    def settings(self) -> tuple[str, ...]:
        model = self._model
        return tuple(identity_of(value) for value in (model.apply, model.loss, self._measured.loss, self.likelihood))

    def fingerprint(self) -> tuple[int, ...]:
        """Checksums of the parameters' bytes; arrays of JAX cannot change, so they are read once."""
        if self._fingerprint is None:
            self._fingerprint = checksums(self._leaves)
        return self._fingerprint

    # Batches ------------------------------------------------------------------------------------------------------

    def as_batch(self, x: object, y: object) -> JaxBatch:
        own = partial(np.asarray, dtype=self._like.dtype)
        return self._ready(JaxBatch(in_numbers("x", x, own), in_numbers("y", y, own)))

    def _ready(self, batch: Any) -> JaxBatch:
        own = isinstance(batch, JaxBatch)
        batch = (batch if own else JaxBatch(batch.x, batch.y, batch.weights, batch.ids)).ready()
        if not self._plain:
            return batch
        return plain.doubled(batch, self.keys_by_content(batch) if batch.ids is None else batch.ids)

    def rows_at_once(self, batch: JaxBatch) -> int:
        self._count(self._ready(batch))  # without a loss: nobody says whether these are train or query rows
        return rows_within_memory(self._numbers_per_row or 1, self._like)

    def row_weights(self, batch: JaxBatch) -> jax.Array | None:
        kind = jnp.promote_types(self._like.dtype, jnp.float32)
        return None if batch.weights is None else self.asked(np.asarray(batch.weights, dtype=kind))

    def host_arrays(self, batch: JaxBatch, weighted: bool = False) -> list[np.ndarray]:
        batch = batch.ready()
        return host_leaves(batch.x, batch.y, *([batch.weights] if weighted else []))

    # Gradients ----------------------------------------------------------------------------------------------------

    def grads(self, batch: JaxBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        model = self._measured if query else self._model
        batch = self._prepare(batch, model)
        if self._plain:
            names = [p.name for layout in self._plan.layouts for p in layout.block.parameters]
            rows = plain.gradients(model, self._chosen(names), self._leaves, plain.rows_of(batch))
            return rows_in_blocks(self.layouts, rows, self.row_weights(batch) if weighted else None)
        # Padded to a few sizes: each number of rows would compile anew.
        found = derivatives.gradients(model, self._plan, self._leaves, *batch.padded(self._least))
        # Padding's rows are cut off before anything is summed.
        losses, values = self._cut(found, batch)
        check_finite(losses, len(batch))
        return self._blocks([values], self.row_weights(batch) if weighted else None)[0]

    def fisher_grads(
        self, batch: JaxBatch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        if fisher == "empirical":  # needs no cotangents, so that the output may be any tree
            return [self.grads(batch, weighted=False)]
        batch = self._prepare(batch)
        keys = cache(lambda: self.row_keys(batch))  # only where a label is drawn
        told = self._for_likelihood()
        numbers = [partial(told._numbers, keys, number, seed) for number in draws]
        output, target, loss = told._output(batch), told._target(batch), told._output_loss(batch)
        return self._pull_back(batch, list(fisher_cotangents(self.likelihood, loss, output, target, fisher, numbers)))

    def ggn_grads(self, batch: JaxBatch) -> list[BlockGradients] | None:
        batch = self._prepare(batch)
        told = self._for_likelihood()
        output, target, loss = told._output(batch), told._target(batch), told._output_loss(batch)
        cotangents = ggn_cotangents(self.likelihood, loss, output, target)
        return None if cotangents is None else self._pull_back(batch, cotangents)

    def _output(self, batch: JaxBatch) -> Any:
        """Errors: NonFiniteValue where a loss is not finite."""
        losses, output = derivatives.outputs_and_losses(self._model, self._leaves, *batch.padded(self._least))
        check_finite(losses, len(batch))
        return self._cut(output, batch)

    def _for_likelihood(self) -> Self:
        """What gives the likelihood its arrays: NumPy's only to those of this library, as a user's asks for JAX's."""
        return self if type(self.likelihood) in NEUTRAL else self.in_jax()

    def _output_loss(self, batch: JaxBatch) -> JaxOutputLoss:
        return JaxOutputLoss(self._model.loss, self._given, rounded(len(batch), self._least))

    @property
    def _least(self) -> int:
        """Rows that gradients are compiled for, also where a batch has fewer: for small models one program for all."""
        return SMALL if self._work_per_row is not None and self._work_per_row * SMALL <= SMALL_WORK else 1

    def _target(self, batch: JaxBatch) -> Any:
        """Targets in the form of the outputs."""
        return jax.tree.map(self.asked, batch.y)

    def _numbers(self, keys: Callable[[], np.ndarray], number: int, seed: int, count: int, normal: bool) -> Any:
        """Random numbers [n, count] for the rows of a batch: uniform, or standard normal."""
        return self.asked(row_numbers(keys(), number, seed, count, normal))

    def _cut(self, values: object, batch: JaxBatch) -> Any:
        """What compiled functions gave, as the caller gets it, without the rows that padded the batch."""
        values, count = self._given(values), len(batch)
        if self._in_numpy:
            return jax.tree.map(lambda v: v[:count], values)  # views; JAX compiles it
        padded = len(jax.tree.leaves(values)[0])
        return values if padded == count else derivatives.first(count, values)

    def _pull_back(self, batch: JaxBatch, cotangents: list[jax.Array]) -> list[BlockGradients]:
        """Gradient values of the output along cotangents [n, ...]; layer inputs are those of the first."""
        xp = np if self._in_numpy else jnp
        stacked = _padded_to(xp.stack([self.asked(v) for v in cotangents]), rounded(len(batch), self._least), axis=1)
        x, _ = batch.padded(self._least)
        found = derivatives.pulled_back(self._model, self._plan, self._leaves, x, stacked)
        cut = derivatives.apart if self._in_numpy else None
        draws = derivatives.drawn(len(cotangents), len(batch), self._given(found), cut)
        return self._blocks(draws, None)

    def losses(self, batch: JaxBatch, *, query: bool = False) -> jax.Array:
        model = self._measured if query else self._model
        batch = self._prepare(batch, model)
        return self._cut(derivatives.losses(model, self._leaves, *batch.padded()), batch)

    def predicted(self, batch: JaxBatch) -> JaxBatch:
        batch = self._prepare(batch, self._measured)
        told = self._for_likelihood()
        output = told._cut(derivatives.outputs(self._model, self._leaves, batch.padded()[0]), batch)
        target = told.asked(batch.y) if is_array(batch.y) else batch.y
        return replace(batch, y=predicted_labels(self.likelihood, output, target))

    def of_output(self, function: OutputFunction) -> Self:
        chosen = {"margin": negative_margin, "logit": negative_logit}[function]
        model = Model(self._model.apply, self._model.tree, chosen)
        # Another loss: what the first rows showed of the old one is forgotten.
        return self._changed(
            _model=model, _measured=model, likelihood=None, _checked=0, _measured_rows=0, _normalisation=None
        )

    def in_float64(self) -> Self | None:
        """None unless JAX has float64 enabled."""
        # Without jax_enable_x64 JAX makes float64 arrays float32.
        if jnp.zeros(()).dtype != jnp.float64:
            return None
        leaves = {name: plain.double(leaf) for name, leaf in self._leaves.items()}
        return self._changed(_leaves=leaves, _fingerprint=None, _plain=True)

    def _chosen(self, names: Iterable[str]) -> Leaves:
        return {name: self._leaves[name] for name in names}

    def parameters(self, block: str) -> jax.Array:
        leaves = [wide(self._leaves[p.name]) for p in self._block(block).block.parameters]
        xp: Any = np if self._in_numpy else jnp
        return xp.concatenate([self._given(leaf).reshape(-1) for leaf in leaves])

    def _blocks(self, draws: list[dict[Place, Gradient]], weights: Any) -> list[BlockGradients]:
        """Errors: NonFiniteValue."""
        found = []
        for values in draws:
            blocks: BlockGradients = OrderedDict()
            for name, layout in self.layouts.items():
                value = derivatives.block_gradient(layout, values)
                blocks[name] = value if weights is None else value.weighted(weights)
            found.append(blocks)
        check_finite_grads(found)
        return found

    # The first rows -----------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch, model: Model | None = None) -> JaxBatch:
        """The batch as the function takes it; its first rows are looked at.

        model: with the loss that is asked of these rows, the train loss unless it is said. A measurement is tried on
        query rows alone: it may read targets that train rows do not have.
        """
        batch = self._ready(batch)
        measured = model is not None and model is not self._model
        checked = self._measured_rows if measured else self._checked
        if checked < min(2, len(batch)):  # one row, or two alike, do not show whether rows act on each other
            chosen = differing(row_keys(host_leaves(batch.x)))
            if checked < len(chosen):
                # Where it is not known how many rows fit into memory, few are taken.
                fit = rows_within_memory(self._numbers_per_row, self._like) if self._numbers_per_row else 1
                self._check(batch.take(chosen), self._measured if measured else self._model, min(len(batch), fit))
                if measured:
                    self._measured_rows = len(chosen)
                else:
                    self._checked = len(chosen)
        return batch

    def _count(self, batch: JaxBatch) -> None:
        """What gradients of a row cost, of the sum of its outputs."""
        if self._numbers_per_row is None:
            row = batch.take(slice(0, 1))
            check_rows(jax.eval_shape(partial(first_outputs, self._model), self._leaves, row.x), 1)
            self._learn(row.x)
            summed = Model(self._model.apply, self._model.tree, _sum_of_outputs)
            gradients = partial(derivatives.gradients, summed, self._plan)
            _, values = jax.eval_shape(gradients, self._leaves, row.x, row.y)  # shapes alone: nothing is compiled
            self._weigh(values)

    def _weigh(self, values: Mapping[Place, Gradient]) -> None:
        """What gradients of a row cost: numbers, and multiply-adds."""
        self._numbers_per_row = sum(math.prod(a.shape) for value in values.values() for a in value.arrays)
        self._work_per_row = sum((value.positions or 1) * math.prod(value.shape) for value in values.values())

    def _learn(self, x: object) -> None:
        """The parts that the parameters form, from some rows."""
        if not self._traced:
            program = self._model.program(self._leaves, x)
            self._plan = make_plan(self._model.tree, self._structure, program)
            self._traced = True

    def _check(self, rows: JaxBatch, model: Model, size: int) -> None:
        """Compare this loss's gradients with plain ones, one row at a time; see the class. size: of the whole batch."""
        last = len(rows) - 1
        names = tuple(p.name for layout in self._plan.layouts for p in layout.block.parameters)
        found = first_look(model, names, self._leaves, rows.x, rows.y)
        # First and last: what a model does with one of them it need not do with the other.
        for k in {0, last} if last else set():
            check_independence(found.together, found.alone, k)
        treats_rows = normalisation(model.loss, found.together, rows.y, found.loss, found.losses)
        self._normalisation = treats_rows if model is self._model else self._normalisation
        self._learn(rows.x)
        check_finite(found.last_loss, 1)
        wrong = self._disagreeing(rows.take(slice(last, last + 1)), model, found.gradient, size)
        if wrong:
            self._distrusted |= set(wrong)
            program = self._model.program(self._leaves, rows.x)
            # Plain gradients for these parameters from now on.
            self._plan = make_plan(self._model.tree, self._structure, program, sorted(self._distrusted))

    def _disagreeing(self, row: JaxBatch, model: Model, expected: Leaves, size: int) -> list[str]:
        """Parameters whose gradient for this row, from their uses, is not that of plain differentiation."""
        # As many rows as the batch has: what is compiled for these is what the batch itself will need.
        many = jax.tree.map(lambda v: np.repeat(np.asarray(v), rounded(size, self._least), axis=0), (row.x, row.y))
        _, values = derivatives.gradients(model, self._plan, self._leaves, *many)
        values = jax.tree.map(lambda v: np.asarray(v)[:1], values)
        self._weigh(values)
        flat = np.concatenate([derivatives.block_gradient(layout, values).flat() for layout in self._plan.layouts], 1)[
            0
        ]
        wrong, start = [], 0
        for name in (p.name for layout in self._plan.layouts for p in layout.block.parameters):
            if not close(flat[start : start + expected[name].size], expected[name]):
                wrong.append(name)
            start += expected[name].size
        return wrong

    # Second order -------------------------------------------------------------------------------------------------

    def curvature_product(self, batch: JaxBatch, block: str, vectors: jax.Array, kind: Kind) -> jax.Array:
        """vectors (K, D_block). Errors: ShapeMismatch."""
        batch = self._prepare(batch)
        size = self._block(block).size
        if vectors.ndim != 2 or vectors.shape[1] != size:
            raise ShapeMismatch(f"Expected vectors (K, {size}), got {tuple(vectors.shape)}.")
        if self._plain:
            chosen, rows = self._chosen([p.name for p in self._block(block).block.parameters]), plain.rows_of(batch)
            exact = plain.product(self._model, kind, vectors, chosen, self._leaves, rows, self.row_weights(batch))
            if exact is not None:
                return self._given(exact)
        (x, y), given, found = batch.padded(), self.row_weights(batch), []
        ones = np.ones(len(batch), jnp.promote_types(self._like.dtype, jnp.float32))
        weights = _padded_to(ones if given is None else given, rounded(len(batch)))
        step = rows_within_memory(8 * (size + len(batch) * 64), self._like)
        for start in range(0, len(vectors), step):
            some, stop = vectors[start : start + step], min(step, len(vectors) - start)
            losses, products = derivatives.curvature_products(
                self._model, self._block(block), kind, _padded_to(some, rounded(stop)), self._leaves, x, y, weights
            )
            check_finite(losses, len(batch))
            found.append(self._given(products)[:stop])
        return _stacked(found) if found else vectors

    def _block(self, block: str) -> Layout:
        layouts = self.layouts
        if block not in layouts:
            raise BlockMismatch(f"There is no block {block!r}; the blocks are {list(layouts)}.")
        return layouts[block]

    def mixed_prod(self, batch: JaxBatch, factors: Mapping[str, jax.Array]) -> jax.Array:
        batch = self._prepare(batch)
        x = differentiable_input(batch.x)
        check_finite_factors(factors)
        layouts = tuple(self._block(block) for block in factors)
        weights, count = self.row_weights(batch), len(next(iter(factors.values())))
        step = rows_within_memory(8 * (x.size + sum(layout.size for layout in layouts)), self._like)
        given, found = batch.padded(), []
        for start in range(0, count, step):
            stop = min(step, count - start)
            some = [_padded_to(factor[start : start + stop], rounded(stop)) for factor in factors.values()]
            losses, products = derivatives.mixed_products(self._model, layouts, some, self._leaves, *given)
            check_finite(losses, len(batch))
            mine = self._given(products)
            found.append((np if self._in_numpy else jnp).moveaxis(mine[: len(batch), :stop], 1, 0))
        whole = _stacked(found) if found else self.asked(np.zeros((0, *x.shape), self._like.dtype))
        return whole if weights is None else whole * weights.reshape((-1,) + (1,) * (whole.ndim - 2))

    def flat_mixed_grads(self, batch: JaxBatch) -> jax.Array:
        """(N, *x_shape, D). Errors: UnsupportedModel if x is not one floating-point array."""
        batch = self._prepare(batch)
        differentiable_input(batch.x)
        found = derivatives.mixed_gradients(self._model, self._plan.layouts, self._leaves, *batch.padded())
        losses, flat = self._cut(found, batch)
        check_finite(losses, len(batch))
        weights = self.row_weights(batch)
        return flat if weights is None else flat * weights.reshape((-1,) + (1,) * (flat.ndim - 1))


def _sum_of_outputs(output: object, target: object) -> jax.Array:
    return sum(
        (jnp.sum(leaf) for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.zeros(())
    )


def _stacked(pieces: list[Any]) -> Any:
    xp: Any = np if isinstance(pieces[0], np.ndarray) else jnp
    return pieces[0] if len(pieces) == 1 else xp.concatenate(pieces)


def _host_device() -> Any:
    """The CPU that JAX computes on by default; None where it computes elsewhere, or on several."""
    devices = jax.local_devices()
    return devices[0] if len(devices) == 1 and devices[0].platform == "cpu" else None


def _padded_to(array: Any, count: int, axis: int = 0) -> Any:
    """With zeros up to a number of rows."""
    missing = count - array.shape[axis]
    if not missing:
        return array
    xp: Any = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(array, [(0, missing if k == axis else 0) for k in range(array.ndim)])


def _hashable(function: Any) -> Any:
    """What is compiled is found again by its function; one that cannot be hashed is its own."""
    try:
        hash(function)
    except TypeError:
        return lambda *given: function(*given)
    return function


def _difference(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
