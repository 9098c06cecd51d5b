"""A job: one small file that says what to work on and where the results go, and the verbs on it."""

from headwater.job.calls import Call, Evaluation, delete_rows
from headwater.job.settings import Job

__all__ = ["Call", "Evaluation", "Job", "delete_rows"]
