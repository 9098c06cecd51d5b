"""The experiment: a network that was taught wrong labels, and the rows that made it go wrong.

    load      handwritten digits (scikit-learn); some 4s in the training set are called 9, some 7s are called 1
    explore   train a small network, attribute its wrong predictions, retrain without the rows found

What comes out is plain data. All is drawn from one seed: same seed, same numbers. Frameworks are imported when the demo
runs, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.demo.methods import CHECKPOINTS, L2, METHODS, Recipe, recipe_of
from headwater.errors import MissingExtra
from headwater.progress import bar

Floats = NDArray[np.float64]

MISLABELLED = ((4, 9, 0.3), (7, 1, 0.2))
"""Planted in the training set: (digit, what it is called instead, share of that digit's rows)."""

WIDTHS = (64, 64, 64, 10)
PIXELS, HIDDEN, LOSS, RANDOM = "nearest in pixels", "nearest in last hidden layer", "highest own loss", "random"
NOTHING = "nothing"


@dataclass(frozen=True)
class Settings:
    """What the demo does, and how much of it."""

    seed: int = 0
    """Of the split, the wrong labels, the network, and all else that is drawn."""
    method: str = "ekfac"
    """A name in METHODS."""
    damping: float = 1.0
    """Times the mean eigenvalue of a block's curvature; not read by methods without curvature."""
    train: int = 1000
    """Rows to train on, of 1797."""
    queries: int | None = None
    """Rows to query with; None for all the rest."""
    steps: int = 500
    """Of SGD, 64 rows each."""
    explained: int = 20
    """Wrong predictions to retrain for, drawn at random (all of them if there are fewer)."""
    removed: int = 30
    """Rows to remove for each of these."""
    retrains: int = 4
    """Fresh seeds for each removal."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Digits:
    """The data. x_train [n, 64], x_query [q, 64], ink from 0 to 1; given, original [n] and y_query [q]: digits."""

    x_train: NDArray[np.float32]
    given: NDArray[np.int64]
    original: NDArray[np.int64]
    x_query: NDArray[np.float32]
    y_query: NDArray[np.int64]

    @property
    def mislabelled(self) -> NDArray[np.bool_]:
        """[n]: rows whose given label is not the original one."""
        return self.given != self.original


@dataclass(frozen=True)
class Findings:
    """All that was found, as plain arrays. w wrong predictions, n train rows, e of the w retrained for, r retrains."""

    settings: Settings
    digits: Digits
    wrong: NDArray[np.int64]
    """[w] positions among the queries."""
    predicted: NDArray[np.int64]
    """[w] what the network says of them."""
    scores: Floats
    """[w, n]; positive: the row helps."""
    unit: str
    """Of the scores: "removal", or "influence" for methods that forecast nothing."""
    explained_as: str
    """What of a query the scores are about: "loss", "margin" or "negative_logit"."""
    rankings: dict[str, Floats]
    """By name, the attribution first: [w, n], larger is looked at first."""
    self_influence: Floats
    """[n]; by another method than the scores where the recipe says so."""
    losses: Floats
    """[n]: each train row's own loss, under the given label."""
    explained: NDArray[np.int64]
    """[e] positions among the w."""
    retrained_losses: dict[str, Floats]
    """By what was removed: [e, r], the loss of each explained query."""
    retrained_right: dict[str, Floats]
    """Likewise, 1 where the prediction is right."""

    @property
    def recipe(self) -> Recipe:
        return METHODS[self.settings.method]

    @property
    def name(self) -> str:
        return self.recipe.title

    @cached_property
    def planted(self) -> NDArray[np.bool_]:
        """[w]: mistakes of a kind that the wrong labels teach."""
        true = self.digits.y_query[self.wrong]
        return np.any([(true == a) & (self.predicted == b) for a, b, _ in MISLABELLED], axis=0)


def load(settings: Settings) -> Digits:
    """Split the digits and plant the wrong labels, by the seed."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([settings.seed, 0])
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    train, query = order[: settings.train], order[settings.train :][: settings.queries]
    given = y[train].copy()
    for digit, called, share in MISLABELLED:
        rows = rng.permutation(np.flatnonzero(y[train] == digit))
        given[rows[: round(share * len(rows))]] = called
    ink = (x / 16).astype(np.float32)
    return Digits(ink[train], given, y[train], ink[query], y[query])


def explore(settings: Settings) -> Findings:
    """Run the whole experiment.

    Errors: MissingExtra without scikit-learn or torch; InvalidSetting for an unknown method.
    """
    check(settings)
    from headwater.retraining.torch.trainer import one_thread

    with one_thread():
        return _explore(settings, load(settings))


def check(settings: Settings) -> None:
    """Errors: InvalidSetting for an unknown method; MissingExtra without scikit-learn or torch."""
    recipe_of(settings.method)
    for package, module in (("scikit-learn", "sklearn"), ("torch", "torch")):
        if find_spec(module) is None:
            raise MissingExtra(package, "demo")


def _explore(settings: Settings, digits: Digits) -> Findings:
    network = train_network(settings, digits)
    predicted = network.logits(digits.x_query)[0].argmax(-1).numpy()
    wrong = np.flatnonzero(predicted != digits.y_query)
    scores, unit, explained_as, self_influence = _attribute(settings, digits, network, wrong)
    losses = network.losses(digits.x_train, digits.given)[0].double().numpy()
    hidden = [network.features(x)[0].numpy() for x in (digits.x_query[wrong], digits.x_train)]
    rankings = {METHODS[settings.method].title: -scores, **_baselines(digits, wrong, losses, *hidden)}
    rng = np.random.default_rng([settings.seed, 1])
    explained = np.sort(rng.permutation(len(wrong))[: settings.explained])
    removed = _removals(settings, {name: ranking[explained] for name, ranking in rankings.items()}, rng)
    retrained_losses, retrained_right = _retrain(settings, digits, wrong[explained], removed)
    return Findings(
        settings=settings,
        digits=digits,
        wrong=wrong,
        predicted=predicted[wrong],
        scores=scores,
        unit=unit,
        explained_as=explained_as,
        rankings=rankings,
        self_influence=self_influence,
        losses=losses,
        explained=explained,
        retrained_losses=retrained_losses,
        retrained_right=retrained_right,
    )


def train_network(settings: Settings, digits: Digits) -> Any:
    """The network that is explained, a StackedMlps of one: with checkpoints, or its last layer refitted, if need be."""
    from headwater.retraining.torch.trainer import refit_heads

    recipe = METHODS[settings.method]
    every = settings.steps / CHECKPOINTS
    middles = [round((k + 0.5) * every) for k in range(CHECKPOINTS)] if recipe.checkpoints else []
    keep = np.ones((1, settings.train), bool)
    network = _train(settings, digits, keep, [settings.seed], "training", checkpoints=middles)
    return refit_heads(network, digits.x_train, digits.given, l2=L2) if recipe.refitted else network


def _train(
    settings: Settings,
    digits: Digits,
    keep: NDArray[np.bool_],
    seeds: list[int],
    what: str,
    checkpoints: Sequence[int] = (),
) -> Any:
    """StackedMlps, one per seed, each on the rows it keeps. keep: [m, n]."""
    from headwater.retraining.torch.trainer import train_mlps

    total = len(seeds) * settings.steps
    with bar(what, not settings.quiet, total, "steps") as shown:
        return train_mlps(
            digits.x_train,
            digits.given,
            keep,
            seeds,
            widths=WIDTHS,
            steps=settings.steps,
            l2=L2,
            checkpoints=checkpoints,
            progress=shown.update,
        )


def make_influence(settings: Settings, network: Any, name: str | None = None) -> Any:
    """An influence on the network, not fitted yet, by the settings' method or by another one of METHODS."""
    import headwater as hw
    from headwater.retraining.torch.trainer import training_loss
    from headwater.torch import TorchComposableInfluence

    recipe, model, points = recipe_of(name or settings.method), network.model(0), network.checkpoints
    method = recipe.method(settings.seed, tuple(point.rate for point in points))
    last = str(len(model) - 1)
    return TorchComposableInfluence(
        model,
        training_loss,
        method,
        blocks={"head": [last]} if recipe.blocks == "head" else recipe.blocks,
        damping=hw.relative(settings.damping) if method.predicts_removal else None,
        checkpoints=[point.models.model(0) for point in points] or None,
    )


def _attribute(
    settings: Settings, digits: Digits, network: Any, wrong: NDArray[np.int64]
) -> tuple[Floats, str, str, Floats]:
    """Scores of every train row for every wrong prediction, [w, n], their unit, what they are about, and the rows'
    self-influence, [n].
    """
    from headwater.retraining.torch.trainer import batches

    recipe, show = METHODS[settings.method], not settings.quiet
    train = batches(digits.x_train, digits.given)
    queries = batches(digits.x_query[wrong], digits.y_query[wrong])
    influence = make_influence(settings, network).fit(train, progress=show)
    unit = "removal" if influence.method.predicts_removal else "influence"
    scores = influence.attribute(train, queries, unit=unit, progress=show)
    itself = influence
    if recipe.itself is not None:
        itself = make_influence(settings, network, recipe.itself).fit(train, progress=show)
    own = itself.self_influence(train, progress=show)
    return np.asarray(scores, np.float64), unit, influence.explained, np.asarray(own, np.float64)


def _baselines(
    digits: Digits, wrong: NDArray[np.int64], losses: Floats, query_features: Floats, train_features: Floats
) -> dict[str, Floats]:
    """Other ways to rank train rows for each wrong prediction, [w, n] each; larger is looked at first.

    Attribution is told the query's true label. So are these: they rank only rows that are labelled otherwise.
    """
    otherwise = digits.given != digits.y_query[wrong][:, None]
    rankings = {
        PIXELS: -_distances(digits.x_query[wrong], digits.x_train),
        HIDDEN: -_distances(query_features, train_features),
        LOSS: losses,
        RANDOM: np.zeros_like(losses),
    }
    return {name: np.where(otherwise, ranking, -np.inf) for name, ranking in rankings.items()}


def _distances(left: Any, right: Any) -> Floats:
    """Euclidean distances between all pairs of rows: [w, d] and [n, d] to [w, n]."""
    return np.linalg.norm(left[:, None].astype(np.float64) - right[None], axis=-1)


def _removals(
    settings: Settings, rankings: dict[str, Floats], rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """The rows to leave out, [e, k] by name: none, the first of each ranking [e, n], and any rows at random."""
    some = next(iter(rankings.values()))
    orders = {name: ranking for name, ranking in rankings.items() if name != PIXELS} | {RANDOM: rng.random(some.shape)}
    first = {name: np.argsort(-o, axis=1, kind="stable")[:, : settings.removed] for name, o in orders.items()}
    return {NOTHING: np.zeros((len(some), 0), dtype=np.int64), **first}


def _retrain(
    settings: Settings, digits: Digits, queries: NDArray[np.int64], removed: dict[str, NDArray[np.int64]]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Train afresh without the removed rows, with the same seeds for every removal.

    Shapes: queries [e]; removed {name: [e, k] train rows}; the results {name: [e, r]}: the loss of each query after its
    own removal, and whether its prediction is right.
    """
    keep = np.ones((len(removed), len(queries), settings.train), dtype=bool)
    for kept, rows in zip(keep, removed.values(), strict=True):
        np.put_along_axis(kept, rows, False, axis=1)
    subsets, subset = np.unique(keep.reshape(-1, settings.train), axis=0, return_inverse=True)  # each is trained once
    seeds = [settings.seed + 1 + repeat for repeat in range(settings.retrains)]
    models = _train(settings, digits, subsets.repeat(len(seeds), axis=0), seeds * len(subsets), "retraining")
    x, y = digits.x_query[queries], digits.y_query[queries]
    shape = (len(subsets), len(seeds), len(queries))
    losses = models.losses(x, y).double().numpy().reshape(shape)
    right = (models.logits(x).argmax(-1).numpy() == y).astype(np.float64).reshape(shape)
    own = np.arange(len(queries))
    pick = dict(zip(removed, subset.reshape(keep.shape[:2]), strict=True))
    return (
        {name: losses[subset, :, own] for name, subset in pick.items()},
        {name: right[subset, :, own] for name, subset in pick.items()},
    )
