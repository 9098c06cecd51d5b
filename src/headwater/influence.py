"""Influence, composed of a gradient provider and one operator per block.

    score(query, train) = sum over blocks  < Op_block(grad loss(query)), grad loss(train) >

Op_block is (C + damping I)^-1 with C the mean curvature over the training rows, or a method's approximation of it.
Sign: positive means that more weight on the train row lowers the query's loss. Unit: the decrease of the query's loss
per unit of weight in the mean objective; divided by the number of train rows, the increase when the row is removed.
"""

from __future__ import annotations

import copy
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from headwater.arrays import Array, as_pandas, namespace, summed
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    HeadwaterError,
    IndefiniteCurvature,
    InvalidInput,
    InvalidSetting,
    NotFittedError,
    RulesChanged,
    SingularOperator,
    StaleFit,
    UnsupportedModel,
)
from headwater.gradients.identity import identity_of
from headwater.gradients.provider import BlockGradients, Fisher, StructuredGradientProvider
from headwater.loaders.batches import Unpack, check_loader, check_one, paired
from headwater.loaders.forms import Form
from headwater.loaders.keys import LoadersSeen, RowMemory
from headwater.loaders.places import RAW, located
from headwater.loaders.texts import Text
from headwater.mapper import InfluenceMapper
from headwater.methods.base import Curvatures, Method
from headwater.methods.damping import Damping, Relative, damping_by_block, in_units
from headwater.operators.algebra import IdentityOperator, LinearOperator, ScaledOperator
from headwater.operators.iterative import LastSolves, SolveReport, apply_path, joined, recorded_solves
from headwater.operators.partial_penalty import PartialPenaltyInverse, penalised
from headwater.operators.structured import BlockDiagonalOperator
from headwater.rows import KeptTrainRows, Rows, Runner, first_batch
from headwater.types import InfluenceMode, TensorType

if TYPE_CHECKING:
    import numpy as np

    from headwater.curvature.exact import Curvature as Kind
    from headwater.curvature.model import ModelCurvature

Verb = TypeVar("Verb", bound=Callable[..., Any])

SAVED_FORMAT = 2
"""Of the folders that `save` writes."""
ROW_KEYS = "keys of the rows"
"""Beside the curvature's arrays in such a folder."""


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


