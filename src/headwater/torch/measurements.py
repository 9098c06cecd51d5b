"""What can be explained in place of the loss of a torch model: the measurements of every framework."""

from headwater.gradients.measurements import negative_log_probability as negative_log_probability
from headwater.gradients.measurements import negative_logit as negative_logit
from headwater.gradients.measurements import negative_margin as negative_margin
from headwater.gradients.measurements import negative_output as negative_output
from headwater.gradients.measurements import negative_probability as negative_probability
