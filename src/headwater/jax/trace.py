"""A function of parameters and one row, taken apart: where a parameter is the weight of a product, a convolution or a
table, and where it is anything else.

A parameter often reaches its product transposed, reshaped or converted. What such a view is, NumPy says: every
parameter is followed as a NumPy view of an untouched buffer of its shape, one byte a number, so that the view's offset
and strides say which of the parameter's numbers it holds. In the same way the output of a product is followed to the
addition of a bias.

Calls (jit, remat) are opened where a parameter goes in. Loops, branches and functions with derivatives of their own
stay closed, and their parameters are `loose`: their gradients come from plain differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np

from headwater.blocks import Piece
from headwater.jax.tree import Leaves, Tree

Slot = int
"""A value's number, in the order in which values are computed."""


@dataclass(frozen=True)
class View:
    """Some numbers of a parameter: `array` is a view of `buffer`, which has the parameter's shape."""

    parameter: str
    buffer: np.ndarray
    array: np.ndarray

    @property
    def offset(self) -> int:
        return _address(self.array) - _address(self.buffer)

    def piece(self, outputs: Sequence[int], inputs: Sequence[int], array: np.ndarray | None = None) -> Piece | None:
        """The view as a matrix [outputs, inputs] of axes, if its numbers lie one after the other; else None."""
        array = self.array if array is None else array
        o, i = ([array.shape[axis] for axis in axes] for axes in (outputs, inputs))
        shape = int(np.prod(o)), int(np.prod(i))
        start = _address(array) - _address(self.buffer)
        # Contiguous in this order of axes: the numbers are a matrix [o, i] as they lie in the parameter.
        if array.transpose(*outputs, *inputs).flags.c_contiguous:
            return Piece(self.parameter, start, shape)
        if array.transpose(*inputs, *outputs).flags.c_contiguous:
            return Piece(self.parameter, start, shape, transposed=True)
        return None


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def by_stride(array: np.ndarray, axes: Sequence[int]) -> tuple[int, ...]:
    """Axes in the order in which their numbers lie, the slowest first."""
    return tuple(sorted(axes, key=lambda axis: -array.strides[axis]))


@dataclass(frozen=True)
class Ahead:
    """The output of a site, on its way: `features` [its shape] views a buffer [o] and says which output is where."""

    site: int
    buffer: np.ndarray
    features: np.ndarray
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Site:
    """A step where a parameter is a weight: its pieces, which of the step's inputs is the other operand, and a rule
    that makes (a [n, t, i], b [n, t, o]) for each piece from that operand [n, ...] and the output's gradient [n, ...];
    for a table, (ids [n, t], values [n, t, d])."""

    step: int
    parameter: str
    operand: int
    pieces: tuple[Piece, ...]
    rule: Callable[[Any, Any], list[tuple[Any, Any]]]
    is_table: bool = False
    bias: str | None = None


@dataclass(frozen=True)
class Step:
    """One equation: its inputs are slots or constants."""

    equation: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Slot, ...]


@dataclass(frozen=True)
class Constant:
    value: Any


