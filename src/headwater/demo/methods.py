"""What the demo makes of each method of the registry; what a method wants beside its seed is in OWN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import headwater as hw
from headwater.errors import InvalidSetting

if TYPE_CHECKING:
    from headwater.methods.base import Method

Blocks = Literal["full", "layer", "head"]
Rates = tuple[float, ...]

L2 = 1e-3
"""Of the demo's training: l2 / 2 times the squared norm of all parameters is added to the mean loss."""
CHECKPOINTS = 5
"""Weights that training keeps on the way, for methods that read them."""


@dataclass(frozen=True)
class Recipe:
    """How the demo uses a method."""

    make: Callable[[int, Rates], Method]
    """From the seed, and the learning rates at the checkpoints (empty without them)."""
    blocks: Blocks = "layer"
    """What is attributed together: the whole network, each layer by itself, or the last layer alone."""
    checkpoints: bool = False
    """It reads weights from the middle of training."""
    refitted: bool = False
    """It wants the last layer where its regularised loss is stationary, so that layer is trained on until it is."""
    itself: str | None = None
    """The method that gives self-influence in its place, where that of all rows would take this one too long."""
    note: str = ""
    """What a reader of its results should know."""
    title: str = ""
    """The registry's."""

    def method(self, seed: int, rates: Rates = ()) -> Method:
        return self.make(seed, rates)

    @property
    def likeness(self) -> bool:
        """It forecasts no change of loss: there is no damping, and the unit is "influence"."""
        return not self.method(0, (1.0,)).predicts_removal


WHOLE = "The whole network is one block."
BY_CG = (
    "Self-influence is that of conjugate gradients, which solve the same system for all rows together and far sooner."
)
EMPIRICAL = (
    "The curvature is the empirical Fisher, made of the training rows' own gradients. Wrong labels have large ones, "
    "and much alike: the directions that they share count as steep, and are damped for it."
)
LIKENESS = "{title} knows no curvature: read its scores as a ranking by likeness of gradients, not as a forecast."

OWN: dict[str, Recipe] = {
    "direct": Recipe(lambda seed, rates: hw.Direct(curvature="ggn")),
    "lissa": Recipe(
        lambda seed, rates: hw.Lissa(seed=seed),
        itself="cg",
        note=f"Every step sees 64 rows, so that the answer keeps some noise. {BY_CG}",
    ),
    "astra": Recipe(
        lambda seed, rates: hw.Astra(seed=seed, rows=None),
        itself="cg",
        note=f"Every step sees all rows: with steps of a few hundred of these it would not settle. {BY_CG}",
    ),
    "datainf": Recipe(lambda seed, rates: hw.DataInf(), note=EMPIRICAL),
    "dual": Recipe(lambda seed, rates: hw.Dual(seed=seed), "full", note=f"{WHOLE} {EMPIRICAL}"),
    "trak": Recipe(
        lambda seed, rates: hw.Trak(seed=seed),
        "full",
        note="One network, where the paper averages many. What is explained is the negative margin, "
        "log (1 - p)/p of the true label, not the loss: scores are in its unit.",
    ),
    "logra": Recipe(lambda seed, rates: hw.LoGra(seed=seed), note=EMPIRICAL),
    "lorif": Recipe(
        lambda seed, rates: hw.LoRif(seed=seed, kept=32),
        note=f"{EMPIRICAL} A row of one position has a gradient of rank 1 already, so all that LoRIF leaves out here "
        "are the eigenvalues after the 32nd of each layer.",
    ),
    "factgrass": Recipe(lambda seed, rates: hw.FactGrass(seed=seed), note=EMPIRICAL),
    "tracin": Recipe(
        lambda seed, rates: hw.TracIn(learning_rates=rates),
        checkpoints=True,
        note=f"TracIn adds up likeness of gradients over {CHECKPOINTS} checkpoints of the training, times their "
        "learning rates. It looks back on what training did; its scores are no forecast of a removal.",
    ),
    "representer": Recipe(
        lambda seed, rates: hw.Representer(l2=L2),
        "head",
        refitted=True,
        note="Representer points split the true label's logit into one share for each training row. They need the last "
        "layer at the minimum of its regularised loss, so it was trained on, to the end, after the rest had stopped. "
        "They see that layer only, and their scores are no forecast of a removal.",
    ),
    "grad-dot": Recipe(lambda seed, rates: hw.GradDot(), note=LIKENESS.format(title="grad-dot")),
    "grad-cos": Recipe(lambda seed, rates: hw.GradCos(), note=LIKENESS.format(title="grad-cos")),
}
"""Of methods that want another thing than a seed, or have something to be said of them."""


def _of_seed(entry: hw.MethodEntry) -> Recipe:
    """A method with its defaults; its seed, if it draws anything, is the demo's."""

    def make(seed: int, rates: Rates) -> Method:
        drawn = {"seed": seed} if "seed" in {each.name for each in fields(entry.cls)} else {}
        return entry.cls(**drawn)

    return Recipe(make)


METHODS = {entry.name: replace(OWN.get(entry.name) or _of_seed(entry), title=entry.title) for entry in hw.METHODS}
"""By the name that `--method` takes."""


def recipe_of(name: str) -> Recipe:
    """Errors: InvalidSetting for an unknown method."""
    if name not in METHODS:
        raise InvalidSetting(f"The method must be one of {', '.join(METHODS)}; got {name!r}.")
    return METHODS[name]
