"""What can be explained in place of the loss of a torch model: the measurements of every framework."""

from headwater.gradients.measurements import negative_logit as negative_logit
from headwater.gradients.measurements import negative_margin as negative_margin