@dataclass
class Program:
    """A function as a list of steps, and what was found about its parameters."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the attributed parameters."""
    parameters: dict[str, Slot] = field(default_factory=dict)
    arguments: tuple[Slot, ...] = ()
    steps: list[Step] = field(default_factory=list)
    results: tuple[Any, ...] = ()
    structure: Any = None
    sites: list[Site] = field(default_factory=list)
    loose: set[str] = field(default_factory=set)

    def zeros(self, steps: Sequence[int]) -> dict[int, jax.Array]:
        """Of the shapes of the outputs of these steps."""
        shapes = {number: self.steps[number].equation.outvars[0].aval for number in steps}
        return {number: jnp.zeros(aval.shape, aval.dtype) for number, aval in shapes.items()}

    def run(self, leaves: Leaves, x: object, nudges: Mapping[int, Any]) -> tuple[Any, dict[int, Any]]:
        """The output, with `nudges` added to the outputs of some steps; and the other operand of those steps."""
        # An interpreter of the jaxpr: it is itself traced, so that jit, vmap and grad see ordinary operations.
        values: dict[Slot, Any] = {slot: leaves[name] for name, slot in self.parameters.items()}
        values |= dict(zip(self.arguments, jax.tree.leaves(x), strict=True))
        operands = {}
        wanted = {site.step: site for site in self.sites if site.step in nudges}
        for number, step in enumerate(self.steps):
            given = [v.value if isinstance(v, Constant) else values[v] for v in step.inputs]
            primitive = step.equation.primitive
            found = primitive.bind(*given, **primitive.get_bind_params(step.equation.params))
            found = list(found) if primitive.multiple_results else [found]
            if number in wanted:
                operands[number] = given[wanted[number].operand]
                # A zero is added: the gradient by it is the gradient at the step's output, without one by the weight.
                found = [found[0] + nudges[number]]
            values |= dict(zip(step.outputs, found, strict=True))
        results = [v.value if isinstance(v, Constant) else values[v] for v in self.results]
        return jax.tree.unflatten(self.structure, results), operands


def trace(apply: Callable[[Any, Any], Any], tree: Tree, leaves: Leaves, row: object) -> Program:
    """`apply` on a batch of one row, taken apart. leaves and row may be arrays or their shapes."""
    # Shapes alone: tracing reads no numbers, and costs no memory for them.
    shapes = jax.eval_shape(lambda *given: given, dict(leaves), row)
    closed, output = jax.make_jaxpr(lambda given, x: apply(tree.build(given), x), return_shape=True)(*shapes)
    return _Tracer(tree).program(closed, sorted(tree.names), jax.tree.structure(output))


