"""A bank of retrained models as attribution: labelled scores with error bars, like those of any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, InvalidSetting
from headwater.evaluate.checks import complete_runs, mean_over_runs
from headwater.evaluate.datamodels import ESTIMATES, Datamodel
from headwater.positions import row_positions
from headwater.settings import check_word

if TYPE_CHECKING:
    from headwater.store.scores import Scores


def attribution(
    keep: NDArray[np.bool_],
    outputs: NDArray[np.float64],
    method: str,
    *,
    subsets: Sequence[int] | ArrayLike | None = None,
    penalty: float | None = None,
    explained: str = "loss",
    seed: int = 0,
) -> Scores:
    """See `Bank.attribution`. keep: [m, n]; outputs: [m, r, q], NaN where not run."""
    from headwater.store.scores import Scores

    check_word("method", method, tuple(ESTIMATES))
    chosen = _chosen(outputs, subsets)
    options: dict[str, Any] = {"seed": seed} if method == "lasso" else {}
    if method != "banzhaf":
        options["penalty"] = penalty
    elif penalty is not None:
        raise InvalidSetting("method='banzhaf' is a difference of means, and has no penalty.")
    kept = keep[chosen]
    found = ESTIMATES[method](kept, mean_over_runs(outputs[chosen]), **options)
    one_size = np.ptp(kept.sum(axis=1)) == 0
    return Scores(
        values=found.scores,
        query_ids=np.arange(len(found.scores)),
        train_ids=np.arange(kept.shape[1]),
        unit="replacement" if one_size else "removal",
        n_train=float(kept.shape[1]),
        method=_described(method, kept, found),
        explained=explained,
        errors=found.errors,
    )


def _chosen(outputs: NDArray[np.float64], subsets: Sequence[int] | ArrayLike | None) -> NDArray[np.int64]:
    """Places of subsets that were run. Errors: InvalidInput for one asked for that was not."""
    done: NDArray[np.bool_] = np.any(complete_runs(outputs), axis=1)
    if subsets is None:
        return np.flatnonzero(done)
    asked = row_positions(np.asarray(subsets), len(outputs), "The subsets")
    if not done[asked].all():
        raise InvalidInput(f"Subset {int(asked[~done[asked]][0])} was not run; fill the bank first.")
    return asked


def _described(method: str, kept: NDArray[np.bool_], found: Datamodel) -> str:
    said = f"{method} of {len(kept)} retrained models, each of {kept.mean():.0%} of the rows"
    if found.penalties is not None:
        said += f", penalty {np.median(found.penalties):.3g}"
    return said
