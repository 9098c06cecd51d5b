"""Sections about train rows: who influences most, and which of them are suspicious."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from markupsafe import Markup

from headwater.evaluate.checks import Flags, Floats
from headwater.report.figures import Bar, Bars, Curve, Curves, Figure, Grid, Points, paragraphs
from headwater.report.gather import Gathered, Groups, Scale
from headwater.report.text import number

LISTED = 10
"""Rows of a list, at most."""
HIGH = 0.9
"""Share of rows below a suspicious one, in self-influence, where predictions are not known."""
STANDS_OUT = 35
"""Times the median row's loss: four standard deviations of a squared normal error, 16 / 0.455."""
GROUPS = 16
"""Groups that a chart shows at most."""
POINTS = 3000
"""Rows that a scatter shows at most."""


@dataclass(frozen=True)
class Listing:
    """Train rows worth a look: their places, what is said of each, and the colour of that."""

    title: str
    reading: str
    rows: Sequence[tuple[int, str, str]]

    def numbered(self, numbers: Mapping[int, int]) -> Listing:
        """As `RowsSection.numbered`."""
        return replace(self, rows=[(numbers[place], said, sign) for place, said, sign in self.rows])


@dataclass(frozen=True)
class RowsSection:
    """A section of the page that shows train rows."""

    place: str
    """In the page's address."""
    title: str
    text: Markup
    figures: Sequence[Figure] = ()
    lists: Sequence[Listing] = field(default=())

    @property
    def places(self) -> list[int]:
        """Of all rows that are listed."""
        return [place for each in self.lists for place, *_ in each.rows]

    def numbered(self, numbers: Mapping[int, int]) -> RowsSection:
        """With the rows' numbers on the page in place of their places among the train rows."""
        lists = [
            replace(each, rows=[(numbers[place], said, sign) for place, said, sign in each.rows]) for each in self.lists
        ]
        return replace(self, lists=lists)


# Who influences most --------------------------------------------------------------------------------------------------


def influential(
    found: Gathered, groups: Groups | None, queries: Groups | None, blocks: dict[str, float]
) -> RowsSection:
    """Concentration, groups, blocks, and the rows that help and harm most over all queries."""
    said = _concentrated(found.size)
    figures: list[Figure] = [_concentration(found.size)]
    if groups is not None and len(groups.names) > 1:
        figures.append(_by_group(found, groups))
    if found.between is not None and groups is not None and queries is not None:
        figures.append(_between(found.between, groups, queries))
    if blocks:
        bars = [Bar(name, share, f"{share:.1%}") for name, share in blocks.items()]
        reading = "Each block's share of the size of all scores, over all queries and rows."
        figures.append(Bars("Which parts of the model the scores come from", reading, bars))
    return RowsSection("influence", "Who influences most?", paragraphs(said), figures, _overall(found))


def _concentrated(size: Floats) -> str:
    whole = size.sum()
    if not whole:
        return "All scores are zero: no row influences any query."
    along = np.cumsum(np.sort(size)[::-1]) / whole
    half, top = int(np.searchsorted(along, 0.5 - 1e-12)) + 1, max(1, round(len(size) / 100))
    return (
        f"Half of all influence, by size and over all queries, comes from {counted(half, 'row')} of {len(size):,} "
        f"({half / len(size):.1%}); the first {counted(top, 'row')} hold {along[top - 1]:.0%} of it."
    )


