"""The story: what the experiment found, beside its baselines, as text for a terminal and as one HTML page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import headwater
from headwater.demo.experiment import HIDDEN, LOSS, MISLABELLED, NOTHING, RANDOM, WIDTHS, Findings, Floats
from headwater.demo.methods import METHODS
from headwater.evaluate import auc, average_precision, precision_at, recall_at, recall_curve
from headwater.report import (
    Card,
    Condition,
    Curve,
    Curves,
    Dots,
    Fact,
    Known,
    Section,
    Share,
    Suspects,
    Table,
    mean_and_spread,
    page,
)
from headwater.store.score_matrix import ScoreMatrix

BLAMED = (
    "Each prediction that the network gets wrong is traced to the training rows that raised its loss the most. Some of "
    "these carry a label that was made wrong on purpose. Not every mistake comes from them: the planted mistakes "
    "({kinds}) are those that the wrong labels teach.\n\n"
    "Ranking rows by their own loss names much the same rows for every query. That is hard to beat at finding wrong "
    "labels, but it cannot tell which of them made this very mistake: see the last column."
)
ITSELF = (
    "Self-influence is a row's score for itself: how much more the network would lose on that row had it never seen it."
)
STRONG = (
    "A row's own loss is a strong baseline for finding wrong labels, often as good as self-influence and much cheaper: "
    "if that is all you want, try it first."
)
LEFT_OUT = (
    "The test that counts: leave the blamed rows out, train again from fresh seeds, and look at the same predictions. "
    "They were chosen because one network got them wrong, and a new seed alone mends some of them. So the same seeds "
    "also train with nothing left out, and without as many rows drawn at random."
)


def tell(found: Findings) -> str:
    """The findings as plain text, for a terminal."""
    parts = [_opening(found), suspects(found).text(), detection(found).text(), STRONG, removal(found).text()]
    return "\n\n".join([*parts, *filter(None, [foretold(found), found.recipe.note]), f"({_made_in_words(found)})"])


def report(found: Findings) -> str:
    """The findings as one HTML page."""
    return page(_scores(found), _known(found))


def _known(found: Findings) -> Known:
    """What the page says beside the scores."""
    first, digits = _first(found), found.digits
    return Known(
        title="Where did the mistakes come from?",
        lead=_opening(found),
        rows=lambda row: _digit(digits.x_train[row], int(digits.given[row]), int(digits.original[row])),
        queries=lambda query: _digit(digits.x_query[query], int(digits.y_query[query]), int(digits.y_query[query])),
        groups="kind",
        predictions=found.predicted[first],
        suspects=Suspects(found.self_influence, found.losses),
        note=_unit_note(found),
        facts=_facts(found),
        sections=[
            Section("Are the right rows blamed?", BLAMED.format(kinds=_kinds()), [suspects(found)]),
            Section(
                "Do the mistakes go away?", f"{LEFT_OUT}\n\n{foretold(found)}", [removal_dots(found), removal(found)]
            ),
            Section(
                "Wrong labels, without asking about a prediction",
                f"{ITSELF} {STRONG}",
                [detection_curves(found), detection(found)],
            ),
        ],
        made=_made(found),
    )


def _scores(found: Findings) -> ScoreMatrix:
    """The scores of the wrong predictions, those that the wrong labels teach first."""
    first, mislabelled = _first(found), found.digits.mislabelled
    return ScoreMatrix(
        values=found.scores[first],
        query_ids=found.wrong[first],
        train_ids=np.arange(found.scores.shape[1]),
        unit=found.unit,
        n_train=float(found.settings.train),
        method=found.name,
        explained=_explained(found),
        train_columns={"kind": np.where(mislabelled, "mislabelled", "rightly labelled")},
        query_columns={"kind": np.where(found.planted[first], "taught by wrong labels", "other mistakes")},
    )


def _first(found: Findings) -> NDArray[np.int64]:
    """Positions among the wrong predictions: the planted kinds, then the others."""
    return np.argsort(~found.planted, kind="stable")


def _digit(ink: NDArray[np.float32], label: int, original: int) -> Card:
    note = f"but a {original}" if label != original else ""
    return Card(image=1 - ink.reshape(8, 8), label=str(label), note=note)


def _unit_note(found: Findings) -> str:
    nats = "The loss is cross-entropy, in nats." if found.explained_as == "loss" and found.unit == "removal" else ""
    return f"{nats} {found.recipe.note}".strip()


def _explained(found: Findings) -> str:
    """What of a query the scores are about, lower being better."""
    return {"margin": "negative margin", "negative_logit": "negative logit"}.get(found.explained_as, "loss")


def _opening(found: Findings) -> str:
    queries, wrong = len(found.digits.y_query), len(found.wrong)
    return (
        f"A small network was trained on {found.settings.train} handwritten digits. {found.digits.mislabelled.sum()} "
        f"of them were mislabelled on purpose: {_kinds()}. It misreads {wrong} of {queries} new digits. Which training "
        "rows made it do so?"
    )


def _kinds() -> str:
    return ", ".join(f"{share:.0%} of the {digit}s called {called}" for digit, called, share in MISLABELLED)


def _facts(found: Findings) -> list[Fact]:
    blamed = {name: planted for name, _, planted, _ in suspects(found).rows}
    right = {name: Share(float(values.mean())) for name, values in found.retrained_right.items()}
    wanted = found.digits.mislabelled
    return [
        Fact(f"{len(found.wrong)} of {len(found.digits.y_query)}", "predictions are wrong"),
        Fact(
            f"{blamed[found.name]}",
            "of the ten rows blamed for a planted mistake are mislabelled "
            f"(nearest in the last hidden layer: {blamed[HIDDEN]}; random: {blamed[RANDOM]})",
        ),
        Fact(
            f"{right[NOTHING]} to {right[found.name]}",
            f"of {len(found.explained)} mistakes are right after retraining without the blamed rows "
            f"(the nearest rows: {right[HIDDEN]}; random rows: {right[RANDOM]})",
        ),
        Fact(
            f"{auc(found.self_influence, wanted):.3f}",
            f"AUC of self-influence for wrong labels (the row's own loss: {auc(found.losses, wanted):.3f})",
        ),
    ]


def _made(found: Findings) -> dict[str, object]:
    """No time and no version of anything else: the same seed gives the same page."""
    settings = found.settings
    return {
        "command": _command(found),
        "made": None,
        "Python": None,
        "NumPy": None,
        "seed": settings.seed,
        "damping": f"{settings.damping:g} times the mean eigenvalue" if found.unit == "removal" else None,
        "network": f"{'-'.join(map(str, WIDTHS))}, {settings.steps} steps",
        "retrained": f"{settings.retrains} seeds for each change; one network is explained",
        "data": "the handwritten digits that come with scikit-learn",
    }


def _command(found: Findings) -> str:
    return f"headwater demo --seed {found.settings.seed} --method {found.settings.method}"


def _made_in_words(found: Findings) -> str:
    settings = found.settings
    damping = f", damping {settings.damping:g} times the mean eigenvalue" if found.unit == "removal" else ""
    return (
        f"Made by headwater {headwater.__version__}: {_command(found)}. "
        f"{found.name}{damping}; network {'-'.join(map(str, WIDTHS))}, {settings.steps} steps; one network "
        f"is explained, and {settings.retrains} seeds retrained for each change. "
        "Data: the handwritten digits that come with scikit-learn."
    )


def suspects(found: Findings) -> Table:
    """Are the rows blamed for a wrong prediction really mislabelled? Means over predictions, of the first ten rows."""
    digits, planted = found.digits, found.planted
    true = digits.y_query[found.wrong]
    same = digits.mislabelled & (digits.original == true[:, None]) & (digits.given == found.predicted[:, None])

    def share(ranking: Floats, positives: NDArray[np.bool_], which: NDArray[np.bool_]) -> str | Share:
        hits = [precision_at(ranking[i], positives[i], 10) for i in np.flatnonzero(which)]
        return Share(float(np.mean(hits))) if hits else "-"

    everywhere = np.broadcast_to(digits.mislabelled, same.shape)
    return Table(
        title="Are the ten rows blamed for a mistake really mislabelled?",
        reading="Each cell is a share of ten rows, averaged over wrong predictions; more is better. Attribution knows "
        "each query's true label, and so do the baselines: they rank only the rows that are labelled otherwise.",
        columns=(
            "The ten rows ranked first by",
            f"mislabelled, all {len(planted)} mistakes",
            f"mislabelled, {planted.sum()} planted mistakes",
            f"mislabelled this very way, {planted.sum()} planted",
        ),
        rows=[
            (
                name,
                share(ranking, everywhere, np.ones_like(planted)),
                share(ranking, everywhere, planted),
                share(ranking, same, planted),
            )
            for name, ranking in found.rankings.items()
        ],
        ours=0,
    )


def _detectors(found: Findings) -> dict[str, Floats]:
    """Scores of train rows that may give wrong labels away, [n] each."""
    itself = METHODS[found.recipe.itself] if found.recipe.itself else found.recipe
    return {
        f"self-influence ({itself.title})": found.self_influence,
        LOSS: found.losses,
        RANDOM: np.zeros_like(found.losses),
    }


def detection(found: Findings) -> Table:
    """Does self-influence find the wrong labels without any query?"""
    wanted = found.digits.mislabelled
    return Table(
        title="Finding wrong labels without a query",
        reading="AUC is the chance that a wrong label outranks a right one (0.5 is chance, 1 is perfect); the last "
        "column is the share of all wrong labels that are met when the first tenth of the rows is checked.",
        columns=("Rows ranked by", "AUC", "average precision", "found in first 10%"),
        rows=[
            (
                name,
                f"{auc(score, wanted):.3f}",
                f"{average_precision(score, wanted):.3f}",
                Share(recall_at(score, wanted, 0.1)),
            )
            for name, score in _detectors(found).items()
        ],
        ours=0,
    )


def detection_curves(found: Findings) -> Curves:
    """The wrong labels met as the first fifth of the rows is checked."""
    n = len(found.losses)
    checked = np.arange(n // 5 + 1)
    return Curves(
        title="How soon the wrong labels turn up",
        reading="Rows are checked from the highest score down; a curve that rises early saves checking.",
        x_label="share of training rows checked",
        y_label="share of wrong labels found",
        curves=[
            Curve(name, checked / n, recall_curve(score, found.digits.mislabelled)[checked])
            for name, score in _detectors(found).items()
        ],
    )


def removal(found: Findings) -> Table:
    """Does a mistake go away when the rows blamed for it are left out?"""
    return Table(
        title="Retraining without the rows",
        reading="Mean ± standard deviation over seeds, of means over predictions; a useful ranking lowers the loss "
        "more than random rows do, and the first line is what a fresh seed does by itself.",
        columns=(f"{found.settings.removed} rows left out", "loss, nats", "predictions now right, %"),
        rows=[
            (
                name,
                mean_and_spread(losses.mean(0)),
                mean_and_spread(100 * found.retrained_right[name].mean(0), digits=0),
            )
            for name, losses in found.retrained_losses.items()
        ],
        ours=1,
    )


def removal_dots(found: Findings) -> Dots:
    """The losses of `removal`, seed by seed."""
    return Dots(
        title="The loss of the mistakes after retraining",
        reading="Each dot is one seed's mean over the explained mistakes, the tick their mean, the bar one standard "
        "deviation to either side; further left is better.",
        x_label=f"mean loss of {len(found.explained)} wrong predictions, nats",
        conditions=[Condition(name, losses.mean(0)) for name, losses in found.retrained_losses.items()],
        ours=1,
    )


def foretold(found: Findings) -> str:
    """What the scores of the removed rows add up to, beside what retraining did; empty if they forecast no loss."""
    if found.unit != "removal" or found.explained_as != "loss":
        return ""
    harmful = np.sort(found.scores[found.explained], axis=1)[:, : found.settings.removed]
    before, after = (found.retrained_losses[name].mean() for name in (NOTHING, found.name))
    return (
        f"The scores of the {harmful.shape[1]} rows add up to a predicted fall in loss of {-harmful.sum(1).mean():.2f} "
        f"nats per prediction; retraining measured {before - after:.2f} of the {before:.2f} there were. Each score is "
        "a first-order forecast for one row of one network. Sums over many rows overlap, and a loss cannot fall below "
        "zero: read the sum as a ranking, not as a promise."
    )
