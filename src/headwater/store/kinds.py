"""What a folder of ours is, for messages to somebody who opened it as something else."""

from __future__ import annotations

from pathlib import Path

HEADS = {
    "fit.json": "a saved fit, which influence.load(path) reads",
    "recipe.json": "a bank of retrained models, which headwater.evaluate.Bank.open(path) reads",
    "manifest.json": "kept rows, which hw.KeptGradients.open(path) or hw.KeptFactors.open(path) reads",
    "identity.json": "the tiles of a run, or the sums of a fit, which attribute or fit(..., store=path) goes on with",
    "zarr.json": "saved scores, which hw.Scores.open(path) reads",
}
"""By the file that each kind has, in the order in which they are looked for: tiles have arrays of zarr inside."""


def kind_of(folder: Path) -> str:
    """ "; it is a saved fit, which ...", or "" for a folder of nobody knows what."""
    return next((f"; it is {kind}" for head, kind in HEADS.items() if (folder / head).is_file()), "")