def in_own_precision(verb: Verb) -> Verb:
    """Without the caller's mixed precision, but for the model's own call; see `own_precision` of providers."""

    @wraps(verb)
    def wrapped(self: ComposableInfluence, *args: Any, **kwargs: Any) -> Any:
        with self.source.own_precision():
            return verb(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class ComposableInfluence(ABC, Generic[TensorType]):
    """Influence of train rows on query rows, as tensors; `Attributor` adds the verbs over loaders.

    x and y are a framework's tensors (x also a tuple or dict of them); N_test and N_train are numbers of rows.
    """

    def __init__(
        self,
        provider: StructuredGradientProvider,
        method: Method,
        *,
        damping: Damping | Mapping[str, Damping] | None = None,
        unpack: Unpack | None = None,
        form: Form | None = None,
    ):
        if not isinstance(method, Method):
            raise InvalidInput(f"method is {method!r}; expected settings such as hw.Ekfac() or hw.Direct().")
        if damping is not None and not method.is_damped:
            raise InvalidSetting(f"damping is {damping!r}, and {type(method).__name__} inverts nothing: leave it out.")
        self.method = method
        self.source = provider
        self.provider = method.view(provider)
        self.damping = damping_by_block(damping, method.default_damping, self.provider.layouts)
        self._last_solves = LastSolves()
        self._calibration: Any = None
        self._fitted: Fitted | None = None
        self._mapper: InfluenceMapper | None = None
        if unpack is not None and not callable(unpack):
            raise InvalidInput(f"unpack is {unpack!r:.60}; expected a function: batch -> x, y[, ids, weights].")
        self._unpack, self._form = unpack, form or Form()
        self._loaders = LoadersSeen()

    # Fitting ------------------------------------------------------------------------------------------------------

    @in_own_precision
    def fit(
        self,
        loader: Any,
        *others: object,
        progress: bool = False,
        runner: Runner | None = None,
        tile: int | None = None,
    ) -> Self:
        """Learn the curvature of the mean loss over the loader's rows; it gives (x, y) or batches, repeatably.

        What is taken for a loader, here and wherever one is asked for: see `headwater.loaders.forms`.

        runner: who visits which rows, and where (`headwater.rows`); None for this process, one batch after the other.
        tile: rows that a runner takes by themselves: no piece has rows on both sides of a multiple of it.
        Errors: BatchMismatch, naming batch and row, if a later pass over the loader gives other rows than the first.
        """
        check_one(others)
        # Layer rules may turn out not to hold in the middle of a pass: what was summed so far has another form.
        while True:
            provider, rows = self._to_fit(loader, RowMemory())
            rows.runner, rows.tile = runner, tile
            try:
                with located():
                    curvature, weight = self.method.fit(provider, rows, progress)
                break
            except RulesChanged:  # fewer layers are left whose rules are trusted, so that this ends
                continue
        # What the rows are known by, for later: `removal` refuses others.
        known = rows.memory.fitted
        self._keep(
            Fitted(curvature, weight, self.provider.fingerprint(), self.provider.form, self.source.device, known)
        )
        # Anew: what earlier loaders gave was about another fit.
        self._loaders = LoadersSeen()
        self._loaders.keep(loader, rows.memory)
        self._calibration = None
        return self

    def _to_fit(self, loader: Any, memory: RowMemory) -> tuple[StructuredGradientProvider, Rows]:
        """What gives the rows' gradients to a fit, and the rows. Errors: as `KeptTrainRows`."""
        if isinstance(loader, KeptTrainRows):
            return loader.rows_to_fit(self, memory)
        return self.provider, Rows(self.source, self._read_as(loader, "train"), memory=memory)

    def look(self, loader: Iterable[object]) -> None:
        """At the first rows, which show the blocks' parts; what is wrong with them is said where they are used."""
        with suppress(HeadwaterError, *RAW):
            self.source.grads(first_batch(self.provider, self._read_as(loader, "train")))

    def _keep(self, fitted: Fitted) -> None:
        self._mapper = self._make_mapper(fitted)
        self._fitted = fitted

    def as_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """What is read of a collection of rows: itself; a framework's subclass may take other things than batches."""
        return loader

    def _read_as(self, loader: Iterable[object], role: str) -> Iterable[object]:
        """What a user gave for rows, as it is read: as batches, in the framework's way. Errors: InvalidInput."""
        return self.as_loader(loader if isinstance(loader, Rows) else self.as_batches(as_pandas(loader), role))

    def as_batches(self, held: Any, role: str) -> Iterable[object]:
        """What a user gave for rows, as batches. Errors: InvalidInput."""
        batches = self._form.batches(held, role, self.as_own, self._unpack)
        if self._unpack is not None:
            check_loader(batches, role)
        return batches

    def as_own(self, name: str, array: Any) -> Any:
        """An array, of x or y, that a user gave without making a batch of it, as the framework takes it."""
        return array

    def tokens_of(self, batch: Any) -> Sequence[np.ndarray] | None:
        """Numbers of each row's tokens, without padding, where rows are texts that `text_of` can read; else None."""
        return None

    def text_of(self, tokens: np.ndarray) -> Text:
        """The text of a row's tokens. Errors: UnsupportedModel where rows are no texts."""
        raise UnsupportedModel(f"{type(self).__name__} reads no texts.")

    def token_scores_of(self, query: Any, train: Any) -> Sequence[np.ndarray]:
        """What each token of a train row adds to the row's scores: [q, tokens of the row] for each row of a batch.

        The sum over a row's tokens is its score in the unit "influence". Errors: UnsupportedModel, InvalidSetting where
        tokens have no scores of their own.
        """
        raise UnsupportedModel(f"{type(self).__name__} has no scores of tokens.")

    @property
    def own_source(self) -> StructuredGradientProvider:
        """The model's provider, with arrays of the model's own framework."""
        return self.source

    def train_rows(self, loader: Iterable[object]) -> Rows:
        """A loader of train rows for a run; the same object gives the same rows as when it was last read."""
        if isinstance(loader, Rows):
            return loader
        return Rows(self.source, self._read_as(loader, "train"), "train", self._loaders.memory(loader))

    def query_rows(self, loader: Iterable[object]) -> Rows:
        """A loader of query rows for a run."""
        return loader if isinstance(loader, Rows) else Rows(self.source, self._read_as(loader, "query"), "query")

    def __repr__(self) -> str:
        fitted = f"fitted on {self.n_train:g} rows" if self.is_fitted else "not fitted"
        blocks = len(self.provider.layouts)
        said = f"{self.n_parameters:,} parameters in {blocks} {'block' if blocks == 1 else 'blocks'}"
        return f"{type(self).__name__}({self.method.describe()}, {said}, {fitted})"

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

    @in_own_precision
    def with_damping(self, damping: Damping | Mapping[str, Damping]) -> Self:
        """The same influence at another damping; everything that was fitted is used again."""
        amounts = damping_by_block(damping, self.method.default_damping, self.provider.layouts)
        # Curvature is kept undamped: another damping costs an inverse, and no pass over rows.
        other = self._changed(damping=amounts, _last_solves=LastSolves(), _calibration=None)
        return other if self._fitted is None else other._changed(_mapper=other._make_mapper(self._fitted))

    def _changed(self, **fields: Any) -> Self:
        """A copy with other values of some fields."""
        other = copy.copy(self)
        for name, value in fields.items():
            setattr(other, name, value)
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
        method = self.method if method is None else method
        provider = self.provider if source is None else self.method.view(source)
        amounts = self.damping
        if damping is not None:
            amounts = damping_by_block(damping, method.default_damping, provider.layouts)
        return self._changed(
            source=self.source if source is None else source,
            provider=provider,
            method=method,
            damping=amounts,
            _fitted=None,
            _mapper=None,
            _last_solves=LastSolves(),
            _calibration=None,
        )

    @property
    def curvature(self) -> Curvatures:
        """The undamped curvature of each block. Errors: NotFittedError."""
        return self._need_fit().curvature

    def curvature_of(
        self,
        loader: Iterable[object],
        kind: Kind = "ggn",
        *,
        fisher: Fisher = "auto",
        seed: int = 0,
        penalty: bool = True,
        progress: bool = False,
    ) -> ModelCurvature:
        """The model's own curvature on these rows, by blocks: products, trace, spectrum, diagonal, small matrices.

        The mean over the rows of the loss's "hessian", "ggn", "fisher" or "empirical_fisher", undamped, with the
        penalty of the training objective where that is known. It needs no `fit`, and is the same for every method.
        See `headwater.curvature.model`.
        """
        from headwater.curvature.model import ModelCurvature

        rows = self.train_rows(loader)
        return ModelCurvature(self.own_source, rows, kind, fisher=fisher, seed=seed, penalty=penalty, progress=progress)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the method itself found that speaks against the scores of the last call, in words."""
        return ()

    @property
    def calibration(self) -> Any:
        """What chose the damping; None for a damping that was given, or the method's default."""
        return self._calibration

    @property
    def solves(self) -> dict[str, SolveReport]:
        """How far the solves of this thread's last call came, by block; empty for a method that solves nothing."""
        return self._last_solves.found

    @property
    def absolute_damping(self) -> dict[str, float]:
        """The damping of each block in the units of its curvature."""
        curvature = self.curvature
        return {
            # The mean eigenvalue is asked for only where it is the unit: the trace of a Hessian costs 64 products.
            name: in_units(given, curvature[name].mean_eigenvalue()) if isinstance(given, Relative) else given
            for name, given in ((name, self.damping[name]) for name in curvature)
        }

    @property
    def truncation_errors(self) -> dict[str, list[float]]:
        """For a separable inverse spectrum: each part's relative error, by block; exact parts have zero."""
        return {
            name: [op.truncation_error for op in _parts(block)] for name, block in self.block_mapper.operators.items()
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
        damping = self.damping[name]
        # As in `absolute_damping`: a trace may be dear.
        mean = curvature.mean_eigenvalue() if isinstance(damping, Relative) else 0.0
        # A trace of zero: no curvature at all, or (of a Hessian) positive and negative curvature that cancel.
        if isinstance(damping, Relative) and mean == 0.0:
            bounds = None if curvature.psd else curvature.spectrum_bounds()
            if bounds is not None and bounds[1] > 0:
                raise IndefiniteCurvature(
                    f"Block {name!r}: the mean eigenvalue is 0, between {bounds[0]:g} and {bounds[1]:g}, so damping "
                    "relative to it would be none. Give an absolute damping, or use curvature='ggn'."
                )
            return ScaledOperator(0.0, IdentityOperator(curvature.input_size))
        # A method that predicts no removal inverts nothing that a penalty would belong to.
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
        # The user may have moved the model; a fit on another device would fail at the first product.
        if self.source.device != fitted.device:
            from headwater.curvature.saved import moved

            curvature = moved(fitted.curvature, self.provider, self.like())
            self._keep(replace(fitted, curvature=curvature, device=self.source.device))
        return self.block_mapper

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the solves of what is done inside, in `solves`; errors of passes say where they are."""
        with recorded_solves() as log, located():
            try:
                yield
            finally:
                self._last_solves.found = joined(log)

    # In parts, for files ------------------------------------------------------------------------------------------

    def _taken_apart(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `fit` found, as JSON has it, and its arrays. Errors: those of `save`."""
        from headwater.curvature.saved import take_apart

        self.check_weights()
        parts = take_apart(self.curvature)
        keys = {} if self.fitted_keys is None else {ROW_KEYS: self.fitted_keys}
        return {**self.identity(), "rows": self.n_train, **parts.description}, parts.arrays | keys

    def _put_together(
        self, where: str, saved: Mapping[str, Any], arrays: Mapping[str, np.ndarray], loader: Iterable[object] | None
    ) -> None:
        """Take what `_taken_apart` gave, in place of `fit`; `where` it was read is for messages. Errors: as `load`."""
        from headwater.curvature.saved import TakenApart, put_together

        if loader is not None and not isinstance(loader, KeptTrainRows):
            # A provider that has taken rows' gradients knows the parts of its blocks.
            self.source.grads(first_batch(self.provider, self._read_as(loader, "train")))
        self._check_identity(saved, where)
        keys = arrays.get(ROW_KEYS)  # None in folders from before they were kept: then nothing is known of the rows
        provider, rows = (self.provider, None) if loader is None else self._to_fit(loader, RowMemory(keys))
        read = put_together(TakenApart(dict(saved), dict(arrays)), provider, self.like(), rows)
        curvature = self.method.checked(read)
        weights, form = self.provider.fingerprint(), self.provider.form
        self._keep(Fitted(curvature, saved["rows"], weights, form, self.source.device, keys))
        self._loaders = LoadersSeen()

    def like(self) -> Array:
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

    @in_own_precision
    def influences(
        self,
        x_test: object,
        y_test: object,
        x: object = None,
        y: object = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> TensorType:
        """Scores of train rows (x, y), or of the test rows themselves, on test rows.

        Shapes: (N_test, N_train) for mode "up"; (N_test, N_train, *x_shape) for "perturbation".
        Errors: InvalidInput if only one of x, y is given; NotFittedError; StaleFit; UnsupportedInfluenceModeError.
        """
        mapper, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        with self._recorded():
            if mode is InfluenceMode.Perturbation and not mapper.own_forms:
                return self.handed_out(mapper.perturbation(mapper.transformed_grads(test), train))
            return self.handed_out(summed(mapper.interactions(test, train, mode).values()))

    @in_own_precision
    def damping_path(
        self,
        dampings: Sequence[Damping | Mapping[str, Damping]],
        x_test: object,
        y_test: object,
        x: object = None,
        y: object = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> list[TensorType]:
        """`influences` at each of several dampings; hw.BlockKrylov() has them all from one space.

        That space is grown for the smallest damping; `solves` and a warning say how far the others came in it.
        """
        _, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        others = [self.with_damping(damping).ready() for damping in dampings]
        if any(mapper.own_forms for mapper in others):  # factors are no help to a form that is not <Op left, right>
            return [self.handed_out(summed(mapper.interactions(test, train, mode).values())) for mapper in others]
        grads = self.provider.grads(test, query=True) if others else {}
        factors: list[dict[str, Array]] = [{} for _ in others]
        with self._recorded():
            for name, value in grads.items():
                operators = [mapper.operators[name] for mapper in others]
                for found, factor in zip(factors, apply_path(operators, operators[0].seen(value).flat()), strict=True):
                    found[name] = factor
        if mode is InfluenceMode.Perturbation:
            return [self.handed_out(mapper.perturbation(f, train)) for mapper, f in zip(others, factors, strict=True)]
        return [
            self.handed_out(summed(mapper.interactions_from_transformed_grads(f, train, mode).values()))
            for mapper, f in zip(others, factors, strict=True)
        ]

    @in_own_precision
    def influences_by_block(
        self,
        x_test: object,
        y_test: object,
        x: object = None,
        y: object = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> OrderedDict[str, TensorType]:
        """`influences`, one summand for each block."""
        mapper, mode, test, train = self._asked(x_test, y_test, x, y, mode)
        with self._recorded():
            return self._each_handed_out(mapper.interactions(test, train, mode))

    @in_own_precision
    def influence_factors(self, x: object, y: object) -> TensorType:
        """Op(gradient) of each row, all blocks side by side: (N, D)."""
        factors = self.influence_factors_by_block(x, y)
        return namespace(*factors.values()).concat(list(factors.values()), axis=1)

    @in_own_precision
    def influence_factors_by_block(self, x: object, y: object) -> OrderedDict[str, TensorType]:
        """Op(gradient) of each row: (N, D_block) by block."""
        mapper, batch = self.ready(), self._batch(x, y, "x and y")
        with self._recorded():
            return self._each_handed_out(mapper.transformed_grads(batch))

    @in_own_precision
    def influences_from_factors(
        self,
        z_test_factors: TensorType | Mapping[str, TensorType],
        x: object,
        y: object,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> TensorType:
        """`influences` from factors computed before: one tensor (N, D), or a dict by block."""
        mode, mapper, train = InfluenceMode(mode), self.ready(), self._batch(x, y, "x and y")
        factors = self.taken_in(z_test_factors)
        if mode is InfluenceMode.Perturbation:
            return self.handed_out(mapper.perturbation(factors, train))
        return self.handed_out(summed(mapper.interactions_from_transformed_grads(factors, train, mode).values()))

    @in_own_precision
    def influences_from_factors_by_block(
        self,
        z_test_factors: TensorType | Mapping[str, TensorType],
        x: object,
        y: object,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> OrderedDict[str, TensorType]:
        """`influences_from_factors`, one summand for each block."""
        mode, mapper, train = InfluenceMode(mode), self.ready(), self._batch(x, y, "x and y")
        factors = self.taken_in(z_test_factors)
        return self._each_handed_out(mapper.interactions_from_transformed_grads(factors, train, mode))

    def handed_out(self, array: Any) -> TensorType:
        """An array of the maths as the caller gets it; of the provider's own framework, unless it says otherwise."""
        found: TensorType = array
        return found

    def taken_in(self, arrays: Any) -> Any:
        """Arrays that `handed_out` gave, one or by block, as the maths takes them."""
        return arrays

    def _each_handed_out(self, arrays: Mapping[str, Any]) -> OrderedDict[str, TensorType]:
        return OrderedDict((name, self.handed_out(array)) for name, array in arrays.items())

    def _asked(
        self, x_test: object, y_test: object, x: object, y: object, mode: InfluenceMode | str
    ) -> tuple[InfluenceMapper, InfluenceMode, Any, Any]:
        mode = InfluenceMode(mode)
        if (x is None) != (y is None):
            raise InvalidInput(f"Only {'y' if x is None else 'x'} was given; pass both x and y, or neither.")
        mapper, test = self.ready(), self._batch(x_test, y_test, "x_test and y_test")
        return mapper, mode, test, test if x is None else self._batch(x, y, "x and y")

    def _batch(self, x: object, y: object, what: str) -> Any:
        try:
            x, y = as_pandas(x), as_pandas(y)
            return paired(self.provider, x, y) or self.provider.as_batch(x, y)
        except (BatchMismatch, InvalidInput) as error:
            raise type(error)(f"{what}: {error}") from error

    def self_influence_of(self, grads: BlockGradients) -> Array:
        """<Op g_n, g_n> of a provider's `self_grads`: [n]."""
        operators = self.block_mapper.operators
        return summed(operators[name].quadratic(operators[name].seen(value)) for name, value in grads.items())


def _parts(operator: LinearOperator) -> Iterable[LinearOperator]:
    if isinstance(operator, (ScaledOperator, PartialPenaltyInverse)):
        return _parts(operator.inner)
    return operator.operators if isinstance(operator, BlockDiagonalOperator) else (operator,)


def _listed(value: object) -> Any:
    """Tuples as JSON gives them back; what JSON does not have in words."""
    if isinstance(value, (tuple, list)):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else identity_of(value)
