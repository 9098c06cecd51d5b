"""`headwater demo NAME`: three small jobs, of images, text and a table, and the pages that come of them.

Each is a job as a user's own would be: a function `setup` that gives influence, rows, queries, what these are, and how
to train again. What the shell does with it, it does with any other.
"""

from headwater.demo.run import DEMOS, Demo, job_of, run

__all__ = ["DEMOS", "Demo", "job_of", "run"]
