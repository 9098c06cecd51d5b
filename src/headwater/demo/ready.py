"""The demo's network with a fitted influence, and its rows: for what works on any influence, such as verifying."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from headwater.demo.experiment import Settings, check, load, make_influence, train_network


def ready(settings: Settings) -> tuple[Any, Iterable[object], Iterable[object]]:
    """The influence, batches of the train rows, and batches of the queries.

    Errors: MissingExtra without scikit-learn or torch; InvalidSetting for an unknown method.
    """
    check(settings)
    from headwater.retraining.torch.trainer import batches

    digits = load(settings)
    train = batches(digits.x_train, digits.given)
    influence = make_influence(settings, train_network(settings, digits))
    return influence.fit(train, progress=not settings.quiet), train, batches(digits.x_query, digits.y_query)
