"""Fitted curvature taken apart into plain data and arrays, and put together again: for files, and for other devices.

An operator becomes {"class": its name, and its constructor's arguments}; arrays become references into one
dictionary of host arrays. What reads train rows at every solve is kept without them, and is given a loader again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import Array, as_like, dtype_named, is_array, namespace, to_numpy
from headwater.blocks import Layout
from headwater.curvature.dual import DualOperator, HeldRows, RowNorms, RowSumOperator
from headwater.curvature.products import CurvatureOperator, RowDraws
from headwater.curvature.span import RowSpans
from headwater.errors import InvalidInput, InvalidSetting, NotFittedError
from headwater.gradients.provider import StructuredGradientProvider
from headwater.operators.algebra import IdentityOperator, LinearOperator, ScaledOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from headwater.operators.projected import MomentOperator, ProjectedOperator
from headwater.operators.projection import KroneckerProjection, LowRankProjection, RandomProjection
from headwater.operators.structured import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenpairsOperator,
    LowRankPlusDiagonalOperator,
)

ARGUMENTS: dict[type, tuple[str, ...]] = {
    IdentityOperator: ("input_size",),
    ScaledOperator: ("factor", "inner"),
    DenseOperator: ("matrix", "symmetric", "psd"),
    MomentOperator: ("matrix",),
    DiagonalOperator: ("diagonal",),
    BlockDiagonalOperator: ("layout", "operators"),
    KroneckerOperator: ("left", "right", "symmetric", "psd"),
    EigenKroneckerOperator: ("left", "right", "spectrum", "like"),
    LowRankPlusDiagonalOperator: ("factor", "core", "diagonal", "psd"),
    EigenpairsOperator: ("values", "vectors"),
    ApproximatedOperator: ("exact", "approximation"),
    ProjectedOperator: ("projection", "core", "rows", "kept_rank", "kept_mass"),
    RandomProjection: ("layout", "dimension", "seed", "like", "dense"),
    KroneckerProjection: ("layout", "sides"),
    LowRankProjection: ("layout", "sides", "rank"),
    RowSumOperator: ("curvature", "rows"),
    DualOperator: ("curvature", "rows", "held"),
    RowSpans: ("curvature", "rows", "norms"),
    RowNorms: ("keys", "squares"),
    HeldRows: ("keys", "kept", "draws_per_row", "gram"),
    CurvatureOperator: ("source", "block", "known_trace", "trace_error"),
    RowDraws: ("kind", "fisher", "seed", "weight", "has_draws"),
}
"""What can be kept, and its constructor's arguments, each also an attribute."""

CLASSES = {each.__name__: each for each in ARGUMENTS}


@dataclass(frozen=True, eq=False)
class TakenApart:
    """Curvature as plain data (JSON can hold it) and host arrays."""

    description: dict[str, Any]
    arrays: dict[str, np.ndarray]


def take_apart(curvature: Mapping[str, LinearOperator]) -> TakenApart:
    """Errors: InvalidSetting for an operator that holds train rows themselves."""
    return _Packer().all(curvature)


def put_together(
    found: TakenApart, provider: StructuredGradientProvider, like: Array, loader: Iterable[object] | None = None
) -> OrderedDict[str, LinearOperator]:
    """The operators, with arrays of the framework of `like`, on its device.

    loader: the train rows, for methods that read them at every solve; without it such a solve raises NotFittedError.
    """
    unpacker = _Unpacker(found, provider, like, NoRows() if loader is None else loader)
    return OrderedDict((name, unpacker.block(name, entry)) for name, entry in found.description["operators"].items())


def moved(
    curvature: Mapping[str, LinearOperator], provider: StructuredGradientProvider, like: Array
) -> OrderedDict[str, LinearOperator]:
    """The same operators with their arrays beside `like`. Errors: InvalidSetting, as `take_apart`."""
    packer = _Packer()
    return put_together(packer.all(curvature), provider, like, packer.loader)


class NoRows:
    """Stands for train rows that were not given."""

    def __iter__(self) -> Iterator[Any]:
        raise NotFittedError(
            "This method reads the train rows at every solve, and the fit was loaded without them: pass them too, "
            "load(path, loader)."
        )


