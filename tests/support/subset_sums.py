"""A measurement of a subset of rows that imports next to nothing, for processes that are started anew."""

import numpy as np


def measure(rows: np.ndarray, seed: int) -> np.ndarray:
    return np.array([rows.sum(), len(rows) + seed / 2**21])
