"""What a fit is known by, for what is kept of it."""

from __future__ import annotations

from typing import Any

from headwater.influence import ComposableInfluence
from headwater.store.tiles import rows_digest

FRACTIONS = {"bfloat16": 0.01, "float16": 0.002}
"""How far damping and curvature may be off, relative, in a fit of the same rows: by the model's dtype; else 1e-4."""


def fit_identity(influence: ComposableInfluence) -> dict[str, Any]:
    """As JSON has it: the model, the method, and what it fitted at which damping."""
    fit = influence.identity()
    return {
        **{name: fit[name] for name in ("method", "loss", "architecture", "fingerprint", "blocks")},
        "views": list(influence.provider.views),
        "precision": influence.source.dtype,
        "explained": influence.explained,
        "curvature": {name: float(op.mean_eigenvalue()) for name, op in influence.curvature.items()},
        "damping": influence.absolute_damping,
        "n_train": float(influence.n_train),
        # Two fits of other rows may have one mean eigenvalue. Whatever the batches, the keys are these, sorted.
        "fitted_rows": None if influence.fitted_keys is None else rows_digest(influence.fitted_keys),
    }


def fit_tolerance(influence: ComposableInfluence) -> float:
    """Of the fractions in it: a fit of the same rows in other batches adds up in another order."""
    return FRACTIONS.get(influence.source.dtype, 1e-4)
