"""What any method should beat: scores that know nothing of influence, and removing rows at random.

Every scorer returns [q, n], larger first. Their size means nothing, only their order does; and of the loss ranking and
BM25 the sign means nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import BatchMismatch, InvalidInput, MissingExtra, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import Floats, row_features
from headwater.evaluate.intervals import Interval, percentiles
from headwater.settings import check_whole


def random_scores(q: int, n: int, seed: int = 0) -> Floats:
    """Standard normal numbers. Errors: InvalidSetting for fewer than one query or row."""
    check_whole("q", q, 1)
    check_whole("n", n, 1)
    return np.random.default_rng(seed).standard_normal((q, n))


def similarity(
    query_features: ArrayLike,
    train_features: ArrayLike,
    query_labels: ArrayLike | None = None,
    train_labels: ArrayLike | None = None,
) -> Floats:
    """Cosines of features (inputs, or a model's embeddings); with labels, minus the cosine where these differ.

    Shapes: features [q, d] and [n, d]; labels [q] and [n]. A row of zeros has no direction: its cosines are 0.
    Errors: ShapeMismatch; BatchMismatch for labels of another length; NonFiniteValue; InvalidInput for labels of one
    side only.
    """
    query, train = row_features(query_features, "query"), row_features(train_features, "train")
    if query.shape[1] != train.shape[1]:
        raise ShapeMismatch(f"Queries have {query.shape[1]} features, train rows {train.shape[1]}.")
    cosines = _unit(query) @ _unit(train).T
    if query_labels is None and train_labels is None:
        return cosines
    if query_labels is None or train_labels is None:
        raise InvalidInput(f"There are labels of the {'train rows' if query_labels is None else 'queries'} only.")
    asked, given = np.asarray(query_labels), np.asarray(train_labels)
    if asked.shape != (len(query),) or given.shape != (len(train),):
        raise BatchMismatch(
            f"The labels are {asked.shape} and {given.shape}; expected ({len(query)},) and ({len(train)},)."
        )
    return np.where(asked[:, None] == given, cosines, -cosines)


def loss_ranking(train_losses: ArrayLike, q: int) -> Floats:
    """The train rows' own losses, the same for all of q queries: what wrong labels are found by at no cost.

    Shapes: train_losses [n]. Errors: ShapeMismatch; NonFiniteValue naming the row; InvalidSetting for no query.
    """
    check_whole("q", q, 1)
    losses = np.asarray(train_losses, dtype=np.float64)
    if losses.ndim != 1 or not len(losses):
        raise ShapeMismatch(f"The losses are {losses.shape}; expected one for each train row, (n,).")
    if not np.isfinite(losses).all():
        row = int(np.isfinite(losses).argmin())
        raise NonFiniteValue(f"The loss of train row {row} is {losses[row]}.")
    return np.tile(losses, (q, 1))


def bm25(query_texts: Sequence[str], train_texts: Sequence[str]) -> Floats:
    """How many words texts share, rare ones counting more; no word is left out as too common.

    A query without a word, or with none that a train text has, scores 0 everywhere.
    Errors: MissingExtra without the package bm25s; InvalidInput for no texts, or train texts without a word.
    Source: Robertson and Zaragoza 2009; k1 = 1.5, b = 0.75, the variant of Lucene.
    """
    if find_spec("bm25s") is None:
        raise MissingExtra("bm25s", "verses")
    import bm25s

    for name, texts in (("query", query_texts), ("train", train_texts)):
        if isinstance(texts, str) or not len(texts):
            raise InvalidInput(f"Expected a sequence of {name} texts, at least one; got {texts!r:.60}.")

    def words(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)

    given = words(train_texts)
    if not any(given):
        raise InvalidInput(f"None of the {len(given)} train texts has a word.")
    index: Any = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(given, show_progress=False)
    nothing = np.zeros(len(given))
    asked = words(query_texts)
    return np.stack([index.get_scores(text) if text else nothing for text in asked]).astype(np.float64)


# Rows at random -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A figure per query, the same figure with random rows, and the difference, each as its mean over queries."""

    chosen: Interval
    random: Interval
    difference: Interval
    """Chosen minus random, query by query; zero outside: not the luck of the queries or of the random rows."""


def against_random(
    chosen: ArrayLike, random: ArrayLike, *, resamples: int = 2000, level: float = 0.9, seed: int = 0
) -> Compared:
    """Compare figures of queries with those that random rows give.

    The random rows are shared by all queries, so both are resampled: queries, and draws of random rows. What resampling
    the draws moves is multiplied by sqrt(d / (d - 1)) and sqrt((d - 1) / chi2), chi2 with d - 1 degrees of freedom: so
    that few of them are as uncertain as Student's t says. For 50 queries and intervals of nine tenths, zero was inside
    for .98, .94, .92 and .88 of 400 random rankings with 2, 3, 5 and 20 draws whose luck was thrice the queries'.
    Shapes: chosen [q], random [draws, q], two draws or more. Errors: ShapeMismatch; NonFiniteValue; InvalidSetting.
    """
    own, other = np.asarray(chosen, dtype=np.float64), np.asarray(random, dtype=np.float64)
    if own.ndim != 1 or other.ndim != 2 or other.shape[1:] != own.shape or not own.size or len(other) < 2:
        raise ShapeMismatch(
            f"The figures are {own.shape} and {other.shape} at random; expected (q,) and (draws, q), 2 draws or more."
        )
    bad = ~(np.isfinite(own) & np.isfinite(other).all(axis=0))
    if bad.any():
        raise NonFiniteValue(f"The figures of {int(bad.sum())} queries are not finite, the first query {bad.argmax()}.")
    rng, draws = np.random.default_rng(seed), np.empty((resamples, 2))
    count = len(other)
    for place in draws:
        queries = rng.integers(len(own), size=len(own))
        means = other[:, queries].mean(axis=1)
        moved = means[rng.integers(count, size=count)].mean() - means.mean()
        place[:] = own[queries].mean(), means.mean() + moved * np.sqrt(count / rng.chisquare(count - 1))
    value = float(own.mean()), float(other.mean())
    return Compared(
        percentiles(value[0], draws[:, 0], level),
        percentiles(value[1], draws[:, 1], level),
        percentiles(value[0] - value[1], draws[:, 0] - draws[:, 1], level),
    )


def _unit(features: Floats) -> Floats:
    largest = np.abs(features).max(axis=1, keepdims=True)
    scaled = features / np.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
    norms = np.sqrt((scaled**2).sum(axis=1, keepdims=True))
    return scaled / np.where(norms > 0, norms, 1.0)
