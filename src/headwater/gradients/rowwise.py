"""Is the loss of a batch a weighted sum of its rows' losses? From gradients by the output, for every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from headwater.errors import HeadwaterError, InvalidInput

Slopes = tuple[np.ndarray, np.ndarray]
"""Gradients by the output [n, k]: of the batch's loss, and of the rows' losses added up."""


def is_weighted_sum(here: Slopes, *others: Slopes) -> bool:
    """Whether each row's gradient is its own times a weight that no output changes.

    others: the same after the first row's output was changed, in several ways. A weight is then the same before and
    after, and the other rows' gradients are too; where rows have one output, only this tells, since any two numbers are
    parallel.
    """
    return all(_keeps_its_weights(here, moved) for moved in others)


def _keeps_its_weights(here: Slopes, moved: Slopes) -> bool:
    first, second = _weights(*here), _weights(*moved)
    if first is None or second is None:
        return False
    (before, live), (after, still) = first, second
    both = live & still
    same = np.abs(before - after)[both] <= 1e-3 * np.abs(before)[both].max(initial=0.0)
    others = np.abs(here[0] - moved[0])[1:]
    return bool(same.all() and (others <= 1e-3 * np.abs(here[0]).max(initial=0.0)).all())


def _weights(whole: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Each row's weight and whether it has one; None if some gradient is no positive multiple of the row's own."""
    mine, alone = np.linalg.norm(whole, axis=1), np.linalg.norm(own, axis=1)
    live = (mine > 0) & (alone > 0)
    cosine = np.divide((whole * own).sum(1), mine * alone, out=np.ones(len(mine)), where=live)
    from_others = (alone == 0) & (mine > 1e-6 * mine.max(initial=0.0))
    if (cosine < 1 - 1e-3).any() or from_others.any():
        return None
    return np.divide(mine, alone, out=np.zeros(len(mine)), where=live), live


def differing(keys: np.ndarray) -> np.ndarray:
    """The first row, and the next that is another by its key: positions [2], or [1] if all are alike."""
    others = np.flatnonzero(keys != keys[0])
    return np.array([0, *others[:1]])


@contextmanager
def explain_loss_failure(called_with: Callable[[], str]) -> Iterator[None]:
    """Errors: InvalidInput that says what a loss was called with, for whatever it raises."""
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:
        raise InvalidInput(f"The loss failed: {str(error).rstrip('.')}. It was called with {called_with()}") from error
