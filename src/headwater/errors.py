"""Every exception of headwater; each is also a standard one, so that `except ValueError` keeps working.

HeadwaterError
├── InvalidInput (ValueError)               something you passed
│   ├── UnsupportedInfluenceModeError       mode is neither "up" nor "perturbation"
│   ├── BatchMismatch                       x, y, weights, ids of different lengths; an empty batch or loader
│   ├── ShapeMismatch                       an array whose axes do not fit the operator or the block
│   ├── BlockMismatch                       unknown, missing, doubled or mis-sized blocks
│   ├── InvalidSetting                      a damping, method, block structure or option that means nothing
│   └── NonFiniteValue                      NaN or infinity in losses, gradients or curvature
├── UnsupportedModel (TypeError)            a model, layer or input that cannot be attributed, and why
│   ├── RowsInteract                        a row's result depends on the other rows of its batch
│   └── UnsupportedLoss                     a loss or likelihood that has no per-row meaning
├── SingularOperator (ArithmeticError)      not invertible at this damping
│   ├── IndefiniteCurvature                 negative eigenvalues at this damping
│   └── Diverged                            an iteration ran away; says which step size to try
├── NotFittedError (ValueError, AttributeError)
├── StaleFit (RuntimeError)                 the weights have changed since `fit`
├── NotConverged (UserWarning)              a warning: solves missed their tolerance
└── MissingExtra (ImportError)              an optional package is not installed
"""


class HeadwaterError(Exception):
    """Root of the tree."""


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
    """NaN or infinity where a number is needed."""


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


class NotConverged(HeadwaterError, UserWarning):
    """Solves missed their tolerance; given as a warning, since what they found may still serve."""


class MissingExtra(HeadwaterError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"This needs {package}, which is not installed: pip install 'headwater[{extra}]'")
