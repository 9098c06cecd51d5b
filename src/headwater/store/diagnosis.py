"""What gives reason to doubt scores: weights that are no minimum, negative curvature, missed solves, what was cut off.

Influence functions describe what happens at a minimum of the training objective, where the curvature is positive. How
far a model is from that is seen in its train gradients and in its curvature:

1. At a minimum the mean train gradient is zero. With N rows whose gradients have the covariance S, chance alone gives
   it a squared length of about tr(S) / N: so N |mean|^2 / tr(S) is 0 at the minimum for these very rows, about 1 at the
   minimum for others of their kind, and more where training stopped before.
2. A model trained with weight decay l2 has the mean gradient -l2 w for its weights w (with P in place of l2, if the
   penalty P is known and differs between weights). What l2 explains best, and which share of |mean|^2 that is, is
   shown; only the rest is held against the weights.
3. Effective degrees of freedom, tr(C (C + damping)^-1): how many directions the data decide and the damping does not.

Source: MacKay 1992, "Bayesian interpolation" (effective degrees of freedom).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from headwater.tables import shown, table

FAR_FROM_MINIMUM = 9.0
"""N |mean gradient|^2 / tr Cov, beyond a weight decay's share, that is too much for chance: three standard errors."""
NEGATIVE = 1e-6
"""An eigenvalue below minus this, times the largest, is negative curvature and not rounding."""
CUT = 0.1
"""Share of the spectrum's mass that is missed, and error of a truncated inverse, above which it is worth a word."""


@dataclass(frozen=True)
class Stationarity:
    """The mean train gradient against its noise."""

    gradient: float
    """|mean gradient|."""
    noise: float
    """The length that chance gives it: the root of tr Cov / rows; NaN for one row."""
    weight_decay: float | None = None
    """The l2 that explains most of it; None where weights are not known, or zero."""
    explained: float | None = None
    """The share of |mean gradient|^2 that it explains, from 0 to 1; 0 for a negative l2."""

    @property
    def ratio(self) -> float:
        """N |mean gradient|^2 / tr Cov: 0 at the minimum for these rows, 1 by chance."""
        if self.gradient == 0:
            return 0.0
        return (self.gradient / self.noise) ** 2 if self.noise else math.inf

    @property
    def rest(self) -> float:
        """The part of `ratio` that no weight decay explains."""
        unexplained = 1.0 - (self.explained or 0.0)
        return self.ratio * unexplained if unexplained else 0.0

    @property
    def is_doubtful(self) -> bool:
        return self.rest > FAR_FROM_MINIMUM

    def __str__(self) -> str:
        decay = ""
        if self.weight_decay is not None and self.weight_decay > 0 and self.explained is not None:
            decay = f", {self.explained:.0%} of it a weight decay of {self.weight_decay:.3g}"
        return f"{self.ratio:.3g} times what chance gives{decay}"