class _Tracer:
    """Opens calls, follows parameters and products, and writes down what it finds."""

    def __init__(self, tree: Tree):
        self.found = Program({p.name: p.shape for p in tree.parameters})
        self.views: dict[Slot, View] = {}
        self.ahead: dict[Slot, Ahead] = {}
        self.readers: dict[Slot, int] = {}
        self.biases: list[tuple[Ahead, str]] = []
        self.count = 0

    def program(self, closed: Any, names: Sequence[str], structure: Any) -> Program:
        inputs = tuple(self._slot() for _ in closed.jaxpr.invars)
        self.found.parameters = dict(zip(names, inputs, strict=False))
        self.found.arguments = inputs[len(names) :]
        for name, slot in self.found.parameters.items():
            if name in self.found.shapes:
                # One byte a number, never read: addresses and strides are all that is asked of it.
                buffer = np.empty(self.found.shapes[name], dtype=np.int8)
                self.views[slot] = View(name, buffer, buffer)
        self.found.results = tuple(self._open(closed.jaxpr, closed.consts, inputs))
        self.found.structure = structure
        for result in self.found.results:
            self._read(result)
            # A parameter that is itself an output has no product to stand for it.
            self._loosen(result)
        self._assign_biases()
        return self.found

    def _slot(self) -> Slot:
        self.count += 1
        return self.count - 1

    def _read(self, given: Any) -> None:
        if not isinstance(given, Constant):
            self.readers[given] = self.readers.get(given, 0) + 1

    def _open(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The steps of a jaxpr; the slots or constants of its results."""
        known = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        known |= dict(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atom: object) -> Any:
            return Constant(atom.val) if isinstance(atom, jax_core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            given = tuple(look_up(atom) for atom in equation.invars)
            inner = _called(equation)
            # Calls without a parameter stay closed: jit keeps its compiled form, and the program stays short.
            if inner is not None and any(_is_slot(v) and v in self.views for v in given):
                results = self._open(*inner, given)
            else:
                results = list(self._add(equation, given))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def _add(self, equation: Any, given: tuple[Any, ...]) -> tuple[Slot, ...]:
        outputs = tuple(self._slot() for _ in equation.outvars)
        self.found.steps.append(Step(equation, given, outputs))
        for value in given:
            self._read(value)
        self._follow(equation, given, outputs)
        return outputs

    def _follow(self, equation: Any, given: tuple[Any, ...], outputs: tuple[Slot, ...]) -> None:
        """What the equation does to the parameters and products that go in."""
        name = equation.primitive.name
        views = {k: self.views[v] for k, v in enumerate(given) if _is_slot(v) and v in self.views}
        aheads = {k: self.ahead[v] for k, v in enumerate(given) if _is_slot(v) and v in self.ahead}
        if len(given) == 1 and (views or aheads):
            moved = _moved(equation, views[0].array if views else aheads[0].features)
            if moved is not None and views:
                # Still the same numbers of the parameter, seen otherwise: no use of it yet.
                self.views[outputs[0]] = replace(views[0], array=moved)
                return
            if moved is not None:
                before = aheads[0]
                self.ahead[outputs[0]] = replace(before, features=moved, slots=(*before.slots, outputs[0]))
                return
        if name in ("add", "add_any") and len(views) == len(aheads) == 1 and views.keys() != aheads.keys():
            (view,), (before,) = views.values(), aheads.values()
            # Only noted: whether the product has other readers is known at the end.
            if _is_bias(view, before, equation.outvars[0].aval.shape):
                self.biases.append((before, view.parameter))
                return
        if name == "add" and aheads and not views:  # what else is added does not change a bias's gradient
            before = next(iter(aheads.values()))
            if before.features.shape == equation.outvars[0].aval.shape:
                self.ahead[outputs[0]] = replace(before, slots=(*before.slots, outputs[0]))
                return
        site = self._site(equation, views) if len(views) == 1 and name in _SITES else None
        if site is None:
            # Anything that no rule knows: right by plain differentiation, at the cost of whole matrices.
            self.found.loose |= {view.parameter for view in views.values()}
            return
        found, features = site
        self.found.sites.append(found)
        if features is not None:
            self.ahead[outputs[0]] = Ahead(len(self.found.sites) - 1, *features, outputs)

    def _site(self, equation: Any, views: Mapping[int, View]) -> _Found:
        ((position, view),) = views.items()
        return _SITES[equation.primitive.name](len(self.found.steps) - 1, equation, position, view)

    def _loosen(self, given: object) -> None:
        if _is_slot(given) and given in self.views:
            self.found.loose.add(self.views[given].parameter)

    def _assign_biases(self) -> None:
        """A bias belongs to a product if nothing else reads the product on its way to the addition."""
        # Only at the end: who else reads a product is not known while equations are still to come.
        for before, name in self.biases:
            site = self.found.sites[before.site]
            if site.bias is None and all(self.readers.get(slot) == 1 for slot in before.slots):
                self.found.sites[before.site] = replace(site, bias=name)
            else:
                self.found.loose.add(name)


def _is_slot(value: object) -> bool:
    return not isinstance(value, Constant)


def _called(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr of a call that has no meaning of its own, and its constants; None for everything else."""
    if equation.primitive.name not in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if inner is None:
        return None
    return (inner.jaxpr, inner.consts) if isinstance(inner, jax_core.ClosedJaxpr) else (inner, ())


def _moved(equation: Any, array: np.ndarray) -> np.ndarray | None:
    """What an operation that only moves numbers makes of the array; None for any other, or if it would be a copy."""
    name, params = equation.primitive.name, equation.params
    shape = equation.outvars[0].aval.shape
    if name in ("copy", "copy_p", "convert_element_type", "sharding_constraint", "reduce_precision"):
        kinds = [atom.aval.dtype for atom in (*equation.invars, *equation.outvars)]
        # A conversion to whole numbers has no gradient; what comes after is no view of the parameter.
        return array if all(jnp.issubdtype(kind, jnp.floating) for kind in kinds) else None
    if name == "transpose":
        return array.transpose(params["permutation"])
    if name in ("squeeze", "expand_dims") or (name == "reshape" and params.get("dimensions") is None):
        moved = array.reshape(shape)
        # NumPy copies where strides cannot say the new shape: a copy has lost where its numbers are.
        return moved if np.may_share_memory(moved, array) else None
    if name == "broadcast_in_dim":
        kept = set(map(int, params["broadcast_dimensions"]))
        # A broadcast has stride 0: the view then shows that many outputs share one number.
        spread = array[tuple(slice(None) if axis in kept else None for axis in range(len(shape)))]
        return np.broadcast_to(spread, shape)
    if name == "slice":
        strides = params["strides"] or (1,) * array.ndim
        return array[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]
    return None


def _is_bias(view: View, before: Ahead, shape: tuple[int, ...]) -> bool:
    """Whether the whole parameter is added, each number to the output of its own number."""
    # Both from their first number: a slice of a bias, or of the outputs, is no bias of this product.
    starts = view.offset == 0 and _address(before.features) == _address(before.buffer)
    if view.buffer.size != before.buffer.size or before.features.shape != shape or not starts:
        return False
    added = np.broadcast_to(view.array, shape)
    pairs = zip(shape, added.strides, before.features.strides, strict=True)
    # Equal strides along every axis: number k of the bias meets output k, wherever it is.
    return all(size == 1 or one == other for size, one, other in pairs)


# Sites ----------------------------------------------------------------------------------------------------------------

_Features = tuple[np.ndarray, np.ndarray]
"""A buffer [o], and a view of it with the shape of the product: which output each number is."""

_Found = tuple[Site, _Features | None] | None


def _product(step: int, equation: Any, position: int, view: View) -> _Found:
    """A dot_general without batch axes: contracted axes are inputs, the weight's others outputs."""
    contracted, (left_batch, right_batch) = equation.params["dimension_numbers"]
    # A weight with a batch axis is several matrices, a different one for each entry: no single outer product.
    if left_batch or right_batch:
        return None
    other = 1 - position
    # In the order in which the weight's numbers lie, so that both operands are flattened alike.
    pairs = sorted(zip(contracted[position], contracted[other], strict=True), key=lambda p: -view.array.strides[p[0]])
    inputs, data_inputs = [p[0] for p in pairs], [p[1] for p in pairs]
    free = [axis for axis in range(view.array.ndim) if axis not in inputs]
    outputs = by_stride(view.array, free)
    piece = view.piece(outputs, inputs)
    if piece is None:
        return None
    rank = equation.invars[other].aval.ndim
    data_free = [axis for axis in range(rank) if axis not in data_inputs]
    first = 0 if position == 0 else len(data_free)
    # dot_general puts the left operand's free axes before the right one's.
    places = [first + free.index(axis) for axis in outputs]
    passed = [axis for axis in range(len(data_free) + len(free)) if axis not in places]

    def rule(operand: jax.Array, grad: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        return [(_matrices(operand, data_free, data_inputs), _matrices(grad, passed, places))]

    shape = equation.outvars[0].aval.shape
    features = _features([shape[axis] for axis in places], places, shape)
    return Site(step, view.parameter, other, (piece,), rule), features


def _matrices(array: jax.Array, positions: Sequence[int], numbers: Sequence[int]) -> jax.Array:
    """[n, *axes] with these axes as positions and numbers: [n, t, d]."""
    moved = array.transpose(0, *(1 + axis for axis in (*positions, *numbers)))
    size = int(np.prod([array.shape[1 + axis] for axis in numbers]))
    return moved.reshape(array.shape[0], -1, size)


def _features(sizes: Sequence[int], places: Sequence[int], shape: tuple[int, ...]) -> _Features:
    """For outputs of these sizes at these axes of the product."""
    # A byte for each output; the product's shape is a view of it, with stride 0 along positions.
    buffer = np.empty(int(np.prod(sizes)), dtype=np.int8)
    moved = buffer.reshape(tuple(sizes)).transpose(*np.argsort(places))
    moved = moved[tuple(slice(None) if k in places else None for k in range(len(shape)))]
    return buffer, np.broadcast_to(moved, shape)


def _convolution(step: int, equation: Any, position: int, view: View) -> _Found:
    """A convolution, or each of its groups, as a product of patches and the weight."""
    params = equation.params
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    # As the other operand, or with batch groups, the parameter is data that is convolved, not a kernel.
    if position != 1 or params["batch_group_count"] != 1:
        return None
    weight = view.array.transpose(dims.rhs_spec)
    inputs = by_stride(weight, range(1, weight.ndim))
    # Outputs of one group; lax keeps them side by side.
    each = weight.shape[0] // groups
    cuts = [weight[k * each : (k + 1) * each] for k in range(groups)]
    pieces = [view.piece((0,), inputs, cut) for cut in cuts]
    if any(piece is None for piece in pieces):
        return None
    kernel = weight.shape[2:]

    def rule(operand: jax.Array, grad: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        def patches(row: jax.Array) -> jax.Array:
            # A convolution is a product of the kernel with the patches that it sees: the same sum as for a linear map.
            found = jax.lax.conv_general_dilated_patches(
                row.transpose(dims.lhs_spec),
                kernel,
                params["window_strides"],
                params["padding"],
                params["lhs_dilation"],
                params["rhs_dilation"],
                # Patches are copies of inputs, taken by a convolution: lower precision on some devices would round
                # them.
                precision=jax.lax.Precision.HIGHEST,
            )
            found = found.reshape(found.shape[0], groups, weight.shape[1], *kernel, -1)
            order = (1, 0, found.ndim - 1, *(axis + 1 for axis in inputs))
            return found.transpose(order).reshape(groups, -1, int(np.prod(weight.shape[1:])))

        a = jax.vmap(patches)(operand)
        b = jax.vmap(lambda g: g.transpose(dims.out_spec))(grad)
        b = jnp.moveaxis(b, 2, -1).reshape(grad.shape[0], -1, groups, each)
        return [(a[:, k], b[:, :, k]) for k in range(groups)]

    shape = equation.outvars[0].aval.shape
    # With groups a bias would be cut over several parts: it stays plain.
    features = _features([weight.shape[0]], [dims.out_spec[1]], shape) if groups == 1 else None
    return Site(step, view.parameter, 0, tuple(pieces), rule), features  # type: ignore[arg-type]


def _table(step: int, equation: Any, position: int, view: View) -> _Found:
    """A gather of whole rows: a table and ids."""
    params, table = equation.params, view.array
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if position != 0 or numbers.operand_batching_dims or 0 not in numbers.start_index_map or table.ndim < 2:
        return None
    # A gather of parts of rows, or of several rows at once, is no look-up by ids.
    whole = sizes[0] == 1 and tuple(sizes[1:]) == table.shape[1:]
    piece = view.piece((0,), range(1, table.ndim))
    if not whole or piece is None or piece.transposed:
        return None
    column, rows = numbers.start_index_map.index(0), table.shape[0]
    clips = params["mode"] == jax.lax.GatherScatterMode.CLIP

    def rule(operand: jax.Array, grad: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        ids = operand[..., column].reshape(operand.shape[0], -1)
        passed = [axis for axis in range(grad.ndim - 1) if axis not in numbers.offset_dims]
        values = _matrices(grad, passed, numbers.offset_dims)
        # An id outside reads no row under "fill" and "drop", and so gives none a gradient; under "clip" it reads the
        # last.
        inside = (ids >= 0) & (ids < rows)
        values = values if clips else jnp.where(inside[..., None], values, 0)
        return [(jnp.clip(ids, 0, rows - 1), values)]

    return Site(step, view.parameter, 1, (piece,), rule, is_table=True), None


_SITES: dict[str, Callable[[int, Any, int, View], _Found]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _table,
}