def _three(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else number(value, 3)


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _concentration(size: Floats) -> Figure:
    n, whole = len(size), float(size.sum()) or 1.0
    along = np.cumsum(np.sort(size)[::-1]) / whole
    # Places at about equal distances on an axis of powers: a curve of a million rows has no more corners than that.
    places = np.unique(np.round(np.geomspace(1, n, min(n, 120))).astype(np.int64))
    even = Curve("if all rows had the same", places, places / n)
    return Curves(
        "How concentrated the influence is",
        "Rows from the most influential down, on an axis of powers of ten; the higher the curve begins, the fewer rows "
        "decide.",
        "training rows, most influential first",
        "share of the size of all scores",
        [Curve("these scores", places, along[places - 1]), even],
        x_form="{:,.0f}",
        powers=True,
    )


def _by_group(found: Gathered, groups: Groups) -> Figure:
    counts, net, size = groups.counts, groups.sums(found.total), groups.sums(found.size)
    mean, whole = net / np.maximum(1, counts), float(size.sum()) or 1.0
    order = np.argsort(-size, kind="stable")[:GROUPS]
    bars = [
        Bar(groups.names[g], float(mean[g]), f"{size[g] / whole:.0%} from {counts[g] / len(groups.of):.0%} of rows")
        for g in order
    ]
    added = "summed" if found.added == "sum" else "averaged"
    rest = "" if len(order) == len(groups.names) else f" The {len(order)} largest of {len(groups.names)} groups."
    return Bars(
        "Influence by group of training rows",
        f"Bars: what a row of the group does on average, {added} over queries; to the right it helps, to the left it "
        f"harms. Beside them: the group's share of all influence by size, and of the rows.{rest}",
        bars,
        signed=True,
    )


def _between(between: Floats, groups: Groups, queries: Groups) -> Figure:
    return Grid(
        "Which groups act on which",
        "The mean score of a training row of each column for a query of each row, as a share of the largest; blue "
        "helps, orange harms.",
        "query \\ train",
        queries.names,
        groups.names,
        between,
    )


def _overall(found: Gathered) -> list[Listing]:
    scale, order = Scale.of(float(np.abs(found.total).max(initial=0.0))), np.argsort(-found.total, kind="stable")
    help_, harm = order[:LISTED], order[::-1][:LISTED]
    ends = (
        ("Rows that help most, over all queries", [r for r in help_ if found.total[r] > 0], "help"),
        ("Rows that harm most, over all queries", [r for r in harm if found.total[r] < 0], "harm"),
    )
    unit = f", {scale.in_words}" if scale.power else ""
    reading = f"The {found.added} of a row's scores over all queries{unit}."
    return [
        Listing(title, reading, [(int(r), scale.said(float(found.total[r])), sign) for r in rows])
        for title, rows, sign in ends
        if rows
    ]


# Suspicious rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Suspects:
    """What is known of train rows by themselves; None where it is not known."""

    self_influence: Floats | None = None
    """[n]."""
    losses: Floats | None = None
    """[n]: each row's own loss."""
    copies: Sequence[Sequence[int]] | None = None
    """Places of rows with the same content, two or more each."""
    leaks: Sequence[tuple[int, str]] | None = None
    """Places of train rows that are queries too, and what these are called."""

    disagrees: Flags | None = None
    """[n]: where the model itself predicts another label than the row's own."""

    @cached_property
    def mislabelled(self) -> np.ndarray:
        """Places of rows that stand out (`rule`), those that are highest in all that is known first.

        Another label than the one that the model predicts stands out. Where nobody knows predictions, a row does whose
        loss (or self-influence, if no losses are known) is STANDS_OUT times the median row's: it is a squared error
        for normal errors, whose square has the median 0.455 and is 16 at four standard deviations.
        """
        known, chosen = self._known, self._standing_out
        if chosen is None:
            return np.empty(0, dtype=np.int64)
        places = np.flatnonzero(chosen)
        ranks = [np.argsort(np.argsort(v, kind="stable"), kind="stable")[places] for v in known]
        return places[np.argsort(-np.min(ranks, axis=0), kind="stable")] if known else places

    @property
    def _known(self) -> list[np.ndarray]:
        return [values for values in (self.self_influence, self.losses) if values is not None]

    @property
    def _standing_out(self) -> Flags | None:
        """[n]; None where nothing says which rows do."""
        if self.disagrees is not None:
            return self.disagrees
        if self._median <= 0:
            return None
        known = self._known
        found: Flags = known[-1] > STANDS_OUT * self._median
        return found & (known[0] > np.quantile(known[0], HIGH)) if len(known) > 1 else found

    @property
    def rule(self) -> str:
        """Which rows are listed, how many there are, or that there are none."""
        found, n = len(self.mislabelled), len(next(v for v in self._by_row if v is not None))
        if self.disagrees is not None:
            if not found:
                return (
                    "None stands out: of every row the model predicts the label that the row has. (A model that has "
                    "learned its rows by heart agrees with wrong labels too; one that was trained without them would "
                    "not.)"
                )
            return (
                f"A row stands out where the model itself predicts another label than the row's own: "
                f"{counted(found, 'row')} of {n:,}."
            )
        of = "self-influence" if self.losses is None else "own loss"
        if self._standing_out is None:
            return f"Whether a row stands out is not said: the median row's {of} is {number(self._median, 2)}."
        rule = (
            f"whose {of} is more than {STANDS_OUT} times the median row's, as an error of four standard deviations is"
        )
        if self.losses is not None and self.self_influence is not None:
            rule = f"{rule}, and whose self-influence is in the upper tenth"
        if not found:
            return f"None stands out: there is no row {rule}."
        return f"A row stands out {rule}: {counted(found, 'row')} of {n:,}."

    @property
    def _median(self) -> float:
        """Of what is compared with it: own losses, else self-influence."""
        values = self.self_influence if self.losses is None else self.losses
        return 0.0 if values is None else float(np.median(values))

    @property
    def _by_row(self) -> tuple[np.ndarray | None, ...]:
        return self.disagrees, self.losses, self.self_influence

    def section(self) -> RowsSection | None:
        """None where nothing is known."""
        lists = [each for each in (*self._labels(), *self._copies(), *self._leaks()) if each.rows]
        said = self._said()
        if not said:
            return None
        return RowsSection("suspicious", "Suspicious training rows", paragraphs(said), self._figures(), lists)

    def _said(self) -> str:
        found = []
        if any(values is not None for values in self._by_row):
            found.append(
                "A label that is wrong usually shows twice: the model loses much on the row itself, and the row pulls "
                "hard on its own prediction (self-influence). High values are reasons to look, not proofs: rare but "
                "right rows have them too. " + self.rule
            )
        if self.copies is not None:
            rows = sum(map(len, self.copies))
            found.append(
                f"{rows:,} rows are copies of one another, in {counted(len(self.copies), 'set')}: each shares its "
                "influence with its copies, and removing one alone changes little."
                if rows
                else "No two training rows have the same content."
            )
        if self.leaks:
            rows_are = "row is a query" if len(self.leaks) == 1 else "rows are queries"
            found.append(f"{len(self.leaks):,} training {rows_are} as well: what is asked there was learned.")
        return "\n\n".join(found)

    def _figures(self) -> list[Figure]:
        if self.self_influence is None or self.losses is None:
            return []
        n, marked = len(self.losses), self.mislabelled[:LISTED]
        shown = np.arange(n) if n <= POINTS else np.union1d(np.linspace(0, n - 1, POINTS).astype(np.int64), marked)
        few = "" if len(shown) == n else f" {len(shown):,} of {n:,} rows are drawn."
        marks = "; the orange ones are listed below" if len(marked) else ""
        reading = f"One dot per training row{marks}.{few}"
        places = np.flatnonzero(np.isin(shown, marked))
        losses, itself = self.losses[shown], self.self_influence[shown]
        title = "Self-influence beside the row's own loss"
        return [Points(title, reading, "own loss", "self-influence", losses, itself, places.tolist())]

    def _labels(self) -> list[Listing]:
        rows = [(int(row), self._numbers(int(row)), "") for row in self.mislabelled[:LISTED]]
        known = [n for n, v in (("self-influence", self.self_influence), ("own loss", self.losses)) if v is not None]
        ranked = f"Ranked by {' and '.join(known)}." if known else ""
        rest = f" The first {LISTED} of {len(self.mislabelled):,}." if len(self.mislabelled) > LISTED else ""
        return [Listing("Labels that may be wrong", f"{ranked}{rest}".strip(), rows)] if rows else []

    def _numbers(self, row: int) -> str:
        known = (("loss", self.losses), ("self", self.self_influence))
        return ", ".join(f"{name} {_three(float(values[row]))}" for name, values in known if values is not None)

    def _copies(self) -> list[Listing]:
        sets = sorted(self.copies or (), key=len, reverse=True)[:LISTED]
        rows = [(each[0], f"{len(each)} copies", "") for each in sets]
        return [Listing("Copies", "One row of each set, the largest sets first.", rows)]

    def _leaks(self) -> list[Listing]:
        rows = [(place, f"is query {name}", "") for place, name in (self.leaks or ())[:LISTED]]
        return [Listing("Training rows that are queries", "They have the same content.", rows)]