@dataclass(frozen=True)
class BlockDiagnosis:
    """One block. None: not known without further work, or has no meaning for the method."""

    size: int
    """Parameters."""
    damping: float
    """Absolute, in the units of the curvature."""
    stationarity: Stationarity | None = None
    nonnegative: bool = False
    """Whether the curvature cannot be negative, by its kind."""
    lowest: float | None = None
    """The smallest eigenvalue of the undamped curvature, as far as it is known."""
    highest: float | None = None
    """The largest one."""
    effective_dof: float | None = None
    """tr(C (C + damping)^-1); NaN where C + damping is not positive."""
    effective_dof_error: float = 0.0
    """Its standard error where it is estimated; zero where it is exact."""
    solves: int = 0
    """Right-hand sides that were solved for; zero for a method that solves nothing."""
    missed: int = 0
    """How many of them missed the tolerance."""
    residual: float | None = None
    """The largest relative residual."""
    kept_rank: int | None = None
    """Directions that a low-rank or projected method keeps; None for a method that keeps all."""
    kept_mass: float | None = None
    """Share of the trace that these hold: of the curvature, or of the projected one."""
    truncation_error: float = 0.0
    """Relative error of a separable inverse spectrum; zero for an exact one."""
    query_error: float = 0.0
    """Of a query's factor the share of its length that was lost, at most, where few outer products stand for it."""

    @property
    def lowest_damped(self) -> float | None:
        """The smallest eigenvalue after damping."""
        return None if self.lowest is None else self.lowest + self.damping

    @property
    def is_negative(self) -> bool:
        """Whether negative curvature is known of, beyond rounding."""
        if self.nonnegative or self.lowest is None:
            return False
        return self.lowest < -NEGATIVE * max(abs(self.highest or 0.0), abs(self.lowest))


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a model, its curvature and its solves. `print` shows a table, and says what is worrying."""

    method: str
    """The method's settings."""
    rows: float
    """Rows that were fitted, each counted with its weight."""
    rows_seen: float
    """Rows whose gradients `stationarity` is about: those of the train loader, met now or by a stopped call before."""
    blocks: Mapping[str, BlockDiagnosis] = field(default_factory=dict)
    stationarity: Stationarity | None = None
    """Of all blocks together; None where the train gradients of the loss were not met."""
    inverts: bool = True
    """Whether the method inverts a curvature."""
    assumes_minimum: bool = True
    """Whether the method's scores are about a minimum of the training objective."""
    doubts: tuple[str, ...] = ()
    """What the method itself found that speaks against its scores, in words."""

    @property
    def effective_dof(self) -> float | None:
        """Of all blocks together; None if it is not known of each."""
        found = [block.effective_dof for block in self.blocks.values()]
        known = [value for value in found if value is not None]
        return math.fsum(known) if known and len(known) == len(found) else None

    @property
    def worries(self) -> tuple[str, ...]:
        """What speaks against the scores, in words; empty if nothing does."""
        found = [*self.doubts, *self._about_weights()]
        for name, block in self.blocks.items():
            found.extend(f"block {name!r}: {said}" for said in _about_block(block))
        return tuple(found)

    def _about_weights(self) -> list[str]:
        whole = self.stationarity
        parts = [name for name, b in self.blocks.items() if b.stationarity is not None and b.stationarity.is_doubtful]
        if whole is None or not (whole.is_doubtful or parts):
            return []
        where = f" (blocks {', '.join(map(repr, parts))})" if parts and len(parts) < len(self.blocks) else ""
        return [
            f"the weights are no minimum{where}: over {self.rows_seen:g} rows the squared mean gradient is {whole}. "
            "Scores then describe the damped response from where training stopped, not from its end; train longer, or "
            "damp more."
        ]

    @property
    def unknown(self) -> tuple[str, ...]:
        """What was not looked at, and would take `influence.diagnose` to know."""
        found = []
        if self.stationarity is None and self.assumes_minimum:
            found.append("whether the weights are a minimum")
        if self.inverts:
            for what, missing in (
                ("negative curvature", lambda b: not b.nonnegative and b.lowest is None),
                ("effective degrees of freedom", lambda b: b.effective_dof is None),
            ):
                names = [name for name, block in self.blocks.items() if missing(block)]
                if names:
                    found.append(what if len(names) == len(self.blocks) else f"{what} of {', '.join(map(repr, names))}")
        return tuple(found)

    def __str__(self) -> str:
        rows = [[name, *_cells(block)] for name, block in self.blocks.items()]
        if len(rows) > 1:
            rows.append(["all", *_cells(self._whole())])
        lines = [self.method, "", table([HEADINGS, *rows]), ""]
        if self.stationarity is not None:
            lines.append(
                f"{self.rows_seen:g} rows seen, {self.rows:g} fitted: the mean gradient is {self.stationarity}."
            )
        worries = self.worries
        lines.extend(f"WORRYING: {said}" for said in worries)
        if not worries:
            lines.append("No warning, as far as was looked." if self.unknown else "No warning.")
        if self.unknown:
            lines.append(f"Not asked: {'; '.join(self.unknown)}. influence.diagnose(train_loader) asks.")
        return "\n".join(lines)

    def _whole(self) -> BlockDiagnosis:
        """The line of the table for all blocks together."""
        blocks = list(self.blocks.values())
        residuals = [block.residual for block in blocks if block.residual is not None]
        return BlockDiagnosis(
            size=sum(block.size for block in blocks),
            damping=math.nan,
            stationarity=self.stationarity,
            effective_dof=self.effective_dof,
            effective_dof_error=math.sqrt(math.fsum(block.effective_dof_error**2 for block in blocks)),
            solves=sum(block.solves for block in blocks),
            missed=sum(block.missed for block in blocks),
            residual=max(residuals, default=None),
            truncation_error=max((block.truncation_error for block in blocks), default=0.0),
            query_error=max((block.query_error for block in blocks), default=0.0),
        )

    def with_query_errors(self, lost: Mapping[str, float]) -> Self:
        """With what queries have lost, by block."""
        blocks = {name: replace(block, query_error=lost.get(name, 0.0)) for name, block in self.blocks.items()}
        return replace(self, blocks=blocks) if lost else self

    def to_json(self) -> str:
        """As text, for `from_json`; NaN and infinity are kept."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found = json.loads(text)
        blocks = {name: BlockDiagnosis(**_with_stationarity(block)) for name, block in found.pop("blocks").items()}
        doubts = tuple(found.pop("doubts", ()))  # not in what was written before there were any
        return cls(**_with_stationarity(found), blocks=blocks, doubts=doubts)


def _with_stationarity(values: dict[str, Any]) -> dict[str, Any]:
    found = values["stationarity"]
    return {**values, "stationarity": None if found is None else Stationarity(**found)}


def _about_block(block: BlockDiagnosis) -> list[str]:
    """What speaks against one block's share of the scores."""
    found = []
    if block.is_negative and block.lowest_damped is not None:
        left = (
            f"the damping of {block.damping:.3g} does not make up for it"
            if block.lowest_damped <= 0
            else f"the damping leaves {block.lowest_damped:.3g}"
        )
        found.append(
            f"negative curvature: the smallest eigenvalue is {block.lowest:.3g} (largest {shown(block.highest)}), and "
            f"{left}. The weights are no minimum; curvature='ggn' is never negative."
        )
    if block.missed:
        found.append(
            f"{block.missed / block.solves:.0%} of the solves missed their tolerance ({block.missed} of "
            f"{block.solves}); the largest relative residual is {block.residual:.2g}."
        )
    if block.kept_mass is not None and block.kept_mass < 1 - CUT:
        found.append(f"the {block.kept_rank} directions that are kept hold {block.kept_mass:.0%} of the trace.")
    if block.truncation_error > CUT:
        found.append(f"the truncated inverse spectrum is {block.truncation_error:.0%} off.")
    if block.query_error > CUT:
        found.append(f"queries are kept as few outer products, and lack up to {block.query_error:.0%} of their length.")
    return found


HEADINGS = ["block", "size", "damping", "gradient", "decay", "lowest", "dof", "kept", "cut", "residual", "missed"]
"""gradient: N |mean|^2 / tr Cov; decay: the share of it that a weight decay explains; dof: effective."""


def _cells(block: BlockDiagnosis) -> list[str]:
    slope = block.stationarity
    dof = shown(block.effective_dof) + (f" +- {block.effective_dof_error:.1g}" if block.effective_dof_error else "")
    kept = "all" if block.kept_rank is None else str(block.kept_rank)
    return [
        str(block.size),
        "-" if math.isnan(block.damping) else shown(block.damping),
        "-" if slope is None else shown(slope.ratio),
        "-" if slope is None or slope.explained is None else f"{slope.explained:.0%}",
        ">= 0" if block.nonnegative and block.lowest is None else shown(block.lowest),
        dof,
        kept + ("" if block.kept_mass is None else f" ({block.kept_mass:.1%})"),
        shown(max(block.truncation_error, block.query_error) or None),
        shown(block.residual),
        "-" if not block.solves else f"{block.missed} of {block.solves}",
    ]
