"""Every exception of headwater; each is also a standard one, so that `except ValueError` keeps working.

HeadwaterError
├── InvalidInput (ValueError)               something you passed
│   ├── UnsupportedInfluenceModeError       mode is neither "up" nor "perturbation"
│   ├── BatchMismatch                       x, y, weights, ids of different lengths; an empty batch or loader
│   ├── ShapeMismatch                       an array whose axes do not fit the operator or the block
│   ├── BlockMismatch                       unknown, missing, doubled or mis-sized blocks
│   ├── InvalidSetting                      a damping, method, block structure or option that means nothing
│   ├── NonFiniteValue                      NaN or infinity in losses, gradients, curvature or scores
│   ├── RowsNotFitted (UserWarning)         train rows that are not the fit's: a warning, or refused
│   └── DamagedFile                         a saved file that is not as it was written, or is not there
├── UnsupportedModel (TypeError)            a model, layer or input that cannot be attributed, and why
│   ├── RowsInteract                        a row's result depends on the other rows of its batch
│   └── UnsupportedLoss                     a loss or likelihood that has no per-row meaning
├── SingularOperator (ArithmeticError)      not invertible at this damping
│   ├── IndefiniteCurvature                 negative eigenvalues at this damping
│   └── Diverged                            an iteration ran away; says which step size to try
├── NotFittedError (ValueError, AttributeError)
├── StaleFit (RuntimeError)                 the weights have changed since `fit`
├── ProcessLost (RuntimeError)              of those that hold a model together, one has not come to the same call
├── NotSaved (FileNotFoundError)            there is nothing saved under that name
├── NotWritten (OSError)                    a file could not be written: a full disk, a folder that is read-only
│   └── AlreadySaved (FileExistsError)      there is something of that name already
├── NotConverged (UserWarning)              a warning: solves missed their tolerance
├── RoughForecast (UserWarning)             a warning: rows whose removal takes most of the curvature with them
├── NoDirection (UserWarning)               a warning: rows without a gradient, where directions were asked for
└── MissingExtra (ImportError)              an optional package is not installed
"""

from __future__ import annotations

from collections.abc import Sequence


class HeadwaterError(Exception):
    """Root of the tree."""

    placed = False
    """Whether a pass over a loader has added which batch it is about."""


class InvalidInput(HeadwaterError, ValueError):
    """Something you passed cannot be used."""


class UnsupportedInfluenceModeError(InvalidInput):
    """The mode is neither "up" nor "perturbation"."""


UnsupportedInfluenceModeException = UnsupportedInfluenceModeError
"""Another name of the same, for code that was written with it."""


class BatchMismatch(InvalidInput):
    """The pieces of a batch disagree in length, or there is nothing in it."""


class ShapeMismatch(InvalidInput):
    """An array's axes do not fit."""


class BlockMismatch(InvalidInput):
    """Unknown, missing, doubled or mis-sized blocks."""


class InvalidSetting(InvalidInput):
    """A setting that means nothing here."""


class NonFiniteValue(InvalidInput):
    """NaN or infinity where a number is needed.

    rows: positions in the batch that was at hand; a pass over a loader adds which batch that was.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()):
        super().__init__(message)
        self.rows = tuple(rows)


class RowsNotFitted(InvalidInput, UserWarning):
    """Train rows that are not those of the fit: given as a warning, and raised where their removal is forecast."""


class DamagedFile(InvalidInput):
    """A saved file that is not as it was written, or is not there."""


class UnsupportedModel(HeadwaterError, TypeError):
    """A model, layer or input that cannot be attributed."""


class RowsInteract(UnsupportedModel):
    """A row's result depends on the other rows of its batch, or on chance."""


class UnsupportedLoss(UnsupportedModel):
    """A loss or likelihood without a meaning for one row."""


class SingularOperator(HeadwaterError, ArithmeticError):
    """The operator cannot be inverted at this damping."""


class IndefiniteCurvature(SingularOperator):
    """The damped curvature has negative eigenvalues."""


class Diverged(SingularOperator):
    """An iteration ran away."""


class NotFittedError(HeadwaterError, ValueError, AttributeError):
    """`fit` has not been called."""


class StaleFit(HeadwaterError, RuntimeError):
    """The model's weights are not those that were fitted."""


class RulesChanged(StaleFit):
    """Gradients take another form than those that a fit was made of: layer rules turned out not to hold. Fit again."""


class ProcessLost(HeadwaterError, RuntimeError):
    """Of the processes that hold a model together, not all have come to the same call."""


class NotSaved(HeadwaterError, FileNotFoundError):
    """There is nothing saved under that name."""


class NotWritten(HeadwaterError, OSError):
    """A file could not be written."""


class AlreadySaved(NotWritten, FileExistsError):
    """There is something of that name already."""


class NotConverged(HeadwaterError, UserWarning):
    """Solves missed their tolerance; given as a warning, since what they found may still serve."""


class RoughForecast(HeadwaterError, UserWarning):
    """Rows whose removal takes most of the curvature with them; given as a warning, with how much stays."""


class NoDirection(HeadwaterError, UserWarning):
    """Rows whose gradient is zero, where directions were asked for; given as a warning, with which."""


class Undetermined(HeadwaterError, UserWarning):
    """Numbers that the rows do not determine, and that are NaN; given as a warning, with which."""


class MissingExtra(HeadwaterError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"This needs {package}, which is not installed: pip install 'headwater[{extra}]'")


EXTRAS = {
    "accelerate": "hf",
    "datasets": "hf",
    "jax": "jax",
    "matplotlib": "plot",
    "peft": "hf",
    "pyarrow": "tables",
    "sklearn": "sklearn",
    "torch": "torch",
    "transformers": "hf",
}
"""Modules that people's own code imports, and which extra brings them."""