class _Packer:
    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.shared: list[dict[str, Any]] = []
        self._sources: list[RowDraws] = []

    def all(self, curvature: Mapping[str, LinearOperator]) -> TakenApart:
        description = {name: self.pack(operator) for name, operator in curvature.items()}
        return TakenApart({"operators": description, "shared": self.shared}, self.arrays)

    @property
    def loader(self) -> Iterable[object] | None:
        """Of the train rows that the operators read, if they do."""
        return self._sources[0].loader if self._sources else None

    def pack(self, value: Any, name: str = "") -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if name == "like":
            return {"like": _dtype_name(value)}
        if is_array(value):
            key = f"{len(self.arrays)}.{name}"
            self.arrays[key] = to_numpy(value)
            return {"array": key, "dtype": _dtype_name(value)}
        if isinstance(value, Layout):
            return {"layout": value.block.name}
        if isinstance(value, (tuple, list)):
            return [self.pack(item, name) for item in value]
        if isinstance(value, RowDraws):
            return {"shared": self._share(value)}
        return self._record(value)

    def _record(self, value: object) -> dict[str, Any]:
        if type(value) not in ARGUMENTS:
            raise InvalidSetting(
                f"This method's fit cannot be saved: it holds train rows themselves ({type(value).__name__}). Fit "
                "again; it reads them once or twice."
            )
        if isinstance(value, CurvatureOperator):
            value.trace()  # whoever reads the fit without its rows has the trace at hand
        arguments = {name: self.pack(getattr(value, name), name) for name in ARGUMENTS[type(value)]}
        return {"class": type(value).__name__, **arguments}

    def _share(self, source: RowDraws) -> int:
        """The number of a source of rows, which the operators of several blocks read together."""
        for number, known in enumerate(self._sources):
            if known is source:
                return number
        self._sources.append(source)
        self.shared.append(self._record(source))
        return len(self._sources) - 1


class _Unpacker:
    def __init__(self, found: TakenApart, provider: StructuredGradientProvider, like: Array, loader: Iterable[object]):
        self.found, self.provider, self.like = found, provider, like
        self.layout = next(iter(provider.layouts.values()))
        self.sources = [self._rows(entry, loader) for entry in found.description["shared"]]

    def block(self, name: str, entry: dict[str, Any]) -> LinearOperator:
        """The operator of a block; layouts inside it are the block's, under the name that its model gives it."""
        self.layout = self.provider.layouts[name]
        found = self.unpack(entry)
        assert isinstance(found, LinearOperator)
        return found

    def unpack(self, value: object) -> Any:
        """Errors: InvalidInput for an entry that is not known, or an array that is not there."""
        if isinstance(value, list):
            return tuple(self.unpack(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "class" in value:
            return self._object(value)
        if "like" in value:
            return namespace(self.like).astype(self.like[:0], _dtype(self.like, value["like"]))
        if "array" in value:
            if value["array"] not in self.found.arrays:
                raise InvalidInput(f"The saved fit has no array {value['array']!r}, which it speaks of.")
            values = self.found.arrays[value["array"]]
            return values if value["dtype"] == "host" else as_like(values, self.like, _dtype(self.like, value["dtype"]))
        if "layout" in value:
            return replace(self.layout, block=replace(self.layout.block, name=value["layout"]))
        if "shared" in value:
            return self.sources[value["shared"]]
        raise InvalidInput(f"The saved fit has an entry {value!r:.80}, which means nothing.")

    def _object(self, value: dict[str, Any]) -> Any:
        if value["class"] not in CLASSES:
            raise InvalidInput(f"The saved fit has an operator of the class {value['class']!r}; this is not known.")
        kind = CLASSES[value["class"]]
        if value.keys() != {"class", *ARGUMENTS[kind]}:
            raise InvalidInput(f"The saved fit has a {value['class']} of {sorted(value)}; expected {ARGUMENTS[kind]}.")
        return kind(**{name: self.unpack(item) for name, item in value.items() if name != "class"})

    def _rows(self, entry: dict[str, Any], loader: Iterable[object]) -> RowDraws:
        source = RowDraws(self.provider, loader, entry["kind"], entry["fisher"], entry["seed"], progress=False)
        source.weight, source.has_draws = entry["weight"], entry["has_draws"]
        return source


def _dtype_name(array: Array) -> str:
    """The name of its numbers; "host" for what stays in NumPy whatever the framework."""
    return "host" if isinstance(array, np.ndarray) else str(array.dtype).rsplit(".", 1)[-1]


def _dtype(like: Array, name: str) -> Any:
    return like.dtype if name == "host" else dtype_named(name, like)
