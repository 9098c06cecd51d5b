"""Influence, composed of a gradient provider and one operator per block.

    score(query, train) = sum over blocks  < Op_block(grad loss(query)), grad loss(train) >

Op_block is (C + damping I)^-1 with C the mean curvature over the training rows, or a method's approximation of it.
Sign: positive means that more weight on the train row lowers the query's loss. Unit: the decrease of the query's loss
per unit of weight in the mean objective; divided by the number of train rows, the increase when the row is removed.
"""

from __future__ import annotations

import copy
import os
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from headwater.arrays import Array, namespace, transpose
from headwater.curvature.known_rows import LoadersSeen, RowMemory
from headwater.curvature.passes import KnownRows, Unpack, Unpacked, check_loader, first_batch, paired
from headwater.curvature.places import located
from headwater.curvature.saved import TakenApart, moved, put_together, take_apart
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    IndefiniteCurvature,
    InvalidInput,
    InvalidSetting,
    NotFittedError,
    RulesChanged,
    SingularOperator,
    StaleFit,
)
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.provider import BlockGradients, BlockProvider, StructuredGradientProvider
from headwater.gradients.words import in_words
from headwater.methods.base import Curvatures, Method
from headwater.methods.damping import Damping, Relative, damping_by_block, in_units
from headwater.operators.algebra import IdentityOperator, LinearOperator, ScaledOperator
from headwater.operators.iterative import SolveReport, apply_path, joined, recorded_solves
from headwater.operators.kronecker import SeparableOperator
from headwater.operators.released import ReleasedOperator, penalised
from headwater.operators.structured import BlockDiagonalOperator
from headwater.types import BilinearForm, BlockMapper, InfluenceMode, OperatorGradientComposition, TensorType

if TYPE_CHECKING:
    import numpy as np

    from headwater.run.audit import Audit
    from headwater.run.calibrate import Calibration, Retrained
    from headwater.run.diagnosis import EffectiveDof
    from headwater.run.verification import Verification
    from headwater.status import Status
    from headwater.store.diagnosis import Diagnosis
    from headwater.store.scores import Extremes, Scores

ByBlock = OrderedDict[str, Array]
Verb = TypeVar("Verb", bound=Callable[..., Any])

SAVED_FORMAT = 2
"""Of the folders that `save` writes."""
ROW_KEYS = "keys of the rows"
"""Beside the curvature's arrays in such a folder."""


