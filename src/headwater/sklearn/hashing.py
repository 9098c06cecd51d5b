"""What steps of a pipeline are known by: the same text in every process."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from typing import Any

from joblib.hashing import NumpyHasher
from sklearn.feature_extraction.text import CountVectorizer


class StepsHasher(NumpyHasher):
    """As `joblib.hash`, but for where an object lay in memory, which vectorizers of texts keep as `_stop_words_id`."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._copies: list[Any] = []
        """Held until all is hashed: the pickler knows objects by their place, which must not be another's meanwhile."""

    def save(self, obj: Any) -> None:
        if isinstance(obj, CountVectorizer):
            obj = copy(obj)
            with suppress(AttributeError):  # of one that was not fitted
                del obj._stop_words_id
            self._copies.append(obj)
        super().save(obj)
