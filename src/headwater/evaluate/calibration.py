"""Which damping forecasts retraining best? Chosen on a path, from a handful of retrained models.

    forecasts  [k, m, q]     of each damping on the path, for each subset and query; see `lds.forecast`
    outputs    [m, r, q]     measured on models retrained on each subset

1. Each damping has an LDS over the subsets; the largest is chosen. (Smoothing along the path was tried: it helps no
   task of the leaderboard, and is wrong where the curve is steeper on one side.)
2. How sure is the choice? Subsets are resampled and the choice is made again: the dampings chosen in all but 10 % of
   the resamples are the interval. The plateau is the stretch of the path around the choice where the LDS is within
   `FLAT` of it: what is lost by choosing otherwise.
3. How good is it? The choice is made on a random half of the subsets and its LDS taken on the other, many times over:
   the mean is the held-out LDS, that no choice has seen. Rank correlations over few subsets come out low, of m by about
   the factor m / (m + 1) (Moran 1948), so it is not to be compared with an LDS of many subsets.
4. By block: the scores are a sum over blocks, and so is the forecast. From the best common damping each block in turn
   takes its best, until none changes; this is kept only if the held-out LDS is larger for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, ShapeMismatch
from headwater.evaluate.checks import Floats, complete_runs, mean_over_runs
from headwater.evaluate.correlation import mean_correlation, mean_spearman_of_each, spearman

FLAT = 0.03
"""How much less LDS still counts as the plateau."""
EVIDENCE = "evidence of the Laplace approximation, no retraining"


@dataclass(frozen=True)
class Calibration:
    """A damping that was chosen by measuring, and how sure the choice is. `print` says it in words."""

    path: tuple[float, ...]
    """The dampings that were tried, ascending."""
    unit: str
    """Of the path: "mean eigenvalues" (relative, by block) or "absolute"."""
    chosen: Mapping[str, float]
    """Of each block, in that unit."""
    source: str
    """What it was measured on."""
    measured: tuple[float, ...] = ()
    """LDS of each damping on the path, the same for all blocks; empty without retraining."""
    interval: tuple[float, float] | None = None
    """Where 90 % of the choices on resampled subsets lie (of one common damping)."""
    plateau: tuple[float, float] | None = None
    """Where the LDS is within .03 of the choice's."""
    held_out: float | None = None
    """LDS of the choice on subsets that it was not made on; None for fewer than 6 subsets. Low, as these are few."""
    over: int | None = None
    """How many subsets each held-out LDS is over."""
    common: float | None = None
    """The held-out LDS of one damping for all blocks, where `chosen` has several."""
    notes: tuple[str, ...] = ()
    """What else there is to know."""

    def to_json(self) -> str:
        """As text, for `from_json`; NaN is kept."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found = json.loads(text)
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
        return cls(**values)

    @property
    def at_an_end(self) -> bool:
        """Whether the best damping may lie beyond the path."""
        return any(value in (self.path[0], self.path[-1]) for value in self.chosen.values())

    def __str__(self) -> str:
        amounts = {f"{value:.3g}" for value in self.chosen.values()}
        said = amounts.pop() if len(amounts) == 1 else ", ".join(f"{n} {v:.3g}" for n, v in self.chosen.items())
        lines = [f"damping {said} ({self.unit}); from: {self.source}"]
        if self.measured:
            lines.append("LDS along the path: " + ", ".join(f"{d:.2g}: {v:.3f}" for d, v in self._pairs()))
        if self.interval is not None and self.plateau is not None:
            lines.append(f"chosen in 90 % of resamples: {self.interval[0]:.2g} to {self.interval[1]:.2g}")
            lines.append(f"{self.flatness}: within {FLAT} of it from {self.plateau[0]:.2g} to {self.plateau[1]:.2g}")
        if self.held_out is not None:
            more = "" if self.common is None else f" (one damping for all blocks: {self.common:.3f})"
            few = "" if self.over is None else f", {self.over} at a time, which reads low by 1 in {self.over + 1}"
            lines.append(f"LDS on subsets that the choice has not seen{few}: {self.held_out:.3f}{more}")
        if self.at_an_end:
            lines.append("the choice is at an end of the path: try further")
        return "\n".join([*lines, *self.notes])

    def _pairs(self) -> list[tuple[float, float]]:
        return [pair for pair in zip(self.path, self.measured, strict=True) if np.isfinite(pair[1])]

    @property
    def flatness(self) -> str:
        """How flat the optimum is, in words."""
        if self.plateau is None:
            return "not known"
        decades = float(np.log10(self.plateau[1] / self.plateau[0])) if self.plateau[0] > 0 else np.inf
        how = "sharp" if decades < 0.75 else "flat" if decades >= 2 else "fairly flat"
        return f"the optimum is {how} ({decades:.1f} decades)"


def choose_damping(
    path: Sequence[float],
    forecasts: Mapping[str, ArrayLike],
    outputs: ArrayLike,
    *,
    unit: str = "mean eigenvalues",
    by_block: bool = False,
    resamples: int = 200,
    seed: int = 0,
) -> Calibration:
    """The damping on an ascending path that forecasts best.

    Shapes: forecasts {block: [k, m, q]}, NaN for a damping that was not tried; outputs [m, r, q], NaN for no run.
    Errors: ShapeMismatch; InvalidInput for fewer than 3 subsets, a path that does not ascend, or outputs that are the
    same for all subsets: nothing can be told from these.
    """
    shares, measured = _checked(path, forecasts, outputs)
    constant = int((np.ptp(measured, axis=0) == 0).sum())
    if constant == measured.shape[1]:
        raise InvalidInput(f"All {constant} queries have the same output on every subset: no damping forecasts that.")
    # Forecasts of blocks add up: scores are sums over blocks.
    total = np.sum(list(shares.values()), axis=0)
    tried = np.isfinite(total).all(axis=(1, 2))
    every = np.arange(len(measured))
    best = _best(total, measured, every)
    rng = np.random.default_rng(seed)
    # Which damping another draw of subsets would have chosen: the spread of the choice, not of the LDS.
    draws = [_best(total, measured, rng.integers(len(every), size=len(every))) for _ in range(resamples)]
    # Places on the path are whole numbers: nothing lies between two dampings that were tried.
    low, high = np.quantile(draws, [0.05, 0.95], method="nearest") if draws else (best, best)
    along = np.full(len(path), np.nan)
    along[tried] = [_lds(total[k], measured, every) for k in np.flatnonzero(tried)]
    halves = _halves(len(every), rng)
    # An LDS on the subsets that chose it is too high; half of them choose, the other half judges.
    common = _held_out(halves, lambda half: dict.fromkeys(shares, _best(total, measured, half)), shares, measured)
    chosen, held_out, beaten = dict.fromkeys(shares, best), common, None
    if by_block and len(shares) > 1:
        apart = _held_out(halves, lambda half: _best_by_block(shares, measured, half), shares, measured)
        # Several dampings have more freedom to fit noise: they must win where they were not chosen.
        if common is not None and apart is not None and apart > common:
            chosen, held_out, beaten = _best_by_block(shares, measured, every), apart, common
    notes = []
    if by_block and len(shares) > 1 and len(set(chosen.values())) == 1:
        notes.append("one damping for all blocks: no held-out subsets speak for several")
    if constant:
        notes.append(f"{constant} of {measured.shape[1]} queries have the same output on every subset, and count as 0")
    runs = int(complete_runs(np.asarray(outputs, dtype=np.float64)).sum())
    return Calibration(
        path=tuple(map(float, path)),
        unit=unit,
        chosen={name: float(path[k]) for name, k in chosen.items()},
        source=f"{len(every)} subsets of the rows, {runs} retrained models",
        measured=tuple(along.tolist()),
        interval=(float(path[low]), float(path[high])),
        plateau=_plateau(path, along, best),
        held_out=held_out,
        common=beaten,
        over=len(halves[0][1]) if halves else None,
        notes=tuple(notes),
    )


def _checked(
    path: Sequence[float], forecasts: Mapping[str, ArrayLike], outputs: ArrayLike
) -> tuple[dict[str, Floats], Floats]:
    amounts, runs = np.asarray(path, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    if len(amounts) < 2 or not (np.diff(amounts) > 0).all():
        raise InvalidInput(f"The path is {list(path)}; expected two dampings or more, ascending.")
    if runs.ndim != 3 or len(runs) < 3:
        raise InvalidInput(f"The outputs are {runs.shape}; expected (m, runs, q) with 3 subsets or more.")
    shares = {name: np.asarray(values, dtype=np.float64) for name, values in forecasts.items()}
    wanted = (len(amounts), len(runs), runs.shape[2])
    for name, values in shares.items():
        if values.shape != wanted:
            raise ShapeMismatch(f"The forecasts of {name!r} are {values.shape}; expected {wanted}.")
    return shares, mean_over_runs(runs)


def _lds(forecast: Floats, measured: Floats, chosen: NDArray[np.int64]) -> float:
    return mean_correlation(spearman(forecast[chosen], measured[chosen]))


def _best(total: Floats, measured: Floats, chosen: NDArray[np.int64]) -> int:
    """The place on the path of the best LDS over these subsets; total [k, m, q]."""
    tried = np.flatnonzero(np.isfinite(total).all(axis=(1, 2)))
    found = mean_spearman_of_each([total[k][chosen] for k in tried], measured[chosen])
    return int(tried[np.argmax(found)])


def _best_by_block(shares: Mapping[str, Floats], measured: Floats, chosen: NDArray[np.int64]) -> dict[str, int]:
    """Coordinate ascent, each block against the others as they are, from the best common damping."""
    start = _best(np.sum(list(shares.values()), axis=0), measured, chosen)
    # From the best common one: a path of k dampings has k^blocks combinations, which nobody can try.
    places = dict.fromkeys(shares, start)
    # Coordinate ascent may go round among equals: five rounds at most.
    for _ in range(5):
        before = dict(places)
        for name in shares:
            others = sum(shares[other][places[other]] for other in shares if other != name)
            places[name] = _best(shares[name] + others, measured, chosen)
        if places == before:
            break
    return places


def _halves(subsets: int, rng: np.random.Generator, count: int = 20) -> list[tuple[NDArray[np.int64], ...]]:
    """Random halves of three subsets or more; none where there are too few."""
    # A correlation needs three.
    if subsets < 6:
        return []
    orders = (rng.permutation(subsets) for _ in range(count))
    return [(order[: subsets // 2], order[subsets // 2 :]) for order in orders]


def _held_out(
    halves: Sequence[tuple[NDArray[np.int64], ...]],
    choose: Callable[[NDArray[np.int64]], Mapping[str, int]],
    shares: Mapping[str, Floats],
    measured: Floats,
) -> float | None:
    """The mean LDS on the second half of what `choose` finds on the first."""
    found = []
    for first, second in halves:
        places = choose(first)
        found.append(_lds(sum(shares[name][place] for name, place in places.items()), measured, second))
    return float(np.mean(found)) if found else None


def _plateau(path: Sequence[float], along: Floats, best: int) -> tuple[float, float]:
    """The stretch around the choice that is within FLAT of it."""
    enough = np.nan_to_num(along, nan=-np.inf) >= along[best] - FLAT
    low = high = best
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < len(along) - 1 and enough[high + 1]:
        high += 1
    return float(path[low]), float(path[high])