class InfluenceMapper(BlockMapper[Array, Any, OperatorGradientComposition]):
    """The contract's block mapper over a structured provider: one pass through the model serves all blocks.

    A block whose operator has a bilinear form of its own is computed by that form, and the others the faster way.
    """

    def __init__(self, provider: StructuredGradientProvider, operators: Mapping[str, LinearOperator]):
        blocks: OrderedDict[str, OperatorGradientComposition] = OrderedDict(
            (name, OperatorGradientComposition(op, provider.block(name))) for name, op in operators.items()
        )
        super().__init__(blocks)
        self.provider = provider
        self.operators = OrderedDict(operators)

    @property
    def own_forms(self) -> dict[str, BilinearForm]:
        """The forms of those blocks whose operator's form is another than `<Op left, right>`."""
        forms = {name: operator.as_bilinear_form() for name, operator in self.operators.items()}
        return {name: form for name, form in forms.items() if not form.is_default_of(self.operators[name])}

    def generate_transformed_grads(self, batch: Any) -> Generator[Array, None, None]:
        grads = self.provider.grads(batch, query=True)
        for name, operator in self.operators.items():
            yield operator.apply_block(operator.seen(grads[name])).flat()

    def generate_interactions(
        self, left_batch: Any, right_batch: Any, mode: InfluenceMode | str
    ) -> Generator[Array, None, None]:
        mode, own = InfluenceMode(mode), self.own_forms
        right_batch = left_batch if right_batch is None else right_batch
        plain = [name for name in self.operators if name not in own]
        shared = self._shared_interactions(plain, left_batch, right_batch, mode)
        for name in self.operators:
            yield self._by_form(name, left_batch, right_batch, mode) if name in own else next(shared)

    def _by_form(self, name: str, left_batch: Any, right_batch: Any, mode: InfluenceMode) -> Array:
        # Rows on the left are explained, rows on the right are train rows; the same rows need two objects to say so.
        right_batch = copy.copy(left_batch) if right_batch is left_batch else right_batch
        provider = BlockProvider(self.provider, name, explained=left_batch)
        return OperatorGradientComposition(self.operators[name], provider).interactions(left_batch, right_batch, mode)

    def _shared_interactions(
        self, names: Sequence[str], left_batch: Any, right_batch: Any, mode: InfluenceMode
    ) -> Iterator[Array]:
        """Of these blocks, from one pass over either batch."""
        if not names:
            return
        every = self.provider.grads(left_batch, query=True)
        grads = OrderedDict((name, every[name]) for name in names)
        if mode is InfluenceMode.Perturbation:
            for name, value in grads.items():
                operator = self.operators[name]
                yield self.provider.mixed_prod(right_batch, {name: operator.apply_block(operator.seen(value)).flat()})
            return
        queries = self.sides(grads, len(right_batch) / len(left_batch)).queries(grads)
        train = self.provider.grads(right_batch)
        for name in names:
            yield queries.score(name, train[name])

    def generate_interactions_from_transformed_grads(
        self, left_factors: Array | Mapping[str, Array], right_batch: Any, mode: InfluenceMode | str
    ) -> Generator[Array, None, None]:
        mode, factors = InfluenceMode(mode), self._factors_by_block(left_factors)
        if mode is InfluenceMode.Perturbation:
            for name in self.operators:
                yield self.provider.mixed_prod(right_batch, {name: factors[name]})
            return
        grads = self.provider.grads(right_batch)
        for name, operator in self.operators.items():
            yield transpose(operator.seen(grads[name]).project(factors[name]))

    def perturbation(self, factors: Array | Mapping[str, Array], batch: Any) -> Array:
        """All blocks together, in one differentiation: (N, M, *x_shape)."""
        return self.provider.mixed_prod(batch, self._factors_by_block(factors))

    def sides(self, grads: BlockGradients, train_per_query: float) -> Sides:
        """Where queries like these and `train_per_query` train rows each had best meet."""
        forms = self.own_forms
        pairs = {name: self._sides(name, value, train_per_query, name in forms) for name, value in grads.items()}
        return Sides(
            OrderedDict((name, left) for name, (left, _) in pairs.items()),
            OrderedDict((name, right) for name, (_, right) in pairs.items()),
            forms,
        )

    def _sides(
        self, name: str, value: BlockGradient, train_per_query: float, by_form: bool
    ) -> tuple[LinearOperator, LinearOperator]:
        if by_form:  # the gradients as they are, for the form's `inner_prod`
            return (IdentityOperator(self.operators[name].input_size),) * 2
        return self.operators[name].block_sides(value, train_per_query)


@dataclass(frozen=True)
class Sides:
    """What query gradients go through, and what train gradients go through, before they meet; see `block_sides`.

    Chosen once for a run: queries that went through one pair of sides cannot meet train rows that went through another.
    """

    left: Mapping[str, LinearOperator]
    right: Mapping[str, LinearOperator]
    forms: Mapping[str, BilinearForm] = field(default_factory=dict)
    """Where an operator has a form of its own: what then takes the place of the dot product."""

    def queries(self, grads: BlockGradients) -> Queries:
        """Query gradients, ready to meet train rows."""
        left = OrderedDict((name, _pass(self.left[name], v).settled(v)) for name, v in grads.items())
        return Queries(left, self.right, self.forms)


@dataclass(frozen=True)
class Queries:
    """Query gradients after their side of the operator, and the side that train gradients go through."""

    left: BlockGradients
    right: Mapping[str, LinearOperator]
    forms: Mapping[str, BilinearForm] = field(default_factory=dict)

    def scores(self, train: BlockGradients) -> ByBlock:
        """By block: [q, n]."""
        return OrderedDict((name, self.score(name, value)) for name, value in train.items())

    def score(self, name: str, train: BlockGradient) -> Array:
        """Of one block: [q, n]."""
        if name in self.forms:
            return self.forms[name].inner_prod(self.left[name].flat(), train.flat())
        return self.left[name].inner(_pass(self.right[name], train))


@dataclass(frozen=True)
class Fitted:
    """What `fit` found: each block's undamped curvature, the rows' total weight; which weights the model had, where."""

    curvature: Curvatures
    rows: float
    fingerprint: tuple
    form: int = 0
    """The provider's, of the gradients that it was made of."""
    device: Any = None
    keys: np.ndarray | None = None
    """What the rows are known by (`RowKeys.fitted`), sorted: uint64; None where that was not kept."""


