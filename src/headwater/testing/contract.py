"""What all contracts share: arrays of the framework under test, comparison within rounding, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from headwater.arrays import Array, is_array, to_numpy


class Contract:
    """A class of claims, named `test_...`, about one implementation; a subclass says which.

    Works under pytest as it is, and under unittest beside `unittest.TestCase`. Everything random has a fixed seed.
    """

    rounding: float = 1e3
    """How many times eps may be lost, relative to the largest number of what is expected."""
    has_empty_arrays: bool = True
    """Whether an array of no rows still has columns; nested lists do not."""

    def array(self, values: np.ndarray) -> Array:
        """A hook: host numbers as an array of the framework under test; NumPy's own by default."""
        return values

    def random(self, *shape: int, seed: int = 0) -> np.ndarray:
        """Standard normal numbers."""
        return np.random.default_rng((seed, *shape)).standard_normal(shape)

    def check(self) -> None:
        """All claims, one after the other; for implementations that a test draws by chance."""
        for name in dir(type(self)):
            if name.startswith("test_"):
                getattr(self, name)()

    def assert_same(self, got: object, expected: object, *, scale: float | None = None) -> None:
        """Equal shapes, and numbers equal within `rounding` times eps times `scale`, by default max |expected|."""
        found, wanted = host(got), host(expected)
        assert found.shape == wanted.shape, f"the shape is {found.shape}, expected {wanted.shape}"
        if found.size:
            size = float(np.max(np.abs(wanted))) if scale is None else scale
            np.testing.assert_allclose(found, wanted, rtol=0, atol=self.rounding * epsilon(found) * size)

    @contextmanager
    def refuses(self, error: type[Exception], *words: object) -> Iterator[None]:
        """The body raises `error`, and its message has all the words."""
        try:
            yield
        except error as raised:
            missing = [str(word) for word in words if str(word) not in str(raised)]
            assert not missing, f"the message does not say {missing}: {raised}"
            return
        raise AssertionError(f"expected {error.__name__}, and nothing was raised")


def host(values: Any) -> np.ndarray:
    """Numbers of any framework, or Python's own, as a NumPy array."""
    return to_numpy(values) if is_array(values) else np.asarray(values)


def epsilon(values: np.ndarray) -> float:
    """The distance from 1 to the next number; float64's for whole numbers."""
    return float(np.finfo(values.dtype if values.dtype.kind == "f" else np.float64).eps)
