"""Data frames and their columns, as pandas has them: their numbers, and their index as the rows' ids.

pandas is not imported: a frame brings its own methods. Frames of other libraries are made pandas' before (`as_pandas`).

    index            what the rows are called
    0, 1, ..., n-1   nothing: their positions in the loader (a RangeIndex, as pandas gives by itself)
    whole numbers    these numbers
    words            these words
    all else         what `str` says of each label: dates, times, categories, fractions
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from headwater.arrays import is_frame
from headwater.errors import BatchMismatch, InvalidInput

POSITIONS = "reset_index(drop=True) on x and y names them by their positions."


def in_numbers(name: str, value: Any, own: Callable[[np.ndarray], Any]) -> Any:
    """x or y with an array in place of each data frame in it; what is no frame stays as it is.

    own: a float64 array in the model's dtype: inputs, and of targets the fractions, as whole numbers may be classes.
    Shapes: [n, columns] of a frame, [n] of one column. Errors: InvalidInput, naming columns that are no numbers.
    """
    if is_frame(value):
        return _numbers(name, value, own)
    if isinstance(value, Mapping):
        return {key: in_numbers(f"{name}[{key!r}]", v, own) for key, v in value.items()}
    if type(value) is tuple:
        return tuple(in_numbers(f"{name}[{k}]", v, own) for k, v in enumerate(value))
    return value


def _numbers(name: str, frame: Any, own: Callable[[np.ndarray], Any]) -> Any:
    # A frame has a dtype for each column; a column by itself has one.
    kinds = dict(zip(frame.columns, frame.dtypes, strict=True)) if frame.ndim == 2 else {frame.name: frame.dtype}
    words = [f"{column!r} ({kind})" for column, kind in kinds.items() if kind.kind not in "iufb"]
    if words and frame.ndim == 2:
        raise InvalidInput(
            f"{name} has columns that are no numbers: {', '.join(words)}. Leave them out, or make numbers of them: "
            "pandas.get_dummies(frame), or a column's .astype('category').cat.codes."
        )
    if words:
        raise InvalidInput(
            f"{name} is a column of {words[0].rpartition('(')[2][:-1]}, {frame.iloc[0]!r:.40}, ...; give numbers, such "
            "as the position of each row's class: .astype('category').cat.codes."
        )
    whole = all(kind.kind in "iub" for kind in kinds.values()) and name.startswith("y")
    if whole:
        return np.array(frame.to_numpy(dtype=np.int64))  # a copy: pandas' own may be read-only
    # By float64: pandas knows no bfloat16, and missing numbers become NaN, which is refused where it is met.
    return own(np.array(frame.to_numpy(dtype=np.float64, na_value=np.nan)))


def ids_of(x: Any, y: Any, start: int) -> np.ndarray | None:
    """The rows' ids by the index of x or y: [n]; None where there is no frame, or where it counts from `start`.

    start: position, in the loader, of the first row. Errors: InvalidInput where x and y have not the same index;
    BatchMismatch for a label that comes twice.
    """
    indices = [value.index for value in (x, y) if is_frame(value)]
    if not indices:
        return None
    if len(indices) == 2:
        check_same_index(*indices)
    return labels(indices[0], start)


def check_same_index(one: Any, other: Any) -> None:
    """Errors: InvalidInput, naming the first label that differs."""
    # Of different lengths another check speaks.
    if len(one) != len(other) or one.equals(other):
        return
    row = next(k for k, (a, b) in enumerate(zip(one, other, strict=True)) if not _is_same(a, b))
    raise InvalidInput(
        f"The indices of x and y differ: row {row} is {one[row]!r} in x and {other[row]!r} in y. Rows are paired by "
        "their order: give both the same index (y.loc[x.index]), or y.to_numpy() if the order is right."
    )


def _is_same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)


def labels(index: Any, start: int = 0) -> np.ndarray | None:
    """An index as ids: whole numbers or words, [n]; None for the default one. Errors: InvalidInput; BatchMismatch."""
    if is_default(index, start):
        return None
    check_unique(index)
    if index.nlevels > 1:
        raise InvalidInput(
            f"The index has {index.nlevels} levels, {list(index.names)}; rows are called by one label. Choose one with "
            f"reset_index, or name a column by ids=. {POSITIONS}"
        )
    if bool(index.isna().any()):
        raise InvalidInput(f"The index has no label for row {int(np.argmax(index.isna()))}. {POSITIONS}")
    return as_ids(index.tolist(), "The index")


def is_default(index: Any, start: int) -> bool:
    """Whether it counts from `start` by itself, as pandas does where no index was given."""
    # RangeIndex by its name: any other index, even one of these very numbers, was given by somebody.
    named = type(index).__name__ == "RangeIndex"
    return named and bool(index.start == start and (index.step == 1 or len(index) < 2))


def check_unique(index: Any) -> None:
    """Errors: BatchMismatch, naming a label that comes twice."""
    if not index.is_unique:
        label = index[index.duplicated()][0]
        rows = np.flatnonzero(np.asarray(index == label))[:3].tolist()
        raise BatchMismatch(
            f"The index has the label {label!r} more than once (rows {', '.join(map(str, rows))}), so that it does not "
            f"say which row is meant. {POSITIONS}"
        )


def as_ids(given: Iterable[Any], what: str) -> np.ndarray:
    """Labels as ids: whole numbers as they are, all others as words. Errors: InvalidInput for several kinds."""
    found = list(given)
    whole = [isinstance(label, (int, np.integer)) and not isinstance(label, (bool, np.bool_)) for label in found]
    if all(whole):
        return np.array(found, dtype=np.int64)
    kinds = {type(label).__name__ for label in found}
    # As words 1 and "1" would be one row.
    if any(whole) or ("str" in kinds and len(kinds) > 1):
        raise InvalidInput(f"{what} has labels of several kinds: {', '.join(sorted(kinds))}. Make words of them all.")
    return np.array([str(label) for label in found])


def missing_column(name: str) -> str:
    """What is said of a batch without x, or without y."""
    said = f"{name} is None; a batch needs inputs and targets."
    return f"{said} Query rows need no targets with explain='prediction'." if name == "y" else said