def _in_own_precision(verb: Verb) -> Verb:
    """Without the caller's mixed precision, but for the model's own call; see `own_precision` of providers."""

    @wraps(verb)
    def wrapped(self: ComposableInfluence, *args: Any, **kwargs: Any) -> Any:
        with self.source.own_precision():
            return verb(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class ComposableInfluence(ABC, Generic[TensorType]):
    """Influence of train rows on query rows; a framework's subclass only says how its provider is made.

    x and y are a framework's tensors (x also a tuple or dict of them); N_test and N_train are numbers of rows.
    """

    def __init__(
        self,
        provider: StructuredGradientProvider,
        method: Method,
        *,
        damping: Damping | Mapping[str, Damping] | None = None,
        unpack: Unpack | None = None,
    ):
        if not isinstance(method, Method):
            raise InvalidInput(f"method is {method!r}; expected settings such as hw.Ekfac() or hw.Direct().")
        self.method = method
        self.source = provider
        self.provider = method.view(provider)
        self.damping = damping_by_block(damping, method.default_damping, self.provider.layouts)
        self._solves: dict[str, SolveReport] = {}
        self._calibration: Calibration | None = None
        self._fitted: Fitted | None = None
        self._mapper: InfluenceMapper | None = None
        if unpack is not None and not callable(unpack):
            raise InvalidInput(f"unpack is {unpack!r:.60}; expected a function: batch -> x, y[, ids, weights].")
        self._unpack = unpack
        self._loaders = LoadersSeen()

    # Fitting ------------------------------------------------------------------------------------------------------

    @_in_own_precision
    def fit(self, loader: Iterable[Any], *, progress: bool = False) -> Self:
        """Learn the curvature of the mean loss over the loader's rows; it gives (x, y) or batches, repeatably.

        Errors: BatchMismatch, naming batch and row, if a later pass over the loader gives other rows than the first.
        """
        while True:
            rows = KnownRows(self.source, self._read_as(loader, "train"))
            try:
                with located():
                    curvature, weight = self.method.fit(self.provider, rows, progress)
                break
            except RulesChanged:  # fewer layers are left whose rules are trusted, so that this ends
                continue
        known = rows.memory.fitted
        self._keep(
            Fitted(curvature, weight, self.provider.fingerprint(), self.provider.form, self.source.device, known)
        )
        self._loaders = LoadersSeen()
        self._loaders.keep(loader, rows.memory)
        self._calibration = None
        return self

    def _keep(self, fitted: Fitted) -> None:
        self._mapper = self._make_mapper(fitted)
        self._fitted = fitted

    def as_loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """What is read of a collection of rows: itself; a framework's subclass may take other things than batches."""
        return loader

    def _read_as(self, loader: Iterable[Any], role: str) -> Iterable[Any]:
        """A user's loader, as it is read: its items unpacked, and in the framework's way. Errors: InvalidInput."""
        if isinstance(loader, KnownRows):
            return self.as_loader(loader)
        if self._unpack is not None:
            check_loader(loader, role)
            loader = Unpacked(loader, self._unpack)
        return self.as_loader(loader)

    def train_rows(self, loader: Iterable[Any]) -> KnownRows:
        """A loader of train rows for a run; the same object gives the same rows as when it was last read."""
        if isinstance(loader, KnownRows):
            return loader
        return KnownRows(self.source, self._read_as(loader, "train"), "train", self._loaders.memory(loader))

    def query_rows(self, loader: Iterable[Any]) -> KnownRows:
        """A loader of query rows for a run."""
        return (
            loader if isinstance(loader, KnownRows) else KnownRows(self.source, self._read_as(loader, "query"), "query")
        )

    @property
    def fitted_keys(self) -> np.ndarray | None:
        """What the fitted rows are known by, sorted (see `RowKeys`); None where that is not known."""
        return self._need_fit().keys

    @property
    def is_fitted(self) -> bool:
        return self._fitted is not None

    @property
    def n_parameters(self) -> int:
        """D, the attributed parameters."""
        return self.provider.n_parameters

    @property
    def n_train(self) -> float:
        """The rows that were fitted, each counted with its weight."""
        return self._need_fit().rows

    @property
    def explained(self) -> str:
        """What the scores are about: "loss", or the name of the measurement."""
        return self.provider.explained

    @property
    def normalisation(self) -> str | None:
        """How the loss treats several rows ("mean", "sum", "none", ...), once rows have been seen."""
        return self.provider.normalisation

    @property
    def block_names(self) -> list[str]:
        return list(self.provider.layouts)

    @_in_own_precision
    def with_damping(self, damping: Damping | Mapping[str, Damping]) -> Self:
        """The same influence at another damping; everything that was fitted is used again."""
        other = copy.copy(self)
        other.damping = damping_by_block(damping, self.method.default_damping, self.provider.layouts)
        other._mapper = None if self._fitted is None else other._make_mapper(self._fitted)
        other._solves, other._calibration = {}, None
        return other

    def unfitted(
        self,
        source: StructuredGradientProvider | None = None,
        method: Method | None = None,
        damping: Damping | Mapping[str, Damping] | None = None,
    ) -> Self:
        """A copy that has yet to be fitted: with another provider, method or damping where one is given.

        Another method sees what this one's view shows. Blocks stay the same.
        """
        other = copy.copy(self)
        other._fitted, other._mapper, other._solves, other._calibration = None, None, {}, None
        if source is not None:
            other.source, other.provider = source, self.method.view(source)
        if method is not None:
            other.method = method
        if damping is not None:
            other.damping = damping_by_block(damping, other.method.default_damping, other.provider.layouts)
        return other

    @property
    def curvature(self) -> Curvatures:
        """The undamped curvature of each block. Errors: NotFittedError."""
        return self._need_fit().curvature

    @property
    def calibration(self) -> Calibration | None:
        """How the damping was chosen, by `calibrate`; None for a damping that was given, or the method's default."""
        return self._calibration

    @property
    def solves(self) -> dict[str, SolveReport]:
        """How far the solves of the last call came, by block; empty for a method that solves nothing."""
        return self._solves

    @property
    def status(self) -> Status:
        """What is known of this influence: spectrum, damping, what was cut off, solves. `print` shows a table."""
        from headwater.status import status_of

        return status_of(self)

    @property
    def absolute_damping(self) -> dict[str, float]:
        """The damping of each block in the units of its curvature."""
        curvature = self.curvature
        return {name: in_units(self.damping[name], curvature[name].mean_eigenvalue()) for name in curvature}

    @property
    def truncation_errors(self) -> dict[str, list[float]]:
        """For a separable inverse spectrum: each part's relative error, by block; exact parts have zero."""
        return {
            name: [op.truncation_error if isinstance(op, SeparableOperator) else 0.0 for op in _parts(block)]
            for name, block in self.block_mapper.operators.items()
        }

    @property
    def block_mapper(self) -> InfluenceMapper:
        """The fitted operators, composed with the provider. Errors: NotFittedError."""
        self._need_fit()
        assert self._mapper is not None
        return self._mapper

    def _make_mapper(self, fitted: Fitted) -> InfluenceMapper:
        inverses = (
            (name, self._scaled(name, self._invert(name, curvature, fitted.rows)))
            for name, curvature in fitted.curvature.items()
        )
        mapper = InfluenceMapper(self.provider, OrderedDict(inverses))
        if all(c.psd and c.mean_eigenvalue() == 0.0 for c in fitted.curvature.values()):
            raise SingularOperator(
                "The curvature of every block is zero, so that there is nothing to invert. Is the loss linear in the "
                "model's output, as NLLLoss behind a LogSoftmax, or an absolute error? It has no GGN: use "
                "curvature='fisher' or hw.Ekfac(), or let the model return logits, with CrossEntropyLoss."
            )
        return mapper

    def _scaled(self, name: str, inverse: LinearOperator) -> LinearOperator:
        scale = self.provider.block_scale(name)
        return inverse if scale == 1.0 else ScaledOperator(scale, inverse)

    def _invert(self, name: str, curvature: LinearOperator, rows: float) -> LinearOperator:
        """A block without any curvature and with relative damping has no scale, and no train row reaches it: zero."""
        damping, mean = self.damping[name], curvature.mean_eigenvalue()
        if isinstance(damping, Relative) and mean == 0.0:
            bounds = None if curvature.psd else curvature.spectrum_bounds()
            if bounds is not None and bounds[1] > 0:
                raise IndefiniteCurvature(
                    f"Block {name!r}: the mean eigenvalue is 0, between {bounds[0]:g} and {bounds[1]:g}, so damping "
                    "relative to it would be none. Give an absolute damping, or use curvature='ggn'."
                )
            return ScaledOperator(0.0, IdentityOperator(curvature.input_size))
        penalty = self.provider.penalty(name, rows) if self.method.predicts_removal else None
        try:
            return penalised(lambda d: self.method.invert(curvature, d), in_units(damping, mean), penalty)
        except SingularOperator as error:
            raise type(error)(f"Block {name!r}: {error}") from None

    def _need_fit(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("Call fit(loader) first.")
        return self._fitted

    def check_weights(self) -> None:
        """Errors: NotFittedError; StaleFit if the model's weights have changed, or the form of its gradients."""
        if self.provider.fingerprint() != self._need_fit().fingerprint:
            raise StaleFit("The model's weights have changed since fit(). Fit again, or restore the weights.")
        if self.provider.form != self._need_fit().form:
            raise StaleFit(
                "Layer rules turned out not to hold since fit(): gradients now have another form. Fit again."
            )

    def ready(self) -> InfluenceMapper:
        """The mapper, where the model is: what was fitted follows a model that was moved to another device.

        Errors: NotFittedError; StaleFit if the model's weights have changed.
        """
        self.check_weights()
        fitted = self._need_fit()
        if self.source.device != fitted.device:
            curvature = moved(fitted.curvature, self.provider, self._like())
            self._keep(replace(fitted, curvature=curvature, device=self.source.device))
        return self.block_mapper

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the solves of what is done inside, in `solves`; errors of passes say where they are."""
        with recorded_solves() as log, located():
            try:
                yield
            finally:
                self._solves = joined(log)

    # At rest ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep what `fit` found in a folder: JSON, and arrays as safetensors; no code, no pickle. For `load`.

        Errors: NotFittedError; StaleFit; AlreadySaved; NotWritten, of a full disk for example; InvalidSetting for
        hw.Lissa and hw.Astra, whose fit is made of train rows.
        """
        from headwater.store.folder import write_folder

        self.check_weights()
        parts = take_apart(self.curvature)
        keys = {} if self.fitted_keys is None else {ROW_KEYS: self.fitted_keys}
        write_folder(path, {**self.identity(), "rows": self.n_train, **parts.description}, parts.arrays | keys)

    @_in_own_precision
    def load(self, path: str | os.PathLike[str], loader: Iterable[Any] | None = None) -> Self:
        """What `save` kept, in place of `fit`: for the same model, weights, blocks and method; damping is free.

        loader: the train rows that were fitted, for methods that read them at every solve (hw.Cg, hw.BlockKrylov,
        hw.Dual, hw.DataInf, hw.Trak(dimension=None)). Errors: NotSaved; DamagedFile, naming the file, where something
        is not as it was written; StaleFit if weights are others now; BlockMismatch; InvalidSetting for another method,
        loss or architecture; NotFittedError, later, if rows are needed and were not given; BatchMismatch, later, for
        other rows.
        """
        from headwater.store.folder import read_folder

        saved, arrays = read_folder(path)
        if loader is not None:  # a provider that has seen rows knows the parts of its blocks
            first_batch(self.provider, self._read_as(loader, "train"))
        self._check_identity(saved, str(path))
        keys = arrays.get(ROW_KEYS)  # None in folders from before they were kept: then nothing is known of the rows
        rows = None
        if loader is not None:
            rows = KnownRows(self.source, self._read_as(loader, "train"), memory=RowMemory(keys))
        curvature = put_together(TakenApart(saved, arrays), self.provider, self._like(), rows)
        weights, form = self.provider.fingerprint(), self.provider.form
        self._keep(Fitted(curvature, saved["rows"], weights, form, self.source.device, keys))
        self._loaders = LoadersSeen()
        return self

    def _like(self) -> Array:
        """Some array of the model's: its framework and device."""
        return self.source.parameters(next(iter(self.source.layouts)))

    def identity(self) -> dict[str, Any]:
        """What a saved fit, or a stored run, belongs to, as JSON has it: method, loss, model, blocks and weights."""
        blocks = {
            name: {"parameters": [[p.name, list(p.shape)] for p in layout.block.parameters]}
            | {"parts": [list(part.shape) for part in layout.parts]}
            for name, layout in self.provider.layouts.items()
        }
        return {
            "format": SAVED_FORMAT,
            "method": self.method.describe(),
            "loss": list(self.source.settings()),
            "architecture": self.source.architecture,
            "blocks": blocks,
            "fingerprint": _listed(self.provider.fingerprint()),
        }

    def _check_identity(self, saved: Mapping[str, Any], path: str) -> None:
        mine = self.identity()
        if saved.get("format") != SAVED_FORMAT:
            raise InvalidInput(
                f"{path} has format {saved.get('format')!r}; this version reads {SAVED_FORMAT}. Fit again, and save."
            )
        missing = [name for name in (*mine, "rows", "operators", "shared") if name not in saved]
        if missing:
            raise InvalidInput(f"{path} is not whole: it has no {', '.join(missing)}. Fit again, and save.")
        rows = saved["rows"]
        if not isinstance(rows, (int, float)) or isinstance(rows, bool) or not 0 < rows < float("inf"):
            raise InvalidInput(f"{path} says that it was fitted on {rows!r} rows. Fit again, and save.")
        if saved["blocks"] != mine["blocks"]:
            raise BlockMismatch(
                f"{path} was fitted with the blocks {list(saved['blocks'])}; here they are {list(mine['blocks'])}, or "
                "their parameters have other shapes, or other parts. If these are known only once rows were seen, "
                "load(path, loader) shows some."
            )
        for name in ("method", "loss", "architecture"):
            if saved[name] != mine[name]:
                raise InvalidSetting(f"{path} was fitted with {name} {saved[name]}; here it is {mine[name]}.")
        if saved["fingerprint"] != mine["fingerprint"]:
            raise StaleFit(f"{path} was fitted with other weights than the model has now. Fit again, or restore them.")

    # Tensors in, tensors out --------------------------------------------------------------------------------------

    @_in_own_precision
    def influences(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> TensorType:
        """Scores of train rows (x, y), or of the test rows themselves, on test rows.

        Shapes: (N_test, N_train) for mode "up"; (N_test, N_train, *x_shape) for "perturbation".
        Errors: InvalidInput if only one of x, y is given; NotFittedError; StaleFit; UnsupportedInfluenceModeError.
        """
        mapper, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        with self._recorded():
            if mode is InfluenceMode.Perturbation and not mapper.own_forms:
                return mapper.perturbation(mapper.transformed_grads(test), train)
            return _sum(mapper.interactions(test, train, mode))

    @_in_own_precision
    def damping_path(
        self,
        dampings: Sequence[Damping | Mapping[str, Damping]],
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> list[TensorType]:
        """`influences` at each of several dampings; hw.BlockKrylov() has them all from one space.

        That space is grown for the smallest damping; `solves` and a warning say how far the others came in it.
        """
        _, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        others = [self.with_damping(damping).ready() for damping in dampings]
        if any(mapper.own_forms for mapper in others):  # factors are no help to a form that is not <Op left, right>
            return [_sum(mapper.interactions(test, train, mode)) for mapper in others]
        grads = self.provider.grads(test, query=True) if others else {}
        factors: list[dict[str, Array]] = [{} for _ in others]
        with self._recorded():
            for name, value in grads.items():
                operators = [mapper.operators[name] for mapper in others]
                for found, factor in zip(factors, apply_path(operators, operators[0].seen(value).flat()), strict=True):
                    found[name] = factor
        if mode is InfluenceMode.Perturbation:
            return [mapper.perturbation(f, train) for mapper, f in zip(others, factors, strict=True)]
        return [
            _sum(mapper.interactions_from_transformed_grads(f, train, mode))
            for mapper, f in zip(others, factors, strict=True)
        ]

    @_in_own_precision
    def influences_by_block(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> OrderedDict[str, TensorType]:
        """`influences`, one summand for each block."""
        mapper, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        with self._recorded():
            return mapper.interactions(test, train, mode)

    @_in_own_precision
    def influence_factors(self, x: Any, y: Any) -> TensorType:
        """Op(gradient) of each row, all blocks side by side: (N, D)."""
        factors = self.influence_factors_by_block(x, y)
        return namespace(*factors.values()).concat(list(factors.values()), axis=1)

    @_in_own_precision
    def influence_factors_by_block(self, x: Any, y: Any) -> OrderedDict[str, TensorType]:
        """Op(gradient) of each row: (N, D_block) by block."""
        mapper, batch = self.ready(), self._batch(x, y, "x and y")
        with self._recorded():
            return mapper.transformed_grads(batch)

    @_in_own_precision
    def influences_from_factors(
        self,
        z_test_factors: TensorType | Mapping[str, TensorType],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> TensorType:
        """`influences` from factors computed before: one tensor (N, D), or a dict by block."""
        mode, mapper, train = InfluenceMode(mode), self.ready(), self._batch(x, y, "x and y")
        if mode is InfluenceMode.Perturbation:
            return mapper.perturbation(z_test_factors, train)
        return _sum(mapper.interactions_from_transformed_grads(z_test_factors, train, mode))

    @_in_own_precision
    def influences_from_factors_by_block(
        self,
        z_test_factors: TensorType | Mapping[str, TensorType],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> OrderedDict[str, TensorType]:
        """`influences_from_factors`, one summand for each block."""
        mode, mapper, train = InfluenceMode(mode), self.ready(), self._batch(x, y, "x and y")
        return mapper.interactions_from_transformed_grads(z_test_factors, train, mode)

    def _asked(
        self, x_test: Any, y_test: Any, x: Any, y: Any, mode: InfluenceMode | str
    ) -> tuple[InfluenceMapper, InfluenceMode, Any, Any]:
        mode = InfluenceMode(mode)
        if (x is None) != (y is None):
            raise InvalidInput(f"Only {'y' if x is None else 'x'} was given; pass both x and y, or neither.")
        mapper, test = self.ready(), self._batch(x_test, y_test, "x_test and y_test")
        return mapper, mode, test, test if x is None else self._batch(x, y, "x and y")

    def _batch(self, x: Any, y: Any, what: str) -> Any:
        try:
            return paired(self.provider, x, y) or self.provider.as_batch(x, y)
        except (BatchMismatch, InvalidInput) as error:
            raise type(error)(f"{what}: {error}") from error

    # Loaders in, labelled scores out ------------------------------------------------------------------------------

    @_in_own_precision
    def attribute(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
        *,
        unit: str = "influence",
        by_block: bool = False,
        store: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Scores:
        """Scores of all train rows on all query rows, labelled: every row goes through the model once.

        unit: "influence" (what `influences` gives), or "removal" (that over n_train: the predicted increase of the
        query's loss when the row is removed). by_block: keep each block's share. store: a folder where finished tiles
        are kept, so that the same call goes on where a stopped one ended.
        """
        from headwater.run.attribute import attribute

        options: dict[str, Any] = {"unit": unit, "by_block": by_block, "store": store, "progress": progress}
        with self._recorded():
            return attribute(self, self.train_rows(train_loader), self.query_rows(query_loader), **options)

    @_in_own_precision
    def top(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
        k: int,
        *,
        unit: str = "influence",
        progress: bool = False,
    ) -> Extremes:
        """The k most helpful and the k most harmful train rows of each query, without keeping the matrix of scores."""
        from headwater.run.attribute import top

        with self._recorded():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return top(self, train, query, k, unit=unit, progress=progress)

    @_in_own_precision
    def self_influence(self, train_loader: Iterable[Any], *, progress: bool = False) -> np.ndarray:
        """<Op g_n, g_n> for each row, without the N x N matrix: [n]."""
        from headwater.run.attribute import self_influence

        with self._recorded():
            return self_influence(self, self.train_rows(train_loader), progress=progress)

    @_in_own_precision
    def removal(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
        groups: Iterable[Any] | None = None,
        *,
        progress: bool = False,
    ) -> np.ndarray:
        """The rise of each query's loss when a row, or a group, is removed: [q, n] or [q, groups].

        Score / n_train, and what the removed rows' own curvature adds: one Newton step without them. groups: for each
        its rows' positions in the loader, or ids where batches carry them. See `headwater.run.removal`.
        """
        from headwater.run.removal import removal

        with self._recorded():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return removal(self, train, query, groups, progress=progress)

    @_in_own_precision
    def calibrate(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any] | None = None,
        bank: Retrained | None = None,
        *,
        dampings: Sequence[Damping] | None = None,
        by_block: bool = False,
        subsets: int = 10,
        seed: int = 0,
        progress: bool = False,
    ) -> Self:
        """The same influence at the damping that forecasts retraining best; `calibration` says how sure that is.

        bank: models retrained on subsets of the train rows: a `headwater.evaluate.Bank`, masks and outputs (keep
        [m, n], outputs [m, runs, q]), or a function (indices of rows kept, seed) -> outputs [q], which is then called
        for `subsets` random halves of the rows. Outputs are what is explained (losses, unless there is a measurement)
        of the rows of query_loader. Ten models are enough to see where the optimum is. None: without retraining, by
        the evidence of the Laplace approximation (no query_loader), which knows less and is labelled so; it takes the
        loss for minus a log-likelihood.

        dampings: the path, all relative or all absolute; None for seven decades of mean eigenvalues. by_block: a
        damping for each block, kept only if subsets that were not looked at speak for it. Derivations are in
        `headwater.run.calibrate`. Errors: InvalidInput for a bank of other rows or queries, and for queries without a
        bank; InvalidSetting for a method without damping.
        """
        from headwater.run.calibrate import calibrate, in_unit

        options: dict[str, Any] = {"dampings": dampings, "by_block": by_block, "subsets": subsets, "seed": seed}
        with located():
            train = self.train_rows(train_loader)
            query = None if query_loader is None else self.query_rows(query_loader)
            found = calibrate(self, train, query, bank, **options, progress=progress)
        other = self.with_damping({name: in_unit(amount, found.unit) for name, amount in found.chosen.items()})
        other._calibration = found
        return other

    @_in_own_precision
    def verify(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
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

        options: dict[str, Any] = {"rows": rows, "queries": queries, "seed": seed, "tolerance": tolerance}
        with located():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return verify(self, train, query, **options, progress=progress)

    @_in_own_precision
    def audit(
        self,
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
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

        options: dict[str, Any] = {"queries": queries, "k": k, "level": level, "tolerance": tolerance, "seed": seed}
        with located():
            train, query = self.train_rows(train_loader), self.query_rows(query_loader)
            return audit(self, train, query, **options, progress=progress)

    @_in_own_precision
    def diagnose(self, train_loader: Iterable[Any], *, progress: bool = False) -> Diagnosis:
        """What gives reason to doubt the scores: weights that are no minimum, negative curvature, missed solves, ...

        What `attribute` tells on the way (`scores.diagnosis`), and what costs more: a pass over the train rows,
        products for the ends of the spectrum, and for effective degrees of freedom. Solves are those of the last call.
        Errors: NotFittedError; StaleFit.
        """
        from headwater.run.diagnosis import diagnose

        with located():
            return diagnose(self, self.train_rows(train_loader), progress=progress)

    @_in_own_precision
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

    def batch_self_influence(self, batch: Any) -> Array:
        """<Op g_n, g_n> of a batch's rows: [n]."""
        operators = self.block_mapper.operators
        grads = self.provider.self_grads(batch)
        return sum(operators[name].quadratic(operators[name].seen(value)) for name, value in grads.items())


def _pass(side: LinearOperator, value: BlockGradient) -> BlockGradient:
    """Through one side of an operator, as the operator sees rows."""
    return side.apply_block(side.seen(value))


def stack_queries(pieces: list[Queries]) -> Queries:
    """Queries of several batches under one another. Errors: InvalidInput if they went through different sides."""
    if any(piece.right is not pieces[0].right for piece in pieces):
        raise InvalidInput("Queries that went through different sides cannot be stacked.")
    left = OrderedDict((name, stack([piece.left[name] for piece in pieces])) for name in pieces[0].left)
    return Queries(left, pieces[0].right, pieces[0].forms)


def _parts(operator: LinearOperator) -> Iterable[LinearOperator]:
    if isinstance(operator, (ScaledOperator, ReleasedOperator)):
        return _parts(operator.inner)
    return operator.operators if isinstance(operator, BlockDiagonalOperator) else (operator,)


def _listed(value: Any) -> Any:
    """Tuples as JSON gives them back; what JSON does not have in words."""
    if isinstance(value, (tuple, list)):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else in_words(value)


def _sum(by_block: Mapping[str, Array]) -> Any:
    """The blocks' scores, added in order."""
    total = None
    for value in by_block.values():
        total = value if total is None else total + value
    return total
